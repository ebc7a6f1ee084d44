//! System call filters: every thread has its own, and a call that is not in it ends the process with the reason.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use mayfly_tests::{
    Drive, Failure, HOST_TIMEOUT, Monitor, MonitorBuilder, Pmem, Result, Scratch, TestVm, TinyKernel, Vm,
    binary, wait_until,
};
use serde_json::{Value, json};

const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/seccomp/x86_64.json");
/// The exit code after a refused system call.
const REFUSED: i32 = 148;
/// The threads of [`machine`], in alphabetical order.
const THREADS: [&str; 5] = ["api", "flush", "io 0", "mayfly", "vcpu 0"];

/// What `/proc` says of each thread: its name, and the value of one line.
fn threads(monitor: &Monitor, line: &str) -> Result<BTreeMap<String, u32>> {
    let mut values = BTreeMap::new();
    // A thread of KVM's own, which is there on some kernels.
    let own = |name: &str| !name.starts_with("kvm-");
    for task in fs::read_dir(format!("/proc/{}/task", monitor.pid()))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        let value = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        let name = value("Name:").unwrap_or_default().trim().to_owned();
        if own(&name) {
            values.insert(name, value(line).unwrap_or_default().trim().parse()?);
        }
    }
    Ok(values)
}

/// Asserts what `/proc` says of [`THREADS`], in their order. A thread names itself and takes its filter while the one
/// that started it goes on, so this waits for it.
#[track_caller]
fn assert_threads(monitor: &Monitor, line: &str, expected: [u32; 5]) -> Result {
    let expected = THREADS.map(str::to_owned).into_iter().zip(expected).collect();
    let mut told = BTreeMap::new();
    let waited = wait_until(line, HOST_TIMEOUT, || {
        told = threads(monitor, line).unwrap_or_default();
        told == expected
    });
    waited.map_err(|_| monitor.failure(&format!("{line} {told:?}, not {expected:?}")))
}

/// A machine with a thread of every kind, which waits in guest code or halts.
fn machine(scratch: &Scratch, args: &[&str]) -> Result<Vm> {
    let image = scratch.file("image", [0; 4096])?;
    let pmem = scratch.file("pmem", vec![0; 2 << 20])?;
    let vm = TestVm::new("seccomp")
        .kernel(TinyKernel::new().print("up\n").dots().write(scratch)?)
        .drive(Drive::new("data", &image))
        .pmem(Pmem::new("p", &pmem))
        .args(args.iter().copied())
        .config_file()
        .start()?;
    assert!(vm.console().wait_for("up\n", Instant::now() + HOST_TIMEOUT));
    Ok(vm)
}

/// The built-in filters, changed, in a file.
fn changed(scratch: &Scratch, change: impl FnOnce(&mut Value)) -> Result<PathBuf> {
    let mut filters: Value = serde_json::from_str(&fs::read_to_string(SOURCE)?)?;
    change(&mut filters);
    scratch.file("filters.json", filters.to_string())
}

/// Takes groups away from a kind of thread.
fn take_groups(filters: &mut Value, thread: &str, groups: &[&str]) {
    let all = filters["threads"][thread]
        .as_array_mut()
        .expect("a thread has a list");
    let before = all.len();
    all.retain(|group| !groups.contains(&group.as_str().unwrap_or_default()));
    assert_eq!(all.len() + groups.len(), before);
}

#[test]
fn every_thread_has_a_filter_and_gains_no_privileges() -> Result {
    let scratch = Scratch::new("filters")?;
    let vm = machine(&scratch, &[])?;
    assert_threads(&vm, "Seccomp:", [2; 5])?;
    assert_threads(&vm, "NoNewPrivs:", [1; 5])?;
    // Those that the control thread starts have its filter and their own.
    assert_threads(&vm, "Seccomp_filters:", [1, 2, 2, 1, 2])
}

