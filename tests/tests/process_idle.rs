//! A machine on which nothing happens costs its host nothing: no thread of the monitor wakes up. A guest of a few
//! instructions is enough.

use std::time::{Duration, Instant};

use mayfly_tests::{Drive, HOST_TIMEOUT, Net, Result, Scratch, TestVm, TinyKernel};
use serde_json::json;

/// How long nothing happens.
const QUIET: Duration = Duration::from_secs(5);

#[test]
fn a_halted_guest_with_every_device_wakes_no_thread_of_the_monitor() -> Result {
    let scratch = Scratch::new("idle")?;
    let kernel = TinyKernel::new().print("up\n").halt().write(&scratch)?;
    let image = scratch.file("image", [0; 4096])?;
    let pmem = scratch.file("pmem", vec![0; 2 << 20])?;
    let vm = TestVm::new("idle")
        .kernel(kernel)
        .vcpus(2)
        .drive(Drive::new("data", &image))
        .net(Net::on("eth0", "mfidle0"))
        .entropy()
        .section(
            "vsock",
            json!({"guest_cid": 3, "uds_path": scratch.join("v.sock")}),
        )
        .section("balloon", json!({"amount_mib": 0, "deflate_on_oom": true}))
        .section("memory-hotplug", json!({"total_size_mib": 1024}))
        .section("pmem", json!([{"id": "p", "path_on_host": pmem}]))
        .config_file()
        .start()?;
    assert!(vm.console().wait_for("up\n", Instant::now() + HOST_TIMEOUT));
    // A subscriber and an open connection are no reason to wake up either.
    let mut events = vm.events()?;
    events.wait_for("subscribed")?;
    std::thread::sleep(Duration::from_millis(200));

    let before = vm.wakeups()?;
    std::thread::sleep(QUIET);
    let after = vm.wakeups()?;

    let names: Vec<_> = before.keys().map(|(_, name)| name.as_str()).collect();
    assert!(names.contains(&"api") && names.contains(&"io 0"), "{names:?}");
    assert_eq!(after, before);
    Ok(())
}

#[test]
fn input_that_the_guest_leaves_unread_costs_nothing_when_its_pipe_is_closed() -> Result {
    let scratch = Scratch::new("idle-input")?;
    let kernel = TinyKernel::new().print("up\n").halt().write(&scratch)?;
    let vm = TestVm::new("idle-input").kernel(kernel).start()?;
    assert!(vm.console().wait_for("up\n", Instant::now() + HOST_TIMEOUT));
    // More than the serial port holds.
    vm.type_in(&[b'x'; 300])?;
    vm.close_stdin();
    std::thread::sleep(Duration::from_millis(200));
    let before = vm.control_ticks()?;
    std::thread::sleep(QUIET);
    assert_eq!(vm.control_ticks()?, before);
    Ok(())
}
