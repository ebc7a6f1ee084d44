//! Drives with a vhost-user backend, as far as their configuration goes; `guest_vhost_user.rs` has the rest.

use std::time::Instant;

use mayfly_tests::{Drive, HOST_TIMEOUT, MonitorBuilder, Result, Scratch, TestVm, TinyKernel};
use serde_json::{Value, json};

fn drive(socket: &str) -> Value {
    json!({"drive_id": "remote", "is_root_device": false, "socket": socket})
}

#[test]
fn a_drive_whose_backend_is_not_there_is_refused() -> Result {
    let monitor = MonitorBuilder::new("vhost-user")?.start()?;
    monitor
        .put("/drives/remote", &drive("/nonexistent/socket"))?
        .assert_refused(&["Drive config error", "/nonexistent/socket", "start it first"]);
    assert_eq!(monitor.get("/vm/config")?.json()?["drives"], json!([]));
    Ok(())
}

#[test]
fn a_backend_that_hangs_up_is_refused() -> Result {
    let scratch = Scratch::new("vhost-user")?;
    let socket = scratch.join("socket");
    let listener = std::os::unix::net::UnixListener::bind(&socket)?;
    let server = std::thread::spawn(move || listener.accept().map(drop));
    let monitor = MonitorBuilder::new("vhost-user")?.start()?;
    monitor
        .put("/drives/remote", &drive(&socket.display().to_string()))?
        .assert_refused(&["cannot serve this drive"]);
    assert!(server.join().is_ok_and(|accepted| accepted.is_ok()));
    Ok(())
}

#[test]
fn what_the_backend_decides_on_is_refused_beside_a_socket() -> Result {
    let monitor = MonitorBuilder::new("vhost-user")?.start()?;
    for (setting, value) in [
        ("is_read_only", json!(true)),
        ("io_engine", json!("Async")),
        ("rate_limiter", json!({"ops": {"size": 1, "refill_time": 1}})),
    ] {
        let mut body = drive("/nonexistent/socket");
        body[setting] = value;
        monitor
            .put("/drives/remote", &body)?
            .assert_refused(&["vhost-user backend", setting]);
    }
    let mut both = drive("/nonexistent/socket");
    both["path_on_host"] = json!("/dev/null");
    monitor
        .put("/drives/remote", &both)?
        .assert_refused(&["either path_on_host or socket"]);
    Ok(())
}

#[test]
fn a_machine_with_private_memory_takes_no_such_drive() -> Result {
    let scratch = Scratch::new("vhost-user")?;
    let kernel = TinyKernel::new().print("up\n").halt().write(&scratch)?;
    let image = scratch.file("image", [0; 4096])?;
    let vm = TestVm::new("vhost-user")
        .kernel(kernel)
        .drive(Drive::new("data", &image))
        .start()?;
    assert!(vm.console().wait_for("up\n", Instant::now() + HOST_TIMEOUT));
    vm.put("/drives/remote", &drive("/nonexistent/socket"))?
        .assert_refused(&["cannot see the memory of this machine"]);
    vm.patch("/drives/data", &json!({"drive_id": "data"}))?
        .assert_refused(&["is empty: give path_on_host or rate_limiter"]);
    Ok(())
}
