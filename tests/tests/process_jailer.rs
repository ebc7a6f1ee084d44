//! `mayfly-jailer`: its command line, what it makes, and what the process in the jail is. No guest is needed.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use mayfly_tests::jail::{Ended, JAIL_USER, Jail, Starter};
use mayfly_tests::{Client, HOST_TIMEOUT, Result, Scratch, TinyKernel, wait_until};
use serde_json::json;

/// Runs the jailer with these arguments only.
fn bare(args: &[&str]) -> Result<Ended> {
    Ok(Ended::from(
        Jail::new("jailer", Starter::Root)?.bare(args).output()?,
    ))
}

/// Runs the jailer with what every start needs and these arguments; asserts that it refuses, and leaves nothing.
#[track_caller]
fn assert_refused(args: &[&str], message: &str) -> Result {
    let jail = Jail::new("refused", Starter::Root)?;
    jail.run(args)?.assert_refused(message);
    assert!(!jail.root().exists(), "{args:?} left a jail");
    Ok(())
}

#[test]
fn version_and_help_have_two_forms_each() -> Result {
    let (long, short) = (bare(&["--version"])?, bare(&["-V"])?);
    assert!(
        long.code == 0 && long.stdout.starts_with("mayfly-jailer v"),
        "{long:?}"
    );
    assert_eq!(long.stdout, short.stdout);
    let (long, short) = (bare(&["--help"])?, bare(&["-h"])?);
    assert!(
        long.code == 0 && long.stdout.contains("--chroot-base-dir"),
        "{long:?}"
    );
    assert_eq!(long.stdout, short.stdout);
    Ok(())
}

#[test]
fn bad_arguments_are_named() -> Result {
    let parse = "Failed to parse arguments: ";
    let unexpected =
        format!("{parse}Found argument 'foo' which wasn't expected, or isn't valid in this context.");
    bare(&["--foo"])?.assert_refused(&unexpected);
    bare(&["foo"])?.assert_refused(&unexpected);
    bare(&[])?.assert_refused(&format!("{parse}Argument 'id' required, but not found."));
    bare(&["--id"])?.assert_refused(&format!(
        "{parse}The argument 'id' requires a value, but none was supplied."
    ));
    bare(&["--id=a", "--id=b"])?
        .assert_refused(&format!("{parse}The argument 'id' was provided more than once."));
    let sh = "--exec-file=/bin/sh";
    bare(&["--id=a", sh, "--gid=1"])?
        .assert_refused(&format!("{parse}Argument 'uid' required, but not found."));
    bare(&["--id=a", sh, "--uid=1"])?
        .assert_refused(&format!("{parse}Argument 'gid' required, but not found."));
    assert_refused(
        &["--import"],
        &format!("{parse}Argument 'config-file' required, but not found."),
    )
}

#[test]
fn bad_names_of_vms_are_refused() -> Result {
    let start = "Invalid instance ID: ";
    let length = "the length must be between 1 and 64";
    bare(&["--id="])?.assert_refused(&format!("{start}Invalid len (0);  {length}"));
    let long = "a".repeat(65);
    bare(&["--id", &long])?.assert_refused(&format!("{start}Invalid len (65);  {length}"));
    bare(&["--id=12_3"])?.assert_refused(&format!("{start}Invalid char (_) at position 2"));
    bare(&["--id=../x"])?.assert_refused(&format!("{start}Invalid char (.) at position 0"));
    Ok(())
}

#[test]
fn bad_programs_and_users_are_refused() -> Result {
    let run = |words: &[&str]| bare(&[&["--id=a"], words].concat());
    run(&["--exec-file=/no/file"])?
        .assert_refused("Failed to canonicalize path /no/file: No such file or directory");
    run(&["--exec-file=/etc"])?.assert_refused("/etc is not a file");
    let sh = "--exec-file=/bin/sh";
    for bad in ["x", "-1", "4294967295", "4294967296", "1.5"] {
        run(&[sh, "--gid=1", &format!("--uid={bad}")])?.assert_refused(&format!("Invalid uid: {bad}"));
        run(&[sh, "--uid=1", &format!("--gid={bad}")])?.assert_refused(&format!("Invalid gid: {bad}"));
    }
    Ok(())
}

