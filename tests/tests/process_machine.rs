//! The life of a machine whose guest is a few instructions: it runs on any `/dev/kvm`, however slow.

use std::fs::File;
use std::io::PipeReader;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use mayfly_tests::{HOST_TIMEOUT, Monitor, Result, Scratch, TestVm, TinyKernel, Vm, wait_until};
use serde_json::json;

/// A machine that runs this kernel.
fn machine(name: &str, kernel: &TinyKernel) -> Result<(TestVm, Scratch)> {
    let scratch = Scratch::new("kernel")?;
    Ok((TestVm::new(name).kernel(kernel.write(&scratch)?), scratch))
}

/// Starts a machine and waits until its console shows a text.
fn started(vm: TestVm, text: &str) -> Result<Vm> {
    let vm = vm.start()?;
    if vm.console().wait_for(text, Instant::now() + HOST_TIMEOUT) {
        return Ok(vm);
    }
    Err(vm.failure(&format!("no {text:?} on the console")))
}

fn state(monitor: &Monitor) -> Result<String> {
    Ok(monitor.get("/")?.json()?["state"]
        .as_str()
        .unwrap_or_default()
        .to_owned())
}

#[test]
fn a_kernel_with_a_pvh_note_starts_in_protected_mode() -> Result {
    let (vm, _scratch) = machine(
        "pvh",
        &TinyKernel::new().print("mode:").print_mode().print("!\n").halt(),
    )?;
    assert_eq!(started(vm, "!\n")?.console().text(), "mode:P!\n");
    Ok(())
}

#[test]
fn a_kernel_without_a_pvh_note_starts_in_long_mode() -> Result {
    let kernel = TinyKernel::new()
        .without_pvh_note()
        .print("mode:")
        .print_mode()
        .print("!\n")
        .halt();
    let (vm, _scratch) = machine("linux64", &kernel)?;
    assert_eq!(started(vm, "!\n")?.console().text(), "mode:L!\n");
    Ok(())
}

#[test]
fn sixteen_mebibytes_are_accepted_and_run_a_guest_and_less_is_refused() -> Result {
    let kernel = TinyKernel::new().print("small\n").halt();
    let (vm, _scratch) = machine("mem-16", &kernel)?;
    let vm = started(vm.mem_mib(16), "small\n")?;
    assert_eq!(vm.get("/machine-config")?.json()?["mem_size_mib"], 16);
    let (vm, _scratch) = machine("mem-15", &kernel)?;
    let refused = vm.mem_mib(15).start().err().map(|failure| failure.to_string());
    let refused = refused.unwrap_or_default();
    assert!(
        refused.contains("mem_size_mib is 15; it must be at least 16"),
        "{refused}"
    );
    Ok(())
}

#[test]
fn a_reset_by_the_guest_ends_the_process_with_0_and_removes_the_socket() -> Result {
    let (vm, _scratch) = machine("reset", &TinyKernel::new().print("bye\n").reset())?;
    let vm = vm.start()?;
    assert_eq!(vm.wait_exit()?, 0);
    assert_eq!(vm.console().text(), "bye\n");
    assert!(!vm.socket().exists());
    assert!(vm.log().contains("exit_code=0"), "{}", vm.log());
    Ok(())
}

#[test]
fn a_triple_fault_of_the_guest_ends_the_process() -> Result {
    let (vm, _scratch) = machine("triple", &TinyKernel::new().print("crash\n").triple_fault())?;
    let vm = vm.start()?;
    assert_eq!(vm.wait_exit()?, 0);
    assert_eq!(vm.console().text(), "crash\n");
    Ok(())
}

#[test]
fn a_guest_that_runs_where_no_memory_is_ends_the_process_with_1() -> Result {
    let (vm, _scratch) = machine("run-off", &TinyKernel::new().print("off\n").run_off())?;
    let vm = vm.start()?;
    assert_eq!(vm.wait_exit()?, 1);
    assert!(vm.log().contains("vCPU 0"), "{}", vm.log());
    assert!(!vm.socket().exists());
    Ok(())
}

