//! Memory that can be plugged in, over the API: before start and after it. The guest is a few instructions, and has no
//! driver.

use mayfly_tests::{Monitor, MonitorBuilder, Result, Scratch, TestVm, TinyKernel, Vm};
use serde_json::{Value, json};

fn monitor() -> Result<Monitor> {
    MonitorBuilder::new("hotplug")?.start()
}

fn running(vm: TestVm) -> Result<(Vm, Scratch)> {
    let scratch = Scratch::new("kernel")?;
    let vm = vm.kernel(TinyKernel::new().halt().write(&scratch)?);
    Ok((vm.start()?, scratch))
}

fn sizes(total: u32, block: u32, slot: u32) -> Value {
    json!({"total_size_mib": total, "block_size_mib": block, "slot_size_mib": slot})
}

#[test]
fn sizes_are_shown_with_defaults_in_the_known_order() -> Result {
    let monitor = monitor()?;
    monitor
        .put("/hotplug/memory", &json!({"total_size_mib": 256}))?
        .success()?;
    let body = monitor.get("/vm/config")?.success()?.body;
    let shown = r#""memory-hotplug":{"total_size_mib":256,"block_size_mib":2,"slot_size_mib":128}}"#;
    assert!(body.ends_with(shown), "{body}");
    Ok(())
}

#[test]
fn sizes_that_are_not_made_of_each_other_are_refused() -> Result {
    let monitor = monitor()?;
    for (total, block, slot, word) in [
        (256, 1, 128, "block_size_mib is 1"),
        (384, 6, 384, "block_size_mib is 6"),
        (256, 2, 64, "slot_size_mib is 64"),
        (132, 8, 132, "slot_size_mib is 132"),
        (64, 2, 128, "total_size_mib is 64"),
        (200, 2, 128, "total_size_mib is 200"),
    ] {
        monitor
            .put("/hotplug/memory", &sizes(total, block, slot))?
            .assert_refused(&["Memory hotplug config error", word]);
    }
    assert_eq!(monitor.get("/vm/config")?.json()?["memory-hotplug"], Value::Null);
    Ok(())
}

#[test]
fn status_and_requests_are_for_after_the_start() -> Result {
    let monitor = monitor()?;
    monitor
        .get("/hotplug/memory")?
        .assert_refused(&["before starting"]);
    monitor
        .patch("/hotplug/memory", &json!({"requested_size_mib": 0}))?
        .assert_refused(&["before starting"]);
    monitor
        .get("/hotplug/cpu")?
        .assert_refused(&["Invalid request method and/or path: GET hotplug."]);
    Ok(())
}

#[test]
fn a_guest_without_a_driver_has_a_status_and_takes_no_request() -> Result {
    let (vm, _scratch) = running(TestVm::new("hotplug").memory_hotplug(512))?;
    let shown = concat!(
        r#"{"block_size_mib":2,"total_size_mib":512,"slot_size_mib":128,"#,
        r#""plugged_size_mib":0,"requested_size_mib":0}"#
    );
    assert_eq!(vm.get("/hotplug/memory")?.success()?.body, shown);
    let request = |size: u32| vm.patch("/hotplug/memory", &json!({"requested_size_mib": size}));
    request(128)?.assert_refused(&["Memory hotplug update error", "no running virtio-mem driver"]);
    request(1)?.assert_refused(&["Memory hotplug update error", "requested_size_mib is 1"]);
    request(514)?.assert_refused(&["Memory hotplug update error", "requested_size_mib is 514"]);
    vm.put("/hotplug/memory", &json!({"total_size_mib": 256}))?
        .assert_refused(&["after starting"]);
    assert_eq!(vm.get("/hotplug/memory")?.success()?.body, shown);
    assert_eq!(vm.counted("get_api_requests", "hotplug_memory_count")?, 2);
    assert_eq!(vm.counted("patch_api_requests", "hotplug_memory_fails")?, 3);
    Ok(())
}

#[test]
fn a_machine_without_the_device_says_so() -> Result {
    let (vm, _scratch) = running(TestVm::new("hotplug"))?;
    vm.get("/hotplug/memory")?
        .assert_refused(&["Memory hotplug status error", "PUT /hotplug/memory"]);
    vm.patch("/hotplug/memory", &json!({"requested_size_mib": 0}))?
        .assert_refused(&["Memory hotplug update error", "PUT /hotplug/memory"]);
    Ok(())
}

#[test]
fn more_than_the_cpu_can_address_is_refused_at_start() -> Result {
    let (monitor, scratch) = (monitor()?, Scratch::new("kernel")?);
    let kernel = TinyKernel::new().halt().write(&scratch)?;
    monitor
        .put("/boot-source", &json!({"kernel_image_path": kernel}))?
        .success()?;
    let start = json!({"action_type": "InstanceStart"});
    // 4 PiB less a slot: all that 52 bits of address can name.
    let huge = sizes(4_294_443_008, 2, 524_288);
    monitor.put("/hotplug/memory", &huge)?.success()?;
    monitor.put("/actions", &start)?.assert_refused(&[
        "Start microvm error",
        "total_size_mib",
        "MiB do not fit",
    ]);
    let many = sizes(1 << 31, 2, 128);
    monitor.put("/hotplug/memory", &many)?.success()?;
    monitor
        .put("/actions", &start)?
        .assert_refused(&["Start microvm error", "16777216 slots are more than"]);
    monitor.put("/hotplug/memory", &sizes(1024, 2, 128))?.success()?;
    monitor.put("/actions", &start)?.success()?;
    Ok(())
}