#[test]
fn bad_limits_and_devices_are_refused() -> Result {
    assert_refused(
        &["--resource-limit", "fsize"],
        "Invalid format for resources limits: fsize",
    )?;
    assert_refused(&["--resource-limit", "cpu=1"], "Invalid resource argument: cpu")?;
    assert_refused(
        &["--resource-limit", "no-file=x"],
        "Invalid limit value for resource: x",
    )?;
    assert_refused(&["--device", "mem"], "Invalid device: mem.")?;
    assert_refused(
        &["--netns", "/no/net"],
        "Failed to open the network namespace /no/net: No such file",
    )?;
    assert_refused(
        &["--netns", "/etc/passwd"],
        "Failed to join the network namespace /etc/passwd: Invalid argument",
    )
}

#[test]
fn bad_cgroups_are_refused() -> Result {
    assert_refused(
        &["--cgroup-version", "3"],
        "3 is an invalid cgroup version specifier",
    )?;
    assert_refused(
        &["--cgroup", "cpu.shares"],
        "Invalid format for cgroups: cpu.shares",
    )?;
    assert_refused(&["--cgroup", "../a.b=1"], "Invalid format for cgroups: ../a.b=1")?;
    assert_refused(
        &["--cgroup", "nothing.max=1"],
        "Controller nothing is unavailable",
    )?;
    let message = "Parent cgroup path is invalid. Path should not be absolute or contain '..' or '.'";
    assert_refused(&["--parent-cgroup", "/a"], message)?;
    assert_refused(&["--parent-cgroup", "../a"], message)?;
    assert_refused(&["--parent-cgroup", "./a"], message)?;
    // Its absence is a fault of the one who names it, with a hint.
    let words = ["--cgroup-version=2", "--parent-cgroup=no-such-group"];
    assert_refused(&words, "Failed to move process to cgroup (")
}