#[test]
fn standard_input_reaches_the_guest_and_its_end_is_no_end() -> Result {
    let (vm, _scratch) = machine("echo", &TinyKernel::new().print("ready\n").echo())?;
    let vm = started(vm, "ready\n")?;
    let text: String = ('a'..='z').cycle().take(300).collect();
    vm.type_in(text.as_bytes())?;
    assert!(
        vm.console().wait_for(&text, Instant::now() + HOST_TIMEOUT),
        "{:?}",
        vm.failure("echo")
    );
    assert_control_thread_rests(&vm)?;
    vm.close_stdin();
    assert_control_thread_rests(&vm)?;
    assert_eq!(state(&vm)?, "Running");
    Ok(())
}

/// However busy the guest is, the thread that waits for events sleeps when there are none.
fn assert_control_thread_rests(vm: &Vm) -> Result {
    let before = vm.control_ticks()?;
    std::thread::sleep(Duration::from_secs(1));
    let used = vm.control_ticks()? - before;
    assert!(used <= 5, "{used} ticks in 1 s");
    Ok(())
}

#[test]
fn the_console_can_go_to_a_file() -> Result {
    let (vm, scratch) = machine("serial", &TinyKernel::new().print("to the file\n").reset())?;
    let file = scratch.join("serial");
    let vm = vm.serial_file(&file).start()?;
    assert_eq!(vm.wait_exit()?, 0);
    assert_eq!(std::fs::read_to_string(&file)?, "to the file\n");
    assert_eq!(vm.console().text(), "");
    Ok(())
}

#[test]
fn a_paused_machine_does_nothing_and_goes_on_when_resumed() -> Result {
    let (vm, _scratch) = machine("pause", &TinyKernel::new().dots())?;
    let vm = started(vm, "...")?;
    vm.pause()?;
    assert_eq!(state(&vm)?, "Paused");
    let before = quiet_length(&vm)?;
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(vm.console().len(), before);
    vm.resume()?;
    assert_eq!(state(&vm)?, "Running");
    wait_until("more dots", HOST_TIMEOUT, || vm.console().len() > before + 3)
}

/// The length of the console once nothing is on its way any more.
fn quiet_length(vm: &Vm) -> Result<usize> {
    let mut last = usize::MAX;
    wait_until("a quiet console", HOST_TIMEOUT, || {
        std::thread::sleep(Duration::from_millis(50));
        std::mem::replace(&mut last, vm.console().len()) == vm.console().len()
    })?;
    Ok(last)
}

#[test]
fn pause_and_resume_can_be_repeated() -> Result {
    let (vm, _scratch) = machine("pauses", &TinyKernel::new().dots())?;
    let vm = started(vm.vcpus(2), "...")?;
    vm.resume()?;
    for _ in 0..10 {
        vm.pause()?;
        vm.pause()?;
        vm.resume()?;
        vm.resume()?;
    }
    let before = vm.console().len();
    wait_until("more dots", HOST_TIMEOUT, || vm.console().len() > before + 3)
}

#[test]
fn a_halted_guest_can_be_paused_and_resumed_and_ended() -> Result {
    let (vm, _scratch) = machine("halted", &TinyKernel::new().print("halt\n").halt())?;
    let vm = started(vm.vcpus(4), "halt\n")?;
    for _ in 0..20 {
        vm.pause()?;
        vm.resume()?;
    }
    vm.signal(libc::SIGTERM)?;
    assert_eq!(vm.wait_exit()?, -libc::SIGTERM);
    assert!(!vm.socket().exists());
    Ok(())
}

#[test]
fn what_belongs_before_the_start_is_refused_after_it() -> Result {
    let (vm, _scratch) = machine("after", &TinyKernel::new().print("up\n").halt())?;
    let vm = started(vm, "up\n")?;
    let config = vm.get("/vm/config")?;
    let refusal = "The requested operation is not supported after starting the microVM.";
    let answers = [
        vm.put("/machine-config", &json!({"vcpu_count": 1, "mem_size_mib": 128}))?,
        vm.patch("/machine-config", &json!({"vcpu_count": 2}))?,
        vm.put("/boot-source", &json!({"kernel_image_path": "/dev/null"}))?,
        vm.put("/entropy", &json!({}))?,
        vm.put("/serial", &json!({}))?,
        vm.put("/logger", &json!({"level": "Debug"}))?,
        vm.put("/metrics", &json!({"metrics_path": "/dev/null"}))?,
        vm.put("/actions", &json!({"action_type": "InstanceStart"}))?,
    ];
    answers
        .iter()
        .for_each(|answer| answer.assert_refused(&[refusal]));
    assert_eq!(vm.get("/vm/config")?, config);
    Ok(())
}

