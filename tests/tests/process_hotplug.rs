//! Attaching and detaching devices of a machine whose guest knows nothing of it.

use std::net::Ipv4Addr;
use std::time::Instant;

use mayfly_tests::{
    Drive, HOST_TIMEOUT, Response, Result, Scratch, Tap, TestVm, TinyKernel, Vm, wait_until, zeros,
};
use serde_json::{Value, json};

struct Machine {
    vm: Vm,
    scratch: Scratch,
}

fn machine(name: &str, customize: impl FnOnce(TestVm, &Scratch) -> Result<TestVm>) -> Result<Machine> {
    machine_of(name, &TinyKernel::new().print("up\n").halt(), customize)
}

fn machine_of(
    name: &str,
    kernel: &TinyKernel,
    customize: impl FnOnce(TestVm, &Scratch) -> Result<TestVm>,
) -> Result<Machine> {
    let scratch = Scratch::new(name)?;
    for image in ["disk", "hot", "keep", "second"] {
        zeros(&scratch.join(image), 1 << 20)?;
    }
    let vm = TestVm::new(name).kernel(kernel.write(&scratch)?);
    let vm = customize(vm, &scratch)?.start()?;
    assert!(vm.console().wait_for("up", Instant::now() + HOST_TIMEOUT));
    Ok(Machine { vm, scratch })
}

impl Machine {
    fn drive(&self, id: &str) -> Value {
        json!({"drive_id": id, "path_on_host": self.scratch.join(id), "is_root_device": false})
    }

    fn put(&self, id: &str) -> Result<Response> {
        self.vm.put(&format!("/drives/{id}"), &self.drive(id))
    }

    fn delete(&self, id: &str, body: &str) -> Result<Response> {
        self.vm.request("DELETE", &format!("/drives/{id}"), body)
    }

    fn drives(&self) -> Result<Value> {
        Ok(self.vm.get("/vm/config")?.json()?["drives"].clone())
    }

    fn assert_refused_without_change(
        &self,
        request: impl FnOnce() -> Result<Response>,
        words: &[&str],
    ) -> Result {
        let before = self.vm.get("/vm/config")?.json()?;
        request()?.assert_refused(words);
        assert_eq!(self.vm.get("/vm/config")?.json()?, before);
        Ok(())
    }
}