#[test]
fn bad_configs_are_refused() -> Result {
    let jail = Jail::new("config", Starter::Root)?;
    let run = |content: &str| {
        fs::write(jail.dir().join("vm.json"), content)?;
        jail.run(&["--config-file=vm.json", "--import"])
    };
    let start = "The config file vm.json cannot be imported: ";
    run("{")?.assert_refused(&format!("{start}EOF"));
    run("[]")?.assert_refused(&format!("{start}it is no JSON object"));
    run(r#"{"drives": [{"path_on_host": 5}]}"#)?
        .assert_refused(&format!("{start}'drives.0.path_on_host' is no path"));
    run(r#"{"drives": [{"path_on_host": "missing.img"}]}"#)?
        .assert_refused("Failed to open, as the user of the VM,");
    fs::write(jail.dir().join("roots.img"), "x")?;
    run(r#"{"drives": [{"path_on_host": "roots.img"}]}"#)?.assert_refused("Failed to read and write ");
    run(r#"{"vsock": {"uds_path": "/tmp/v.sock"}}"#)?
        .assert_refused("The path /tmp is not safe: everybody can write");
    assert!(!jail.root().exists());
    Ok(())
}

/// Asserts type, mode and owner.
#[track_caller]
fn assert_file(path: &Path, mode: u32, owner: u32) -> Result {
    let stat = fs::symlink_metadata(path)?;
    let is = (format!("{:o}", stat.mode()), stat.uid(), stat.gid());
    assert_eq!(is, (format!("{mode:o}"), owner, owner), "{}", path.display());
    Ok(())
}

#[test]
fn the_jail_has_exactly_what_tooling_expects() -> Result {
    let jail = Jail::new("layout", Starter::Root)?;
    let _vm = jail.start(&[])?;
    let root = jail.root();
    for folder in ["", "dev", "dev/net", "run"] {
        assert_file(&root.join(folder), 0o040_700, JAIL_USER)?;
    }
    for (device, major, minor) in [("kvm", 10, 232), ("net/tun", 10, 200), ("urandom", 1, 9)] {
        let path = root.join("dev").join(device);
        assert_file(&path, 0o020_600, JAIL_USER)?;
        assert_eq!(fs::metadata(&path)?.rdev(), libc::makedev(major, minor));
    }
    assert_file(&root.join("mayfly"), 0o100_755, JAIL_USER)?;
    assert_file(&root.join("mayfly.pid"), 0o100_644, 0)?;
    assert!(fs::symlink_metadata(jail.socket())?.file_type().is_socket());
    let mut names: Vec<_> = fs::read_dir(&root)?
        .map(|e| Ok(e?.file_name()))
        .collect::<Result<_>>()?;
    names.sort();
    assert_eq!(names, ["dev", "mayfly", "mayfly.pid", "run"]);
    Ok(())
}

/// A line of /proc/PID/status.
fn status(pid: u32, field: &str) -> Result<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    Ok(line
        .unwrap_or_default()
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" "))
}

/// Asserts what is the same for a jail of root and of an ordinary user.
fn assert_confined(jail: &Jail) -> Result {
    let pid = jail.pid()?;
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(status(pid, set)?, "0000000000000000", "{set}");
    }
    assert_eq!(status(pid, "NoNewPrivs:")?, "1");
    let user = JAIL_USER.to_string();
    assert_eq!(status(pid, "Uid:")?, [user.as_str(); 4].join(" "));
    assert_eq!(status(pid, "Gid:")?, [user.as_str(); 4].join(" "));
    assert_eq!(status(pid, "NSpid:")?, format!("{pid} 1"));
    for name in ["mnt", "pid", "ipc", "uts", "cgroup"] {
        let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/{name}"));
        assert_ne!(of(&pid.to_string())?, of("self")?, "{name}");
    }
    assert_eq!(fs::read(format!("/proc/{pid}/environ"))?, b"");
    let words = fs::read_to_string(format!("/proc/{pid}/cmdline"))?;
    assert!(
        words.starts_with("/mayfly\0--id\0vm1\0--start-time-us\0"),
        "{words}"
    );
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    let points: Vec<_> = mounts.lines().filter_map(|line| line.split(' ').nth(4)).collect();
    assert!(
        points
            .iter()
            .all(|point| *point == "/" || *point == "/mayfly" || point.starts_with("/dev")),
        "{points:?}"
    );
    let files = fs::read_dir(format!("/proc/{pid}/fd"))?;
    for file in files {
        let target = fs::read_link(file?.path())?.display().to_string();
        let own = ["anon_inode:", "socket:", "pipe:", "/dev/null"];
        assert!(
            own.iter().any(|start| target.starts_with(start)),
            "{target} is open"
        );
    }
    Ok(())
}

#[test]
fn a_vm_of_root_has_no_rights() -> Result {
    let jail = Jail::new("rights", Starter::Root)?;
    let _vm = jail.start(&[])?;
    assert_confined(&jail)?;
    assert_eq!(status(jail.pid()?, "Groups:")?, "");
    Ok(())
}

#[test]
fn a_vm_of_an_ordinary_user_has_no_rights() -> Result {
    let jail = Jail::new("user", Starter::User)?;
    let vm = jail.start(&[])?;
    assert_confined(&jail)?;
    let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/user"));
    assert_ne!(of(&jail.pid()?.to_string())?, of("self")?);
    let said = vm.kill()?.stderr;
    assert!(said.contains("without root: the VM runs as you"), "{said}");
    assert!(said.contains("without root: no cgroup"), "{said}");
    Ok(())
}

#[test]
fn ordinary_users_start_vms_for_themselves_only() -> Result {
    let jail = Jail::new("other-user", Starter::User)?;
    jail.run(&["--uid=0"])?
        .assert_refused("Invalid gid: 54321, without root, --uid and --gid are both");
    jail.run(&["--gid=7"])?
        .assert_refused("Invalid uid: 54321, without root, --uid and --gid are both");
    Ok(())
}

#[test]
fn limits_are_set() -> Result {
    let jail = Jail::new("limits", Starter::Root)?;
    let limits = |pid| fs::read_to_string(format!("/proc/{pid}/limits"));
    let line = |text: &str, name: &str| {
        let line = text
            .lines()
            .find(|line| line.starts_with(name))
            .unwrap_or_default();
        line.split_whitespace()
            .rev()
            .skip(1)
            .take(2)
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let vm = jail.start(&[])?;
    assert_eq!(line(&limits(jail.pid()?)?, "Max open files"), ["2048", "2048"]);
    vm.kill()?;
    let _vm = jail.start(&[
        "--resource-limit=no-file=300",
        "--resource-limit",
        "fsize=1048576",
    ])?;
    let text = limits(jail.pid()?)?;
    assert_eq!(line(&text, "Max open files"), ["300", "300"]);
    assert_eq!(line(&text, "Max file size"), ["1048576", "1048576"]);
    Ok(())
}

#[test]
fn the_jailer_ends_like_its_vm() -> Result {
    for (starter, signal) in [
        (Starter::Root, libc::SIGTERM),
        (Starter::User, libc::SIGINT),
        (Starter::Root, libc::SIGQUIT),
    ] {
        let jail = Jail::new("end", starter)?;
        let vm = jail.start(&[])?;
        kill(vm.id(), signal)?;
        assert_eq!(vm.wait()?.code, -signal);
        let vm = jail.start(&[])?;
        kill(jail.pid()?, libc::SIGKILL)?;
        assert_eq!(vm.wait()?.code, -libc::SIGKILL);
        let ended = jail.run(&["--", "--no-such-option"])?;
        assert_eq!(ended.code, 153, "{ended:?}");
    }
    Ok(())
}

#[test]
fn an_abort_ends_a_vm_that_is_the_first_process_of_its_namespace() -> Result {
    let jail = Jail::new("abort", Starter::Root)?;
    let vm = jail.start(&[])?;
    let pid = jail.pid()?;
    assert_eq!(status(pid, "NSpid:")?, format!("{pid} 1"));
    kill(pid, libc::SIGABRT)?;
    assert_gone(pid)?;
    assert_eq!(vm.wait()?.code, 128 + libc::SIGABRT);
    assert!(!jail.socket().exists());
    Ok(())
}

#[test]
fn the_vm_dies_with_its_jailer() -> Result {
    let jail = Jail::new("orphan", Starter::Root)?;
    let vm = jail.start(&[])?;
    let pid = jail.pid()?;
    kill(vm.id(), libc::SIGKILL)?;
    vm.wait()?;
    assert_gone(pid)
}

/// Waits until a process is gone; somebody else is its parent.
fn assert_gone(pid: u32) -> Result {
    let path = format!("/proc/{pid}");
    wait_until("the VM's end", HOST_TIMEOUT, || !Path::new(&path).exists())
}

fn kill(pid: u32, signal: i32) -> Result {
    // SAFETY: needed because the standard library sends SIGKILL to children only. The call has no memory of ours.
    match unsafe { libc::kill(i32::try_from(pid)?, signal) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error().into()),
    }
}

/// Runs a jailer that could wait for ever. Returns its exit code.
fn ends(mut command: Command) -> Result<Option<i32>> {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let mut code = None;
    let waited = wait_until("the jailer's end", HOST_TIMEOUT, || {
        code = child.try_wait().ok().flatten();
        code.is_some()
    });
    if waited.is_err() {
        child.kill()?;
        child.wait()?;
    }
    waited.map(|()| code.and_then(|status| status.code()))
}

#[test]
fn a_parent_that_ignores_the_end_of_children_is_no_reason_to_wait_for_ever() -> Result {
    for starter in [Starter::Root, Starter::User] {
        let jail = Jail::new("ignored", starter)?;
        let mut command = jail.command(&["--", "--version"]);
        let ignore = || {
            // SAFETY: needed because the standard library changes no actions. The call takes numbers.
            unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
            Ok(())
        };
        // SAFETY: needed to change the new process only; the closure makes a system call and nothing else.
        unsafe { command.pre_exec(ignore) };
        assert_eq!(ends(command)?, Some(0));
    }
    Ok(())
}

#[test]
fn a_socket_whose_queue_is_full_is_neither_waited_for_nor_removed() -> Result {
    let jail = Jail::new("full-queue", Starter::Root)?;
    jail.start(&[])?.kill()?;
    let path = jail.root().join("run/other.sock");
    let listener = UnixListener::bind(&path)?;
    // SAFETY: needed because the standard library does not say how many may wait. The call takes numbers.
    assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
    let _waits = UnixStream::connect(&path)?;
    assert_eq!(ends(jail.command(&["--", "--version"]))?, Some(0));
    assert!(path.exists());
    Ok(())
}

/// Asserts that the jailer leaves the VM to itself, and that the VM is the process of the pid file.
fn assert_left_alone(option: &str) -> Result<(Jail, u32)> {
    let jail = Jail::new("left", Starter::Root)?;
    // The VM would hold pipes open.
    let mut command = jail.command(&[option, "--", "--api-sock", "/run/api.sock"]);
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    assert_eq!(status.code(), Some(0));
    let pid = jail.pid()?;
    wait_until("the API socket", HOST_TIMEOUT, || {
        Client::connect(&jail.socket()).is_ok()
    })?;
    let mut client = Client::connect(&jail.socket())?;
    assert!(client.request("GET", "/", "")?.body.contains("vm1"));
    Ok((jail, pid))
}

#[test]
fn new_pid_ns_and_daemonize_leave_the_vm_alone() -> Result {
    let (_jail, pid) = assert_left_alone("--new-pid-ns")?;
    assert_eq!(status(pid, "NSpid:")?, format!("{pid} 1"));
    kill(pid, libc::SIGKILL)?;
    assert_gone(pid)?;
    let (jail, pid) = assert_left_alone("--daemonize")?;
    for stream in 0..3 {
        let file = fs::metadata(format!("/proc/{pid}/fd/{stream}"))?;
        assert_eq!(file.rdev(), fs::metadata("/dev/null")?.rdev());
    }
    assert_eq!(status(pid, "NSsid:")?, format!("{pid} 1"));
    jail.clean_up()?
        .assert_refused(&format!("The jail of 'vm1' is in use by process {pid}"));
    kill(pid, libc::SIGKILL)?;
    assert_gone(pid)?;
    jail.clean_up()?.assert_success();
    assert!(!jail.folder().exists());
    Ok(())
}

#[test]
fn a_program_that_cannot_be_executed_is_the_jailers_failure() -> Result {
    let scratch = Scratch::new("no-program")?;
    let text = scratch.file("text", "no program")?;
    let jail = Jail::of("no-exec", Starter::Root, &text)?;
    jail.run(&["--daemonize"])?
        .assert_refused("Failed to execute /text: ");
    assert!(!jail.folder().exists());
    Ok(())
}

#[test]
fn a_jail_in_use_is_neither_started_nor_removed() -> Result {
    for starter in [Starter::Root, Starter::User] {
        let jail = Jail::new("live", starter)?;
        let vm = jail.start(&[])?;
        let message = format!("The jail of 'vm1' is in use by process {}", jail.pid()?);
        jail.run(&[])?.assert_refused(&message);
        jail.clean_up()?.assert_refused(&message);
        assert!(Client::connect(&jail.socket()).is_ok());
        vm.kill()?;
        jail.clean_up()?.assert_success();
        assert!(!jail.folder().exists());
        jail.clean_up()?.assert_refused("There is no jail of 'vm1' in ");
    }
    Ok(())
}

#[test]
fn asked_for_devices_are_there() -> Result {
    let jail = Jail::new("devices", Starter::Root)?;
    let _vm = jail.start(&["--device=vhost-net"])?;
    let node = fs::metadata(jail.root().join("dev/vhost-net"))?;
    assert_eq!(node.rdev(), libc::makedev(10, 238));
    Ok(())
}

#[test]
fn one_command_imports_what_a_config_names() -> Result {
    for starter in [Starter::Root, Starter::User] {
        let jail = Jail::new("import", starter)?;
        let dir = jail.dir();
        fs::create_dir(dir.join("sockets"))?;
        fs::write(dir.join("disk"), [0; 4096])?;
        fs::write(dir.join("log"), "")?;
        for name in ["sockets", "disk", "log"] {
            jail.give(&dir.join(name))?;
        }
        fs::rename(
            TinyKernel::new().spin().write(&Scratch::new("kernel")?)?,
            dir.join("kernel"),
        )?;
        let config = json!({
            "boot-source": {"kernel_image_path": "kernel"},
            "drives": [{"drive_id": "a", "is_root_device": false, "path_on_host": "disk"}],
            "vsock": {"guest_cid": 3, "uds_path": "sockets/vsock"},
            "logger": {"log_path": "log"},
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 32}
        });
        fs::write(dir.join("vm.json"), config.to_string())?;

        let vm = jail.start(&["--config-file", "vm.json", "--import"])?;

        let mut client = Client::connect(&jail.socket())?;
        assert!(client.request("GET", "/", "")?.body.contains("Running"));
        assert!(fs::read_to_string(dir.join("log"))?.contains("The microVM is running"));
        assert!(
            fs::symlink_metadata(dir.join("sockets/vsock"))?
                .file_type()
                .is_socket()
        );
        let net = |process: &str| fs::read_link(format!("/proc/{process}/ns/net"));
        assert_ne!(net(&jail.pid()?.to_string())?, net("self")?);
        assert!(!jail.root().join("dev/net/tun").exists());
        assert_eq!(fs::read(jail.root().join("import/drives-0-path_on_host"))?, b"");
        vm.kill()?;
        jail.clean_up()?.assert_success();
        assert!(dir.join("disk").exists() && !jail.folder().exists());
    }
    Ok(())
}

