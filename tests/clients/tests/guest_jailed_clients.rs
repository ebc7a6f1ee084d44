//! The crates fctools and firecracker-rs-sdk drive `mayfly-jailer` as they drive Firecracker's jailer: they prepare the
//! jail's folder, start the jailer as root, and find the machine's socket, process and files where they expect them.

use std::fs;
use std::os::unix::fs::chown;
use std::path::Path;
use std::time::{Duration, Instant};

use fctools::vm::VmState;
use fctools::vm::api::VmApi;
use fctools::vm::configuration::InitMethod;
use fctools::vm::shutdown::VmShutdownMethod;
use fctools::vmm::arguments::jailer::{JailerArguments, JailerCgroupVersion};
use fctools::vmm::arguments::{VmmApiSocket, VmmArguments};
use fctools::vmm::executor::jailed::{FlatVirtualPathResolver, JailedVmmExecutor};
use fctools::vmm::id::VmmId;
use fctools::vmm::ownership::VmmOwnershipModel;
use firecracker_rs_sdk::firecracker::FirecrackerOption;
use firecracker_rs_sdk::jailer::JailerOption;
use firecracker_rs_sdk::models::{BootSource, Drive, NetworkInterface};
use mayfly_client_tests::fctools_machine::{ClientVm, boot, shut_down};
use mayfly_client_tests::{GUEST_TIMEOUT, JAIL_USER, Lab};

type Jailed = JailedVmmExecutor<FlatVirtualPathResolver>;

fn jailer(lab: &Lab) -> JailerArguments {
    JailerArguments::new(VmmId::new("vm-1").expect("a name")).chroot_base_dir(lab.path("jails"))
}

async fn start(lab: &Lab, jailer: JailerArguments, init_method: InitMethod) -> ClientVm<Jailed> {
    let socket = VmmApiSocket::Enabled("/api.sock".into());
    let executor = Jailed::new(VmmArguments::new(socket), jailer, FlatVirtualPathResolver);
    let owner = VmmOwnershipModel::Downgraded {
        uid: JAIL_USER,
        gid: JAIL_USER,
    };
    boot(lab, executor, owner, init_method, "/".into()).await
}

/// A line of the status of the machine's process, which the pid file names.
fn status(root: &Path, field: &str) -> String {
    let pid = fs::read_to_string(root.join("firecracker.pid")).expect("the pid file");
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    line.unwrap_or_default().trim().replace('\t', " ")
}

fn assert_confined(root: &Path) {
    let user = JAIL_USER.to_string();
    assert_eq!(status(root, "Uid:"), [user.as_str(); 4].join(" "));
    assert_eq!(status(root, "CapBnd:"), "0000000000000000");
    assert_eq!(status(root, "Seccomp:"), "2");
}

#[tokio::test]
async fn fctools_drives_a_machine_that_its_jailer_waits_for() {
    let lab = Lab::new("fctools-jail", 6);
    let jailer = jailer(&lab)
        .cgroup_version(JailerCgroupVersion::V2)
        .parent_cgroup("mayfly-clients")
        .cgroup("pids.max", "99")
        .max_fd_limit(500)
        .max_file_size_limit(1 << 30);
    let mut vm = start(&lab, jailer, InitMethod::ViaApiCalls).await;
    let root = lab.path("jails/firecracker/vm-1/root");
    assert_confined(&root);
    let group = Path::new("/sys/fs/cgroup/mayfly-clients/vm-1");
    assert_eq!(
        fs::read_to_string(group.join("pids.max")).expect("a limit"),
        "99\n"
    );
    assert!(root.join("vsock").exists());

    vm.pause().await.expect("paused");
    assert!(!lab.guest_answers());
    vm.resume().await.expect("resumed");
    lab.wait_for_guest(&[]);
    vm.flush_metrics().await.expect("flushed");
    let metrics = root.join("metrics");
    assert!(lab.metric(metrics.to_str().expect("UTF-8"), "net", "tx_packets_count") > 0);

    shut_down(&mut vm, VmShutdownMethod::PauseThenKill).await;
    assert!(!root.exists());
    // The client has killed the jailer, which it started; the machine dies with it, a moment later.
    let deadline = Instant::now() + GUEST_TIMEOUT;
    while let Err(error) = fs::remove_dir(group) {
        assert!(Instant::now() < deadline, "the group is not empty: {error}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[tokio::test]
async fn fctools_drives_a_machine_that_is_a_daemon() {
    let lab = Lab::new("fctools-daemon", 7);
    let jailer = jailer(&lab).daemonize().exec_in_new_pid_ns();
    let config = InitMethod::ViaJsonConfiguration("/config.json".into());
    let mut vm = start(&lab, jailer, config).await;
    assert_confined(&lab.path("jails/firecracker/vm-1/root"));
    assert!(!vm.get_info().await.expect("info").is_paused);
    shut_down(&mut vm, VmShutdownMethod::CtrlAltDel).await;
    assert_eq!(vm.get_state(), VmState::Exited);
    assert!(!lab.path("jails/firecracker/vm-1").exists());
}

#[test]
fn firecracker_rs_sdk_drives_a_jailed_machine() -> firecracker_rs_sdk::Result<()> {
    let lab = Lab::new("rs-sdk-jail", 8);
    // The crate makes hard links and leaves their owners as they are.
    chown(lab.path("root.ext4"), Some(JAIL_USER), Some(JAIL_USER))?;
    let user = usize::try_from(JAIL_USER).expect("a usize has 64 bits");
    let mut monitor = FirecrackerOption::new(lab.path("firecracker"));
    monitor.api_sock("/run/firecracker.socket");
    let mut jailer = JailerOption::new(lab.path("jailer"), lab.path("firecracker"), "vm-2", user, user);
    jailer
        .chroot_base_dir(Some(lab.path("jails")))
        .firecracker_option(Some(&monitor));
    jailer
        .stdin("/dev/null")
        .stdout(lab.path("console"))
        .stderr(lab.path("errors"));
    let mut instance = jailer.remove_jailer_workspace_dir().build()?;
    instance.start_vmm()?;
    instance.put_guest_boot_source(&BootSource {
        boot_args: Some(lab.boot_args()),
        initrd_path: Some(lab.path("initramfs")),
        kernel_image_path: lab.path("kernel"),
    })?;
    instance.put_guest_drive_by_id(&Drive {
        drive_id: "root".into(),
        partuuid: None,
        is_root_device: true,
        cache_type: None,
        is_read_only: false,
        path_on_host: lab.path("root.ext4"),
        rate_limiter: None,
        io_engine: None,
        socket: None,
    })?;
    instance.put_guest_network_interface_by_id(&NetworkInterface {
        guest_mac: Some("06:00:ac:1e:00:08".into()),
        host_dev_name: lab.tap().into(),
        iface_id: "net".into(),
        rx_rate_limiter: None,
        tx_rate_limiter: None,
    })?;
    instance.start()?;
    lab.wait_for_guest(&["console", "errors"]);
    assert_confined(&lab.path("jails/firecracker/vm-2/root"));

    instance.pause()?;
    assert!(!lab.guest_answers());
    instance.resume()?;
    lab.wait_for_guest(&["console", "errors"]);
    instance.stop()?;
    lab.wait_gone("jails/firecracker/vm-2/root/run/firecracker.socket");
    drop(instance);
    assert!(!lab.path("jails/firecracker/vm-2/root").exists());
    Ok(())
}