#[test]
fn ctrl_alt_del_without_a_keyboard_driver_is_taken_and_logged_with_advice() -> Result {
    let (vm, _scratch) = machine("keys", &TinyKernel::new().print("up\n").halt())?;
    let vm = started(vm, "up\n")?;
    vm.action("SendCtrlAltDel")?;
    assert_eq!(state(&vm)?, "Running");
    assert!(vm.log().contains("has not enabled its keyboard"));
    Ok(())
}

#[test]
fn a_power_button_that_nobody_heeds_changes_nothing() -> Result {
    let (vm, _scratch) = machine("button", &TinyKernel::new().print("up\n").halt())?;
    let vm = started(vm, "up\n")?;
    vm.action("PowerButton")?;
    assert_eq!(state(&vm)?, "Running");
    Ok(())
}

#[test]
fn patching_a_drive_that_is_not_there_is_refused() -> Result {
    let (vm, _scratch) = machine("patch", &TinyKernel::new().print("up\n").halt())?;
    let vm = started(vm, "up\n")?;
    let answer = vm.patch(
        "/drives/nope",
        &json!({"drive_id": "nope", "path_on_host": "/dev/null"}),
    )?;
    answer.assert_refused(&["Drive config error", "nope"]);
    Ok(())
}

#[test]
fn patching_a_drive_with_a_bad_image_keeps_the_old_one() -> Result {
    let (vm, scratch) = machine("patch", &TinyKernel::new().print("up\n").halt())?;
    let image = scratch.file("image", [0; 4096])?;
    let vm = started(vm.drive(mayfly_tests::Drive::new("data", &image)), "up\n")?;
    let before = vm.get("/vm/config")?;
    let bad = vm.patch(
        "/drives/data",
        &json!({"drive_id": "data", "path_on_host": "/nonexistent/disk"}),
    )?;
    bad.assert_refused(&["/nonexistent/disk"]);
    assert_eq!(vm.get("/vm/config")?, before);

    let other = scratch.file("other", [0; 8192])?;
    vm.patch(
        "/drives/data",
        &json!({"drive_id": "data", "path_on_host": other}),
    )?
    .success()?;
    assert_eq!(
        vm.get("/vm/config")?.json()?["drives"][0]["path_on_host"],
        json!(other)
    );
    Ok(())
}

#[test]
fn metrics_are_one_line_per_flush_with_what_happened_since() -> Result {
    let (vm, _scratch) = machine("metrics", &TinyKernel::new().print("up\n").echo())?;
    let vm = started(vm, "up\n")?;
    vm.action("FlushMetrics")?;
    vm.get("/machine-config")?;
    vm.action("FlushMetrics")?;
    let lines = vm.metrics()?;
    let wrote: Vec<_> = lines
        .iter()
        .map(|line| line["uart"]["write_count"].clone())
        .collect();
    assert_eq!(wrote, [json!(3), json!(0)]);
    assert_eq!(lines[0]["put_api_requests"]["boot_source_count"], 1);
    assert_eq!(lines[1]["get_api_requests"]["machine_cfg_count"], 1);
    assert!(
        lines[0]["vcpu"]["exit_io_out"].as_u64() >= Some(3),
        "{}",
        lines[0]
    );
    assert!(
        lines[0]["utc_timestamp_ms"].as_u64() > Some(1_700_000_000_000),
        "{}",
        lines[0]
    );
    Ok(())
}

#[test]
fn the_last_metrics_line_is_written_at_the_end() -> Result {
    let (vm, _scratch) = machine("metrics", &TinyKernel::new().print("up\n").reset())?;
    let vm = vm.start()?;
    assert_eq!(vm.wait_exit()?, 0);
    let lines = vm.metrics()?;
    assert_eq!((lines.len(), &lines[0]["uart"]["write_count"]), (1, &json!(3)));
    assert_eq!(lines[0]["i8042"]["reset_count"], 1);
    Ok(())
}

