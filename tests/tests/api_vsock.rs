//! The vsock device over the API: what is refused and with which words, and what becomes of its socket. The guest is a
//! few instructions.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use mayfly_tests::{Monitor, MonitorBuilder, Result, Scratch, TestVm, TinyKernel, Vm};
use serde_json::{Value, json};

fn monitor() -> Result<Monitor> {
    MonitorBuilder::new("vsock")?.start()
}

/// What is left to do is the device and the start.
fn monitor_with_kernel() -> Result<Monitor> {
    let monitor = monitor()?;
    let kernel = monitor.dir().join("kernel");
    std::fs::write(&kernel, TinyKernel::new().halt().elf())?;
    monitor
        .put("/boot-source", &json!({"kernel_image_path": kernel}))?
        .success()?;
    Ok(monitor)
}

fn vsock(path: impl Into<PathBuf>) -> Value {
    json!({"guest_cid": 3, "uds_path": path.into()})
}

/// What `GET /vm/config` shows of it.
fn shown(monitor: &Monitor) -> Result<String> {
    Ok(monitor.get("/vm/config")?.json()?["vsock"].to_string())
}

#[test]
fn a_put_is_shown_without_its_id_and_can_be_repeated() -> Result {
    let monitor = monitor()?;
    assert_eq!(shown(&monitor)?, "null");
    let path = monitor.dir().join("v.sock");
    let put = monitor.put("/vsock", &vsock(&path))?.success()?;
    assert_eq!((put.status, put.header("deprecation")), (204, None));
    let other = json!({"guest_cid": 4, "uds_path": path, "vsock_id": "root"});
    let put = monitor.put("/vsock", &other)?.success()?;
    assert_eq!(put.header("deprecation"), Some("true"));
    let path = path.display();
    assert_eq!(
        shown(&monitor)?,
        format!(r#"{{"guest_cid":4,"uds_path":"{path}"}}"#)
    );
    Ok(())
}

#[test]
fn reserved_addresses_are_refused() -> Result {
    let monitor = monitor()?;
    for cid in [0, 1, 2, u32::MAX] {
        let body = json!({"guest_cid": cid, "uds_path": "v.sock"});
        monitor.put("/vsock", &body)?.assert_refused(&[
            "Vsock config error",
            &format!("guest_cid {cid} is reserved"),
            "use 3 to",
        ]);
    }
    assert_eq!(shown(&monitor)?, "null");
    Ok(())
}

#[test]
fn a_path_that_cannot_be_is_refused_and_nothing_is_left() -> Result {
    let monitor = monitor()?;
    let dir = monitor.dir();
    let missing = dir.join("missing/v.sock");
    monitor
        .put("/vsock", &vsock(&missing))?
        .assert_refused(&["missing/v.sock", "no folder", "create it"]);
    monitor
        .put("/vsock", &vsock("x".repeat(108)))?
        .assert_refused(&["108 bytes", "may have 107", "shorter"]);
    monitor
        .put("/vsock", &vsock(""))?
        .assert_refused(&["not a file name"]);
    assert!(!missing.exists());
    assert_eq!(shown(&monitor)?, "null");
    Ok(())
}

#[test]
fn a_path_in_use_is_refused_even_if_nobody_serves_it_any_more() -> Result {
    let monitor = monitor()?;
    let path = monitor.dir().join("v.sock");
    let listener = UnixListener::bind(&path)?;
    let refusal = ["v.sock", "is in use", "stop the process", "remove the file"];
    monitor.put("/vsock", &vsock(&path))?.assert_refused(&refusal);
    drop(listener);
    monitor.put("/vsock", &vsock(&path))?.assert_refused(&refusal);
    assert!(path.exists());
    std::fs::remove_file(&path)?;
    monitor.put("/vsock", &vsock(&path))?.success()?;
    Ok(())
}

#[test]
fn bodies_that_are_none_are_refused_with_the_field() -> Result {
    let monitor = monitor()?;
    let refused = |body: Value, words: &[&str]| -> Result {
        monitor.put("/vsock", &body)?.assert_refused(words);
        Ok(())
    };
    refused(json!({"uds_path": "v"}), &["missing field `guest_cid`"])?;
    refused(json!({"guest_cid": 3}), &["missing field `uds_path`"])?;
    refused(
        json!({"guest_cid": -1, "uds_path": "v"}),
        &["integer `-1`, expected u32"],
    )?;
    refused(
        json!({"guest_cid": 3, "uds_path": "v", "x": 1}),
        &["unknown field `x`"],
    )?;
    monitor
        .request("GET", "/vsock", "")?
        .assert_refused(&["Invalid request method"]);
    Ok(())
}

/// A machine with a socket `v.sock` in the folder.
fn started(kernel: &TinyKernel, scratch: &Scratch) -> Result<Vm> {
    TestVm::new("vsock")
        .kernel(kernel.write(scratch)?)
        .section("vsock", vsock(scratch.join("v.sock")))
        .start()
}

#[test]
fn the_socket_is_there_while_the_machine_is() -> Result {
    let scratch = Scratch::new("vsock")?;
    let vm = started(&TinyKernel::new().halt(), &scratch)?;
    let path = scratch.join("v.sock");
    assert!(UnixStream::connect(&path).is_ok());
    vm.put("/vsock", &vsock(&path))?
        .assert_refused(&["not supported after starting"]);
    vm.signal(libc::SIGTERM)?;
    assert_eq!(vm.wait_exit()?, -libc::SIGTERM);
    assert!(!path.exists());
    Ok(())
}

#[test]
fn the_socket_goes_when_the_guest_ends_or_the_process_faults() -> Result {
    let scratch = Scratch::new("vsock")?;
    let path = scratch.join("v.sock");
    let vm = started(&TinyKernel::new().reset(), &scratch)?;
    assert_eq!(vm.wait_exit()?, 0);
    assert!(!path.exists());
    let vm = started(&TinyKernel::new().halt(), &scratch)?;
    assert!(path.exists());
    vm.signal(libc::SIGSEGV)?;
    assert_eq!(vm.wait_exit()?, 150);
    assert!(!path.exists());
    Ok(())
}

#[test]
fn a_relative_path_is_in_the_working_folder() -> Result {
    let monitor = monitor_with_kernel()?;
    monitor.put("/vsock", &vsock("v.sock"))?.success()?;
    monitor.action("InstanceStart")?;
    assert!(UnixStream::connect(monitor.dir().join("v.sock")).is_ok());
    Ok(())
}

#[test]
fn a_replaced_path_is_not_used() -> Result {
    let monitor = monitor_with_kernel()?;
    let (first, second) = (monitor.dir().join("first"), monitor.dir().join("second"));
    monitor.put("/vsock", &vsock(&first))?.success()?;
    monitor.put("/vsock", &vsock(&second))?.success()?;
    monitor.action("InstanceStart")?;
    assert!(!first.exists() && second.exists());
    Ok(())
}

#[test]
fn a_start_that_fails_leaves_no_socket_and_can_be_tried_again() -> Result {
    let monitor = monitor()?;
    let (path, kernel) = (monitor.dir().join("v.sock"), monitor.dir().join("kernel"));
    std::fs::write(&kernel, TinyKernel::new().halt().elf())?;
    monitor
        .put("/boot-source", &json!({"kernel_image_path": kernel}))?
        .success()?;
    monitor.put("/vsock", &vsock(&path))?.success()?;
    std::fs::rename(&kernel, kernel.with_extension("away"))?;
    let start = json!({"action_type": "InstanceStart"});
    monitor
        .put("/actions", &start)?
        .assert_refused(&["Start microvm error"]);
    assert!(!path.exists());
    // Somebody else takes the path.
    std::fs::write(&path, "")?;
    std::fs::rename(kernel.with_extension("away"), &kernel)?;
    monitor
        .put("/actions", &start)?
        .assert_refused(&["Start microvm error", "device 'vsock'", "is in use"]);
    std::fs::remove_file(&path)?;
    monitor.put("/actions", &start)?.success()?;
    assert!(path.exists());
    Ok(())
}

#[test]
fn a_config_file_has_it_too() -> Result {
    let scratch = Scratch::new("vsock")?;
    let kernel = TinyKernel::new().halt().write(&scratch)?;
    let path = scratch.join("v.sock");
    let vm = TestVm::new("vsock")
        .kernel(kernel)
        .section("vsock", vsock(&path))
        .config_file()
        .start()?;
    let expected = format!(r#"{{"guest_cid":3,"uds_path":"{}"}}"#, path.display());
    // The answer comes when the file has been applied.
    assert_eq!(shown(&vm)?, expected);
    assert!(UnixStream::connect(&path).is_ok());
    Ok(())
}