/// A machine that takes no requests, in which somebody types, to its orderly end.
#[track_caller]
fn assert_settles(vm: TestVm) -> Result {
    let vm = vm.config_file_without_api().start()?;
    assert!(vm.console().wait_for("up\n", Instant::now() + HOST_TIMEOUT));
    // Beside the first one, that of a thread that has started all others.
    let filters = |name: &str| Ok::<_, Failure>(threads(&vm, "Seccomp_filters:")?.get(name).copied());
    wait_until("the second filter", HOST_TIMEOUT, || {
        filters("mayfly").is_ok_and(|count| count == Some(2))
    })?;
    assert_eq!(filters("vcpu 0")?, Some(2));
    vm.type_in(b"typed")?;
    assert!(vm.console().wait_for("typed", Instant::now() + HOST_TIMEOUT));
    vm.signal(libc::SIGTERM)?;
    assert_eq!(vm.wait_exit()?, -libc::SIGTERM, "{}", vm.log());
    assert!(!vm.metrics()?.is_empty());
    Ok(())
}

#[test]
fn without_an_api_the_control_thread_gives_up_more_once_the_machine_runs() -> Result {
    let scratch = Scratch::new("settled")?;
    let kernel = TinyKernel::new().print("up\n").echo().write(&scratch)?;
    let bare = TestVm::new("settled").kernel(&kernel);
    assert_settles(bare.clone())?;
    let image = scratch.file("image", [0; 4096])?;
    let pmem = scratch.file("pmem", vec![0; 2 << 20])?;
    let socket = scratch.join("vsock");
    assert_settles(bare.clone().pmem(Pmem::new("p", &pmem)))?;
    assert_settles(bare.clone().entropy())?;
    assert_settles(
        bare.drive(Drive::new("data", &image).with("io_engine", "Async"))
            .pmem(Pmem::new("p", &pmem))
            .memory_hotplug(256)
            .entropy()
            .section("balloon", json!({"amount_mib": 0, "deflate_on_oom": false}))
            .section("vsock", json!({"guest_cid": 3, "uds_path": socket})),
    )?;
    assert!(!socket.exists());
    Ok(())
}

#[test]
fn no_thread_has_a_filter_when_they_are_turned_off() -> Result {
    let scratch = Scratch::new("off")?;
    let vm = machine(&scratch, &["--no-seccomp"])?;
    assert_threads(&vm, "Seccomp:", [0; 5])
}

/// Starts a machine with changed filters; asserts that the call of the thread is named, and that nothing is left behind.
#[track_caller]
fn assert_refused(change: impl FnOnce(&mut Value), thread: &str, (name, number): (&str, i64)) -> Result {
    let scratch = Scratch::new("refused")?;
    let filters = changed(&scratch, change)?;
    let kernel = TinyKernel::new().print("up\n").dots().write(&scratch)?;
    let config = json!({
        "boot-source": {"kernel_image_path": kernel},
        "drives": [],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 32},
    });
    let config = scratch.file("config", config.to_string())?;
    let monitor = MonitorBuilder::new("refused")?
        .metrics()
        .args([format!("--seccomp-filter={}", filters.display())])
        .args([format!("--config-file={}", config.display())])
        .spawn()?;
    assert_eq!(monitor.wait_exit()?, REFUSED, "{}", monitor.log());
    let log = monitor.log();
    let told = format!("thread '{thread}' has refused system call {number}: {name}(");
    assert!(log.contains(&told), "{told} in {log}");
    let lines = monitor.metrics()?;
    assert_eq!((lines.len(), &lines[0]["seccomp"]["num_faults"]), (1, &json!(1)));
    assert!(!monitor.socket().exists());
    Ok(())
}

#[test]
fn a_refused_call_of_the_control_thread_ends_the_process_and_is_named() -> Result {
    let change = |filters: &mut Value| {
        let rules = filters["groups"]["control"]
            .as_array_mut()
            .expect("a group is a list");
        rules.retain(|rule| rule["syscall"] != "eventfd2");
    };
    assert_refused(change, "main", ("eventfd2", libc::SYS_eventfd2))
}

#[test]
fn a_refused_call_of_a_vcpu_ends_the_process_and_is_named() -> Result {
    let change = |filters: &mut Value| take_groups(filters, "vcpu", &["vcpu"]);
    assert_refused(change, "vcpu 0", ("ioctl", libc::SYS_ioctl))
}

#[test]
fn a_refused_call_of_an_io_thread_ends_the_process_and_is_named() -> Result {
    let change = |filters: &mut Value| take_groups(filters, "io", &["io"]);
    assert_refused(change, "io 0", ("epoll_wait", libc::SYS_epoll_wait))
}

