//! `GET /events`: what subscribers are told, and what they cost. A guest of a few instructions is enough.

use std::time::Instant;

use mayfly_tests::{Drive, HOST_TIMEOUT, MonitorBuilder, Result, Scratch, TestVm, TinyKernel, Vm};
use serde_json::{Value, json};

/// The boot timer's register.
const BOOT_TIMER: u32 = 0xc000_0000;

/// A machine with this kernel, and the folder of the kernel.
fn machine(name: &str, kernel: &TinyKernel) -> Result<(TestVm, Scratch)> {
    let scratch = Scratch::new("kernel")?;
    Ok((TestVm::new(name).kernel(kernel.write(&scratch)?), scratch))
}

/// Starts a machine and waits until its guest has said that it is up.
fn up(vm: TestVm) -> Result<Vm> {
    let vm = vm.start()?;
    if vm.console().wait_for("up\n", Instant::now() + HOST_TIMEOUT) {
        return Ok(vm);
    }
    Err(vm.failure("the guest did not come up"))
}

fn names(events: &[Value]) -> Vec<&str> {
    events
        .iter()
        .filter_map(|event| event["event"].as_str())
        .collect()
}

#[test]
fn a_life_is_told_from_start_to_exit() -> Result {
    let monitor = MonitorBuilder::new("life")?.args(["--id", "vm-1"]).start()?;
    let kernel = TinyKernel::new().print("up\n").echo();
    let mut events = monitor.events()?;
    let state = json!({"event": "subscribed", "id": "vm-1", "state": "Not started"});
    assert_eq!(events.next_event()?, Some(state));

    let path = monitor.dir().join("kernel");
    std::fs::write(&path, kernel.elf())?;
    monitor
        .put("/boot-source", &json!({"kernel_image_path": path}))?
        .success()?;
    monitor.action("InstanceStart")?;
    monitor.pause()?;
    monitor.pause()?;
    monitor.resume()?;
    monitor.resume()?;
    monitor.signal(libc::SIGTERM)?;
    monitor.wait_exit()?;

    let rest = events.rest()?;
    assert_eq!(names(&rest), ["started", "paused", "resumed", "exit"]);
    assert_eq!(rest[3], json!({"event": "exit", "signal": libc::SIGTERM}));
    Ok(())
}

#[test]
fn the_guests_end_is_told_before_the_process_ends() -> Result {
    for (kernel, code, last) in [
        (
            TinyKernel::new().print("up\n").wait_for_key().reset(),
            0,
            "guest_reset",
        ),
        (
            TinyKernel::new().print("up\n").wait_for_key().triple_fault(),
            0,
            "guest_reset",
        ),
        (
            TinyKernel::new().print("up\n").wait_for_key().run_off(),
            1,
            "vcpu_failed",
        ),
    ] {
        let (vm, _scratch) = machine("end", &kernel)?;
        let vm = up(vm)?;
        let mut events = vm.events()?;
        vm.type_in(b"x")?;
        let rest = events.rest()?;
        assert_eq!(names(&rest), ["subscribed", last, "exit"]);
        assert_eq!(rest[2]["code"], code);
        assert_eq!(vm.wait_exit()?, code);
    }
    Ok(())
}

#[test]
fn a_changed_device_is_told_and_a_refused_change_is_not() -> Result {
    let (vm, scratch) = machine("update", &TinyKernel::new().print("up\n").halt())?;
    let image = scratch.file("image", [0; 4096])?;
    let vm = up(vm.drive(Drive::new("data", &image)))?;
    let mut events = vm.events()?;
    let patch = |path: &str| vm.patch("/drives/data", &json!({"drive_id": "data", "path_on_host": path}));
    assert_eq!(patch("/nonexistent/disk")?.status, 400);
    patch(&image.display().to_string())?.success()?;
    events.wait_for("subscribed")?;
    let updated = json!({"event": "device_updated", "kind": "block", "id": "data"});
    assert_eq!(events.next_event()?, Some(updated));
    Ok(())
}

#[test]
fn a_device_that_its_driver_breaks_is_told_once() -> Result {
    // A queue of three entries is none: sizes are powers of two.
    let kernel = TinyKernel::new()
        .print("up\n")
        .wait_for_key()
        .agree()
        .set_queue(0, 3, 0x20_0000)
        .set_driver_ok()
        .set_driver_ok()
        .print("broken\n")
        .halt();
    let (vm, scratch) = machine("broken", &kernel)?;
    let image = scratch.file("image", [0; 4096])?;
    let vm = up(vm.mmio().drive(Drive::new("data", &image)))?;
    let mut events = vm.events()?;
    vm.type_in(b"x")?;
    events.wait_for("subscribed")?;
    let event = events.next_event()?.unwrap_or_default();
    assert_eq!(
        (&event["event"], &event["kind"], &event["id"]),
        (&json!("device_needs_reset"), &json!("block"), &json!("data"))
    );
    assert!(
        event["reason"].as_str().is_some_and(|reason| !reason.is_empty()),
        "{event}"
    );
    assert!(vm.console().wait_for("broken\n", Instant::now() + HOST_TIMEOUT));
    vm.pause()?;
    assert_eq!(events.next_event()?, Some(json!({"event": "paused"})));
    assert!(vm.log().contains("needs a reset"), "{}", vm.log());
    Ok(())
}

#[test]
fn the_boot_timer_is_told() -> Result {
    let kernel = TinyKernel::new()
        .print("up\n")
        .wait_for_key()
        .store_byte(BOOT_TIMER, 123)
        .halt();
    let (vm, _scratch) = machine("boot-timer", &kernel)?;
    let vm = up(vm.args(["--boot-timer"]))?;
    let mut events = vm.events()?;
    vm.type_in(b"x")?;
    let event = events.wait_for("boot_timer")?;
    assert!(event["boot_us"].as_u64() > Some(0), "{event}");
    Ok(())
}

#[test]
fn four_may_listen_and_leave_room_for_requests() -> Result {
    let monitor = MonitorBuilder::new("four")?.start()?;
    let mut streams = Vec::new();
    for _ in 0..4 {
        streams.push(monitor.events()?);
    }
    monitor
        .get("/events")?
        .assert_refused(&["Events error", "4 clients"]);
    assert_eq!(monitor.get("/")?.status, 200);
    drop(streams.pop());
    mayfly_tests::wait_until("room for another one", HOST_TIMEOUT, || monitor.events().is_ok())?;
    Ok(())
}

#[test]
fn who_does_not_read_is_told_how_much_it_missed_and_holds_nobody_up() -> Result {
    let (vm, _scratch) = machine("slow", &TinyKernel::new().print("up\n").halt())?;
    let vm = up(vm)?;
    let mut slow = vm.events()?;
    slow.wait_for("subscribed")?;
    for _ in 0..6000 {
        vm.pause()?;
        vm.resume()?;
    }
    let mut told = 0;
    let dropped = loop {
        let event = slow.next_event()?.unwrap_or_default();
        if event["event"] == "lagged" {
            break event["dropped"].as_u64().unwrap_or(0);
        }
        told += 1;
        if told % 100 == 0 {
            vm.pause()?;
            vm.resume()?;
        }
    };
    assert!(told > 1000 && dropped > 0, "{told} {dropped}");
    Ok(())
}