#[test]
fn output_of_an_imported_config_can_go_to_a_device() -> Result {
    for starter in [Starter::Root, Starter::User] {
        let jail = Jail::new("device-output", starter)?;
        let config = json!({
            "drives": [],
            "logger": {"log_path": "/dev/null"},
            "metrics": {"metrics_path": "/dev/null"},
            "serial": {"serial_out_path": "/dev/null"},
            "boot-source": {"kernel_image_path": "kernel"},
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 32}
        });
        fs::write(jail.dir().join("vm.json"), config.to_string())?;
        fs::write(
            jail.dir().join("kernel"),
            TinyKernel::new().print("up").spin().elf(),
        )?;
        let vm = jail.start(&["--config-file=vm.json", "--import"])?;
        let mut client = Client::connect(&jail.socket())?;
        assert!(client.request("GET", "/", "")?.body.contains("Running"));
        vm.kill()?;
    }
    Ok(())
}

#[test]
fn copies_hold_what_was_copied() -> Result {
    let jail = Jail::new("copies", Starter::Root)?;
    fs::write(jail.dir().join("kernel"), "no kernel")?;
    fs::write(
        jail.dir().join("vm.json"),
        r#"{"drives": [], "boot-source": {"kernel_image_path": "kernel"}}"#,
    )?;
    let ended = jail.run(&["--config-file=vm.json", "--import", "--copy"])?;
    assert_eq!(ended.code, 1, "{ended:?}");
    let copy = jail.root().join("import/boot-source-kernel_image_path");
    assert_eq!(fs::read_to_string(copy)?, "no kernel");
    assert!(fs::metadata(jail.root().join("mayfly"))?.len() > 1 << 20);
    Ok(())
}