#[test]
fn a_guest_that_does_not_let_go_keeps_its_device() -> Result {
    let machine = machine("hotplug-keep", |vm, _| Ok(vm))?;
    machine.put("hot")?.success()?;
    let asked = || machine.delete("hot", r#"{"timeout_ms": 50}"#);
    machine.assert_refused_without_change(asked, &["hot", "timeout_ms", "force"])?;
    assert_eq!(machine.drives()?[0]["drive_id"], "hot");
    machine.delete("hot", r#"{"force": true}"#)?.success()?;
    assert_eq!(machine.drives()?, json!([]));
    Ok(())
}

#[test]
fn without_a_body_the_device_goes_in_the_end() -> Result {
    let machine = machine("hotplug-plain", |vm, _| Ok(vm))?;
    machine.put("hot")?.success()?;
    machine.delete("hot", "")?.success()?;
    assert_eq!(machine.drives()?, json!([]));
    // Its id and its slot are free again.
    machine.put("hot")?.success()?;
    Ok(())
}

#[test]
fn nobody_waits_for_a_paused_guest_to_let_go() -> Result {
    let machine = machine("hotplug-paused", |vm, _| Ok(vm))?;
    machine.put("hot")?.success()?;
    machine.put("keep")?.success()?;
    machine.vm.pause()?;
    // Far longer than a test may take.
    let asked = || machine.delete("keep", r#"{"timeout_ms": 4000000000}"#);
    machine.assert_refused_without_change(asked, &["keep", "paused", "force"])?;
    machine.assert_refused_without_change(|| machine.delete("none", ""), &["none"])?;
    machine.delete("hot", "")?.success()?;
    assert_eq!(machine.drives()?[0]["drive_id"], "keep");
    assert_eq!(machine.drives()?.as_array().map(Vec::len), Some(1));
    machine.vm.resume()?;
    assert_eq!(machine.vm.get("/")?.json()?["state"], "Running");
    machine.put("hot")?.success()?;
    Ok(())
}

#[test]
fn the_api_serves_others_while_a_guest_is_asked() -> Result {
    let machine = machine("hotplug-wait", |vm, _| Ok(vm))?;
    machine.put("hot")?.success()?;
    let mut waiting = machine.vm.connect()?;
    let body = r#"{"timeout_ms": 60000}"#;
    let head = format!(
        "DELETE /drives/hot HTTP/1.1\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    waiting.send(format!("{head}{body}").as_bytes())?;
    let arrived = || machine.vm.log().contains("Delete request");
    wait_until("the request arrives", HOST_TIMEOUT, arrived)?;
    let second = || machine.delete("hot", r#"{"timeout_ms": 0}"#);
    machine.assert_refused_without_change(second, &["hot", "already"])?;
    machine.vm.get("/")?.success()?;
    machine.delete("hot", r#"{"force": true}"#)?.success()?;
    assert_eq!(waiting.receive()?.status, 204);
    Ok(())
}

/// The control thread once waited for a timer that it had stopped itself.
#[test]
fn a_guest_may_let_go_just_when_its_time_is_over() -> Result {
    let kernel = TinyKernel::new().print("up\n").eject();
    let machine = machine_of("hotplug-meet", &kernel, |vm, _| Ok(vm))?;
    for _ in 0..300 {
        machine.put("hot")?.success()?;
        if machine.delete("hot", r#"{"timeout_ms": 1}"#)?.status != 204 {
            machine.delete("hot", r#"{"force": true}"#)?.success()?;
        }
    }
    assert_eq!(machine.drives()?, json!([]));
    Ok(())
}

/// It once had no disk from then on, while Mayfly kept it attached.
#[test]
fn a_guest_that_lets_go_too_late_is_told_to_take_the_device_again() -> Result {
    let kernel = TinyKernel::new().print("up\n").wait_for_key();
    let kernel = kernel.eject_once().wait_for_slot().print("again\n").halt();
    let machine = machine_of("hotplug-late", &kernel, |vm, _| Ok(vm))?;
    machine.put("hot")?.success()?;
    let asked = || machine.delete("hot", r#"{"timeout_ms": 0}"#);
    machine.assert_refused_without_change(asked, &["hot", "still attached"])?;
    machine.vm.type_in(b"k")?;
    let console = machine.vm.console();
    assert!(console.wait_for("again", Instant::now() + HOST_TIMEOUT));
    assert_eq!(machine.drives()?[0]["drive_id"], "hot");
    Ok(())
}

#[test]
fn what_cannot_be_attached_or_detached_is_refused() -> Result {
    let machine = machine("hotplug-bad", |vm, scratch| {
        Ok(vm.drive(Drive::new("root", scratch.join("disk")).root()))
    })?;
    machine.put("hot")?.success()?;
    machine.assert_refused_without_change(|| machine.put("hot"), &["Device ID in use", "hot"])?;
    machine.assert_refused_without_change(|| machine.delete("none", ""), &["none"])?;
    machine.assert_refused_without_change(|| machine.delete("root", r#"{"force": true}"#), &["root"])?;
    let mut root = machine.drive("second");
    root["is_root_device"] = true.into();
    let refusal = machine.vm.put("/drives/second", &root)?.fault()?;
    assert!(
        refusal.starts_with("Drive config error: 'second' cannot be the root"),
        "{refusal}"
    );
    machine.assert_refused_without_change(|| machine.vm.put("/drives/second", &root), &["second", "root"])?;
    let mut missing = machine.drive("gone");
    missing["path_on_host"] = "/nonexistent/disk".into();
    machine.assert_refused_without_change(
        || machine.vm.put("/drives/gone", &missing),
        &["/nonexistent/disk"],
    )?;
    for body in [r#"{"timeout_ms": -1}"#, r#"{"x": 1}"#, "{", r#"{"force": "yes"}"#] {
        machine.assert_refused_without_change(|| machine.delete("hot", body), &["json"])?;
    }
    let entropy = || machine.vm.request("DELETE", "/entropy", "");
    machine.assert_refused_without_change(entropy, &["Invalid request method"])
}

#[test]
fn without_pci_nothing_comes_or_goes() -> Result {
    let machine = machine("hotplug-mmio", |vm, scratch| {
        Ok(vm.mmio().drive(Drive::new("data", scratch.join("disk"))))
    })?;
    machine.assert_refused_without_change(|| machine.put("hot"), &["PCI is not enabled", "pci=off"])?;
    machine.assert_refused_without_change(|| machine.delete("data", ""), &["PCI is not enabled"])
}

#[test]
fn what_a_detached_drive_has_counted_stays_in_the_sums() -> Result {
    let machine = machine("hotplug-metrics", |vm, _| Ok(vm))?;
    let patch = json!({"drive_id": "hot", "path_on_host": machine.scratch.join("second")});
    let update = |times| -> Result {
        for _ in 0..times {
            machine.vm.patch("/drives/hot", &patch)?.success()?;
        }
        Ok(())
    };
    machine.put("hot")?.success()?;
    update(2)?;
    assert_eq!(machine.vm.counted("block", "update_count")?, 2);
    update(1)?;
    machine.delete("hot", r#"{"force": true}"#)?.success()?;
    assert_eq!(machine.vm.counted("block", "update_count")?, 3);
    machine.put("hot")?.success()?;
    update(3)?;
    machine.delete("hot", r#"{"force": true}"#)?.success()?;
    machine.put("hot")?.success()?;
    update(4)?;
    assert_eq!(machine.vm.counted("block", "update_count")?, 10);
    // The first two times, and those of the last one under this name.
    assert_eq!(machine.vm.counted("block_hot", "update_count")?, 6);
    Ok(())
}

/// There are 1000 GSIs for MSI vectors, and each device has one for its configuration and one per queue.
#[test]
fn devices_of_each_kind_may_come_and_go_more_often_than_there_are_gsis() -> Result {
    const TIMES: u32 = 510;
    let machine = machine("hotplug-cycles", |vm, _| Ok(vm))?;
    let tap = Tap::create("mfcycles", Ipv4Addr::new(10, 78, 200, 1))?;
    // Sockets are left out: the connection of the last request may or may not be closed yet.
    let descriptors = || -> Result<Vec<String>> {
        let folder = std::fs::read_dir(format!("/proc/{}/fd", machine.vm.pid()))?;
        let targets = folder.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
        let mut targets: Vec<_> = targets
            .map(|target| target.to_string_lossy().into_owned())
            .filter(|target| !target.starts_with("socket:"))
            .collect();
        targets.sort();
        Ok(targets)
    };
    machine.put("keep")?.success()?;
    let before = descriptors()?;
    for (path, device) in [
        ("/drives/hot", machine.drive("hot")),
        (
            "/network-interfaces/hot",
            json!({"iface_id": "hot", "host_dev_name": tap.name()}),
        ),
        (
            "/pmem/hot",
            json!({"id": "hot", "path_on_host": machine.scratch.join("hot")}),
        ),
    ] {
        for _ in 0..TIMES {
            machine.vm.put(path, &device)?.success()?;
            machine
                .vm
                .request("DELETE", path, r#"{"force": true}"#)?
                .success()?;
        }
        assert_eq!(descriptors()?, before, "{path}");
    }
    Ok(())
}