#[test]
fn a_refused_call_of_the_api_thread_ends_the_process_and_is_named() -> Result {
    let change = |filters: &mut Value| take_groups(filters, "api", &["api"]);
    assert_refused(change, "api", ("epoll_wait", libc::SYS_epoll_wait))
}

#[test]
fn filters_are_compiled_ahead() -> Result {
    let scratch = Scratch::new("ahead")?;
    let compiled = Command::new(binary()?)
        .args(["--compile-seccomp", SOURCE])
        .output()?;
    assert!(compiled.status.success() && compiled.stderr.is_empty());
    let file = scratch.file("filters", &compiled.stdout)?;
    let option = format!("--seccomp-filter={}", file.display());
    let vm = machine(&scratch, &[option.as_str()])?;
    assert_threads(&vm, "Seccomp:", [2; 5])?;
    // They are what the program has itself.
    let instructions = &compiled.stdout[compiled.stdout.len() / 2..];
    let program = fs::read(binary()?)?;
    assert!(
        program
            .windows(instructions.len())
            .any(|window| window == instructions)
    );
    Ok(())
}

/// Starts a process that cannot use its filters.
#[track_caller]
fn assert_unusable(content: &[u8], words: &[&str]) -> Result {
    let scratch = Scratch::new("unusable")?;
    let file = scratch.file("filters", content)?;
    let option = format!("--seccomp-filter={}", file.display());
    let monitor = MonitorBuilder::new("unusable")?.args([option]).spawn()?;
    assert_eq!(monitor.wait_exit()?, 1);
    let log = monitor.log();
    assert!(words.iter().all(|word| log.contains(word)), "{words:?} in {log}");
    assert!(!monitor.socket().exists());
    Ok(())
}

#[test]
fn filters_that_cannot_be_used_are_refused_with_the_reason() -> Result {
    assert_unusable(b"{}", &["filters'", "missing field `threads`"])?;
    assert_unusable(b"MAYFLYS\x01\0\0\0\0", &["damaged", "--compile-seccomp"])?;
    assert_unusable(b"MAYFLYS\x02", &["another version", "--compile-seccomp"])?;
    let monitor = MonitorBuilder::new("no-file")?
        .args(["--seccomp-filter=/nonexistent/f"])
        .spawn()?;
    assert_eq!(monitor.wait_exit()?, 1);
    assert!(monitor.log().contains("'/nonexistent/f'"), "{}", monitor.log());
    let monitor = MonitorBuilder::new("both")?
        .args(["--no-seccomp", "--seccomp-filter=f"])
        .spawn()?;
    assert_eq!(monitor.wait_exit()?, 153);
    Ok(())
}

#[test]
fn a_thread_that_may_not_remove_files_falls_without_leaving_any() -> Result {
    for (name, signal, code) in [
        ("vcpu 0", libc::SIGSEGV, 150),
        ("io 0", libc::SIGBUS, 149),
        ("flush", libc::SIGILL, 157),
        ("api", libc::SIGHUP, 156),
        ("api", libc::SIGABRT, -libc::SIGABRT),
        ("vcpu 0", libc::SIGABRT, -libc::SIGABRT),
        ("mayfly", libc::SIGABRT, -libc::SIGABRT),
        ("vcpu 0", libc::SIGTRAP, -libc::SIGTRAP),
        ("io 0", libc::SIGFPE, -libc::SIGFPE),
        ("flush", libc::SIGUSR1, -libc::SIGUSR1),
        ("api", libc::SIGQUIT, -libc::SIGQUIT),
        ("mayfly", libc::SIGQUIT, -libc::SIGQUIT),
    ] {
        let scratch = Scratch::new("falls")?;
        let vm = machine(&scratch, &[])?;
        vm.signal_thread(name, signal)?;
        assert_eq!(vm.wait_exit()?, code, "{name}: {}", vm.log());
        assert!(!vm.socket().exists(), "{name}");
    }
    Ok(())
}

#[test]
fn a_signal_of_filters_that_is_not_from_one_ends_with_2() -> Result {
    let monitor = MonitorBuilder::new("foreign")?.metrics().start()?;
    monitor.signal(libc::SIGSYS)?;
    assert_eq!(monitor.wait_exit()?, 2);
    let lines = monitor.metrics()?;
    assert_eq!((lines.len(), &lines[0]["seccomp"]["num_faults"]), (1, &json!(0)));
    Ok(())
}