#[test]
fn a_config_file_starts_the_machine_with_and_without_an_api() -> Result {
    let kernel = TinyKernel::new().print("from a file\n").halt();
    let (vm, _scratch) = machine("file", &kernel)?;
    let with_api = started(vm.clone().config_file(), "from a file\n")?;
    assert_eq!(state(&with_api)?, "Running");
    assert!(
        with_api
            .log()
            .contains("Successfully started microvm that was configured from one single json")
    );

    let without = started(vm.config_file_without_api(), "from a file\n")?;
    assert!(!without.socket().exists());
    without.signal(libc::SIGTERM)?;
    assert_eq!(without.wait_exit()?, -libc::SIGTERM);
    Ok(())
}

#[test]
fn a_serial_section_of_the_config_file_is_heeded() -> Result {
    let (vm, scratch) = machine("file", &TinyKernel::new().print("hello\n").reset())?;
    let file = scratch.join("serial");
    assert_eq!(
        vm.serial_file(&file)
            .config_file_without_api()
            .start()?
            .wait_exit()?,
        0
    );
    assert_eq!(std::fs::read_to_string(&file)?, "hello\n");
    Ok(())
}

#[test]
fn the_answer_of_vm_config_is_a_config_file_of_the_same_machine() -> Result {
    let (vm, scratch) = machine("again", &TinyKernel::new().print("up\n").halt())?;
    let image = scratch.file("image", [0; 4096])?;
    let vm = started(
        vm.vcpus(2)
            .entropy()
            .drive(mayfly_tests::Drive::new("data", &image)),
        "up\n",
    )?;
    let config = vm.get("/vm/config")?.body;
    let file = scratch.file("config.json", &config)?;
    drop(vm);

    let again = mayfly_tests::MonitorBuilder::new("again")?
        .args(["--config-file".into(), file.display().to_string()]);
    let again = again.start()?;
    wait_until("the start", HOST_TIMEOUT, || {
        state(&again).is_ok_and(|state| state == "Running")
    })?;
    assert_eq!(again.get("/vm/config")?.body, config);
    Ok(())
}

/// A machine whose guest prints for ever, with standard output full.
fn with_unread_output(name: &str) -> Result<(Vm, PipeReader, Scratch)> {
    let (unread, output) = std::io::pipe()?;
    // SAFETY: needed as std cannot make a pipe smaller. The descriptor is open, and no memory is involved.
    let size = unsafe { libc::fcntl(output.as_raw_fd(), libc::F_SETPIPE_SZ, 4096) };
    let (vm, scratch) = machine(name, &TinyKernel::new().dots())?;
    let vm = vm.inherit(File::from(OwnedFd::from(output)), 1).start()?;
    wait_until("a full pipe", HOST_TIMEOUT, || {
        let mut waiting = 0;
        // SAFETY: needed as std cannot ask. The call writes an integer, which outlives it.
        unsafe { libc::ioctl(unread.as_raw_fd(), libc::FIONREAD, &raw mut waiting) };
        waiting == size
    })?;
    Ok((vm, unread, scratch))
}

#[test]
fn output_that_nobody_reads_holds_no_request_up() -> Result {
    let (vm, _unread, _scratch) = with_unread_output("unread")?;
    vm.get("/metrics")?.success()?;
    vm.type_in(b"x")?;
    for _ in 0..3 {
        vm.pause()?;
        vm.resume()?;
    }
    assert_eq!(state(&vm)?, "Running");
    vm.signal(libc::SIGTERM)?;
    assert_eq!(vm.wait_exit()?, -libc::SIGTERM);
    Ok(())
}

#[test]
fn the_first_start_is_no_pause_that_the_guest_has_to_know_of() -> Result {
    let (vm, _scratch) = machine("fresh", &TinyKernel::new().print("up\n").halt())?;
    let vm = started(vm.vcpus(2), "up\n")?;
    assert_eq!(vm.counted("vcpu", "kvmclock_ctrl_fails")?, 0);
    Ok(())
}
