//! Io threads and devices with several queues, on machines whose guest is a few instructions.

use std::fs;
use std::net::Ipv4Addr;
use std::time::Instant;

use mayfly_tests::{Drive, HOST_TIMEOUT, MonitorBuilder, Net, Result, Scratch, Tap, TestVm, TinyKernel, Vm};
use serde_json::{Value, json};

/// A machine without a driver for its devices.
fn started(vm: TestVm, scratch: &Scratch) -> Result<Vm> {
    let kernel = TinyKernel::new().print("up\n").halt().write(scratch)?;
    let vm = vm.kernel(kernel).start()?;
    assert!(vm.console().wait_for("up\n", Instant::now() + HOST_TIMEOUT));
    Ok(vm)
}

fn io_threads(vm: &Vm) -> Result<Vec<String>> {
    let threads = vm.wakeups()?.into_keys().map(|(_, name)| name);
    let mut names: Vec<_> = threads.filter(|name| name.starts_with("io ")).collect();
    names.sort_unstable();
    Ok(names)
}

#[test]
fn a_machine_has_the_io_threads_that_its_config_says() -> Result {
    let scratch = Scratch::new("io-threads")?;
    let image = scratch.file("image", [0; 4096])?;
    let vm = TestVm::new("io-threads")
        .drive(Drive::new("data", &image))
        .entropy();
    let one = started(vm.clone(), &scratch)?;
    assert_eq!(io_threads(&one)?, ["io 0"]);
    // It has the image.
    drop(one);
    let three = started(vm.machine("io_threads", json!(3)).config_file(), &scratch)?;
    assert_eq!(io_threads(&three)?, ["io 0", "io 1", "io 2"]);
    three.pause()?;
    three.resume()?;
    assert_eq!(three.counted("block", "activate_fails")?, 0);
    Ok(())
}

