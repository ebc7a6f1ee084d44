//! Real guests whose monitor is in a jail, started by root and by an ordinary user with one command.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::Command;

use mayfly_tests::jail::{JAIL_USER, Jail, Starter};
use mayfly_tests::{Drive, HOST_TIMEOUT, Net, Result, Tap, TestVm, Vm, wait_until, zeros};
use serde_json::json;

const MIB: u64 = 1 << 20;

/// A new image that belongs to the user of the jail.
fn image(jail: &Jail, path: &Path) -> Result {
    zeros(path, 8 * MIB)?;
    jail.give(path)
}

/// Asserts that the guest's writes reach an image, which the host sees under another name.
fn assert_writes(vm: &Vm, disk: &str, image: &Path) -> Result {
    vm.guest()
        .check(&format!("echo from-{disk} | dd of=/dev/{disk} conv=fsync"))?;
    assert!(fs::read(image)?.starts_with(format!("from-{disk}\n").as_bytes()));
    Ok(())
}

/// A machine with a disk and a network card does all that it does without a jail, and ends when its guest does.
fn assert_a_guest_works(starter: Starter, address: Ipv4Addr, options: &[&str]) -> Result {
    let jail = Jail::new("guest-jail", starter)?;
    let disk = jail.dir().join("disk.img");
    image(&jail, &disk)?;
    let tap = Tap::create(&format!("mfjail{}", address.octets()[2]), address)?;
    tap.give_to(JAIL_USER)?;
    let vm = TestVm::new("jailed")
        .drive(Drive::new("data", &disk).writeback())
        .net(Net::new("eth0", &tap))
        .boot_in(&jail, options)?;

    assert_writes(&vm, "vda", &disk)?;
    let (host, guest) = (address, Ipv4Addr::from_bits(address.to_bits() + 1));
    vm.guest().check(&format!(
        "ip addr add {guest}/24 dev eth0 && ip link set eth0 up && ping -c 1 -W 10 {host}"
    ))?;
    let status = fs::read_to_string(format!("/proc/{}/status", jail.pid()?))?;
    assert!(status.contains("CapBnd:\t0000000000000000\n"), "{status}");

    let hot = jail.root().join("run/hot.img");
    image(&jail, &hot)?;
    let config = json!({"drive_id": "hot", "path_on_host": "/run/hot.img", "is_root_device": false, "cache_type": "Writeback"});
    vm.put("/drives/hot", &config)?.success()?;
    vm.guest()
        .check("n=0; until [ -e /dev/vdb ]; do n=$((n + 1)); [ $n -lt 300 ] || exit 1; sleep 0.1; done")?;
    assert_writes(&vm, "vdb", &hot)?;

    vm.guest().run_last("reboot -f")?;
    assert_eq!(vm.wait_exit()?, 0);
    drop(vm);
    jail.clean_up()?.assert_success();
    assert!(!jail.folder().exists() && disk.exists());
    Ok(())
}

#[test]
fn a_guest_works_in_a_jail_of_root() -> Result {
    let options = ["--cgroup=pids.max=100", "--parent-cgroup=mayfly-guests"];
    assert_a_guest_works(Starter::Root, Ipv4Addr::new(172, 30, 201, 1), &options)
}

#[test]
fn a_guest_works_in_a_jail_of_an_ordinary_user() -> Result {
    assert_a_guest_works(Starter::User, Ipv4Addr::new(172, 30, 202, 1), &[])
}

/// The hierarchy of version 2, where it is the only one.
const CGROUPS: &str = "/sys/fs/cgroup";

/// A group that was given to the user of the jail, as docs/jailer.md tells; it is removed when dropped.
struct Delegated(PathBuf);

impl Delegated {
    fn new(name: &str) -> Result<Self> {
        let group = Self(Path::new(CGROUPS).join(name));
        fs::create_dir_all(group.0.join("shell"))?;
        for folder in [Path::new(CGROUPS), &group.0] {
            fs::write(folder.join("cgroup.subtree_control"), "+pids")?;
        }
        for path in [
            "",
            "cgroup.procs",
            "cgroup.subtree_control",
            "shell",
            "shell/cgroup.procs",
        ] {
            chown(group.0.join(path), Some(JAIL_USER), Some(JAIL_USER))?;
        }
        Ok(group)
    }
}

impl Drop for Delegated {
    fn drop(&mut self) {
        for folder in ["mayfly", "shell", ""] {
            // What the test has not come to is not there.
            let _ = fs::remove_dir(self.0.join(folder));
        }
    }
}

#[test]
fn a_users_vm_is_limited_in_a_group_that_was_delegated() -> Result {
    let jail = Jail::new("delegated", Starter::User)?;
    let group = Delegated::new("mayfly-delegated")?;
    // Root puts the shell into the group, and it becomes the user.
    let script = format!(
        "echo $$ >{}/shell/cgroup.procs && exec setpriv --reuid {JAIL_USER} --regid {JAIL_USER} --clear-groups \"$@\"",
        group.0.display()
    );
    let jailer = jail.command(&[
        "--cgroup=pids.max=77",
        "--daemonize",
        "--",
        "--api-sock",
        "/run/api.sock",
    ]);
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", &script, "sh"])
        .arg(jailer.get_program())
        .args(jailer.get_args());
    assert!(command.status()?.success());

    let of_vm = group.0.join("mayfly/vm1");
    assert_eq!(fs::read_to_string(of_vm.join("pids.max"))?, "77\n");
    let pid = jail.pid()?;
    assert_eq!(
        fs::read_to_string(of_vm.join("cgroup.procs"))?,
        format!("{pid}\n")
    );

    Command::new("/bin/sh")
        .args(["-c", &format!("kill -9 {pid}")])
        .status()?;
    wait_until("the VM's end", HOST_TIMEOUT, || {
        !Path::new(&format!("/proc/{pid}")).exists()
    })?;
    jail.clean_up()?.assert_success();
    assert!(!of_vm.exists());
    Ok(())
}
