//! The Python packages microheart and firecracker-python drive Mayfly as they drive Firecracker; the scripts beside
//! `Cargo.toml` say how. Each runs in a network of its own, as both change routes, taps and packet filters.
//!
//! Environment: `MAYFLY_CLIENT_PYTHON`, an interpreter that has the packages of `requirements.txt`.

use std::fs;
use std::path::Path;
use std::process::Command;

use mayfly_client_tests::{Lab, guest_file};

/// A network whose default route leads nowhere: both packages ask for the interface of the default route.
const NETWORK: &str = "set -e; ip link set lo up; ip tuntap add dev uplink mode tap; \
    ip addr add 192.0.2.1/24 dev uplink; ip link set uplink up; ip route add default via 192.0.2.2; exec \"$@\"";

fn run(lab: &Lab, script: &str) {
    let python =
        std::env::var("MAYFLY_CLIENT_PYTHON").expect("MAYFLY_CLIENT_PYTHON: run tests/run-tests.sh --guest");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join(script);
    let data = lab.path("data");
    fs::create_dir(&data).expect("a new folder");
    let mut command = Command::new("unshare");
    command.args(["--net", "sh", "-c", NETWORK, "sh", &python, "-B"]);
    command.arg(script).arg(lab.path("root.ext4"));
    command.env("CLIENT_BUSYBOX", guest_file("busybox/bin/busybox"));
    command.env("CLIENT_DATA", &data).env("MICROHEART_HOME", &data);
    for (variable, file) in [
        ("FIRECRACKER", "firecracker"),
        ("KERNEL", "kernel"),
        ("INITRAMFS", "initramfs"),
    ] {
        command.env(format!("CLIENT_{variable}"), lab.path(file));
    }
    // Where microheart looks for what it would else download.
    for (name, file) in [("firecracker", "firecracker"), ("vmlinux-6.1", "kernel")] {
        std::os::unix::fs::symlink(lab.path(file), data.join(name)).expect("a link");
    }
    let output = command.output().expect("unshare");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success(), "{}: {said}", output.status);
    lab.count_guest();
}

#[test]
fn microheart_drives_a_machine() {
    run(&Lab::new("microheart", 4), "microheart_client.py");
}

#[test]
fn firecracker_python_drives_a_machine() {
    run(&Lab::new("fc-python", 5), "firecracker_python_client.py");
}