#[test]
fn io_threads_are_shown_once_set_and_can_be_changed() -> Result {
    let monitor = MonitorBuilder::new("io-threads")?.start()?;
    let shown = || Ok::<_, mayfly_tests::Failure>(monitor.get("/machine-config")?.body);
    assert!(!shown()?.contains("io_threads"));
    let two = json!({"vcpu_count": 1, "mem_size_mib": 64, "io_threads": 2});
    monitor.put("/machine-config", &two)?.success()?;
    assert!(
        shown()?.ends_with(r#""huge_pages":"None","io_threads":2}"#),
        "{}",
        shown()?
    );
    monitor
        .patch("/machine-config", &json!({"io_threads": 16}))?
        .success()?;
    monitor
        .patch("/machine-config", &json!({"smt": false}))?
        .success()?;
    assert_eq!(
        monitor.get("/vm/config")?.json()?["machine-config"]["io_threads"],
        16
    );
    let without = json!({"vcpu_count": 1, "mem_size_mib": 64});
    monitor.put("/machine-config", &without)?.success()?;
    assert!(!shown()?.contains("io_threads"));
    Ok(())
}

#[test]
fn a_count_of_io_threads_out_of_range_is_refused() -> Result {
    let monitor = MonitorBuilder::new("io-threads")?.start()?;
    let before = monitor.get("/machine-config")?;
    let refused = |count: Value, reason: &str| {
        let answer = monitor.patch("/machine-config", &json!({ "io_threads": count }));
        answer.map(|answer| answer.assert_refused(&[reason]))
    };
    refused(json!(0), "io_threads is 0; it must be 1 to 16")?;
    refused(json!(17), "io_threads is 17; it must be 1 to 16")?;
    refused(json!(256), "invalid value: integer `256`, expected u8")?;
    refused(json!("2"), "expected u8")?;
    assert_eq!(monitor.get("/machine-config")?, before);
    Ok(())
}

#[test]
fn a_drive_has_the_queues_that_its_config_says() -> Result {
    let scratch = Scratch::new("queues")?;
    let image = scratch.file("image", [0; 4096])?;
    let drive = |queues: Value| Drive::new("data", &image).with("queues", queues);
    for vm in [TestVm::new("queues"), TestVm::new("queues-mmio").mmio()] {
        let vm = started(vm.drive(drive(json!(16))), &scratch)?;
        let config = vm.get("/vm/config")?;
        assert_eq!(config.json()?["drives"][0]["queues"], 16);
        let patch = json!({"drive_id": "data", "rate_limiter": {"ops": {"size": 5, "refill_time": 5}}});
        vm.patch("/drives/data", &patch)?.success()?;
        assert_eq!(vm.counted("block_data", "update_count")?, 1);
        vm.pause()?;
        vm.resume()?;
    }
    Ok(())
}

#[test]
fn a_count_of_queues_out_of_range_is_refused() -> Result {
    let (monitor, scratch) = (MonitorBuilder::new("queues")?.start()?, Scratch::new("queues")?);
    let image = scratch.file("image", [0; 4096])?;
    let refused = |queues: Value, reason: &str| {
        let body =
            json!({"drive_id": "data", "path_on_host": image, "is_root_device": false, "queues": queues});
        let answer = monitor.put("/drives/data", &body);
        answer.map(|answer| answer.assert_refused(&[reason]))
    };
    refused(json!(0), "drive 'data' asks for 0 queues; it must be 1 to 16")?;
    refused(json!(17), "drive 'data' asks for 17 queues; it must be 1 to 16")?;
    refused(json!(70000), "expected u16")?;
    assert_eq!(monitor.get("/vm/config")?.json()?["drives"], json!([]));
    Ok(())
}

fn tap(number: u8) -> Result<Tap> {
    Tap::create_multi_queue(&format!("mfqueue{number}"), Ipv4Addr::new(10, 81, number, 1))
}

/// Over how many queues the host spreads what it sends by a tap.
fn attached(tap: &Tap) -> Result<usize> {
    let queues = fs::read_dir(format!("/sys/class/net/{}/queues", tap.name()))?;
    let names: Vec<_> = queues
        .map(|queue| Ok(queue?.file_name()))
        .collect::<Result<_>>()?;
    let is_tx = |name: &&std::ffi::OsString| name.to_string_lossy().starts_with("tx-");
    Ok(names.iter().filter(is_tx).count())
}

#[test]
fn a_card_has_the_queues_that_its_config_says() -> Result {
    let scratch = Scratch::new("net-queues")?;
    let (own, other) = (tap(1)?, tap(2)?);
    for vm in [TestVm::new("net-queues"), TestVm::new("net-queues-mmio").mmio()] {
        let vm = started(vm.net(Net::new("net0", &own).with("queues", 4)), &scratch)?;
        assert_eq!(
            vm.get("/vm/config")?.json()?["network-interfaces"][0]["queues"],
            4
        );
        assert_eq!(attached(&own)?, 4);
        let patch = json!({"iface_id": "net0", "link_state": "down", "host_dev_name": other.name()});
        vm.patch("/network-interfaces/net0", &patch)?.success()?;
        assert_eq!(attached(&other)?, 4);
        vm.pause()?;
        vm.resume()?;
        assert_eq!(vm.counted("net", "event_fails")?, 0);
    }
    Ok(())
}

#[test]
fn a_card_with_queues_stays_on_its_tap_when_the_other_has_one_queue() -> Result {
    let scratch = Scratch::new("net-queues-move")?;
    let (own, single) = (tap(3)?, Tap::create("mfqueue4", Ipv4Addr::new(10, 81, 4, 1))?);
    let vm = started(
        TestVm::new("net-queues").net(Net::new("net0", &own).with("queues", 2)),
        &scratch,
    )?;
    let before = vm.get("/vm/config")?;
    let patch = json!({"iface_id": "net0", "link_state": "down", "host_dev_name": single.name()});
    let remedy = "make one with 'ip tuntap add dev mfqueue4 mode tap multi_queue'";
    let refused = vm.patch("/network-interfaces/net0", &patch)?;
    refused.assert_refused(&["'mfqueue4' is not a tap with several queues", remedy]);
    assert_eq!(vm.get("/vm/config")?, before);
    assert_eq!(attached(&own)?, 2);
    Ok(())
}

#[test]
fn a_card_whose_queues_cannot_be_is_refused() -> Result {
    let monitor = MonitorBuilder::new("net-queues")?.start()?;
    let (several, single) = (tap(5)?, Tap::create("mfqueue6", Ipv4Addr::new(10, 81, 6, 1))?);
    let put = |id: &str, tap: &Tap, queues: Value| {
        let body = json!({"iface_id": id, "host_dev_name": tap.name(), "queues": queues});
        monitor.put(&format!("/network-interfaces/{id}"), &body)
    };
    let refused = |tap: &Tap, queues: Value, reason: &str| {
        put("net0", tap, queues).map(|answer| answer.assert_refused(&[reason]))
    };
    refused(
        &several,
        json!(0),
        "interface 'net0' asks for 0 queues; it must be 1 to 16",
    )?;
    refused(
        &several,
        json!(17),
        "interface 'net0' asks for 17 queues; it must be 1 to 16",
    )?;
    refused(&several, json!(-1), "expected u16")?;
    refused(&several, json!(1), "without multi_queue")?;
    refused(
        &single,
        json!(2),
        "ip tuntap add dev mfqueue6 mode tap multi_queue",
    )?;
    for (fields, reason) in [
        (r#""host_fd":50,"queues":2"#, "remove queues, or host_fd"),
        (
            r#""backend":"passt","socket":"/tmp/s","queues":2"#,
            "remove queues, or backend passt",
        ),
        (
            r#""host_dev_name":"mfqueue5","vhost":true,"queues":2"#,
            "remove queues, or vhost",
        ),
    ] {
        let body = format!(r#"{{"iface_id":"net0",{fields}}}"#);
        monitor
            .request("PUT", "/network-interfaces/net0", &body)?
            .assert_refused(&[reason]);
    }
    assert_eq!(
        monitor.get("/vm/config")?.json()?["network-interfaces"],
        json!([])
    );
    put("net0", &several, json!(2))?.success()?;
    let twin = put("net1", &several, json!(2))?;
    twin.assert_refused(&["the tap 'mfqueue5' is already used by interface 'net0'"]);
    Ok(())
}
