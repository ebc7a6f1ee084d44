//! The command line, exit codes, and what the process leaves behind. No guest is needed.

use mayfly_tests::{Monitor, MonitorBuilder, Result, wait_until};

/// Runs the binary to its end with these arguments only; its exit code, standard output and standard error.
fn run(args: &[&str]) -> Result<(i32, String, String)> {
    let builder = MonitorBuilder::new("cli")?.without_api_socket().log_to_stdout();
    let monitor = builder.args(args.iter().copied()).spawn()?;
    let code = monitor.wait_exit()?;
    Ok((code, monitor.console().text(), monitor.stderr().text()))
}

/// Asserts that the arguments end the process with this code, and that it says these words.
#[track_caller]
fn assert_ends(args: &[&str], code: i32, words: &[&str]) -> Result {
    let (actual, stdout, stderr) = run(args)?;
    let all = format!("{stdout}{stderr}");
    assert_eq!(actual, code, "{all}");
    assert!(words.iter().all(|word| all.contains(word)), "{words:?} in {all}");
    Ok(())
}

#[test]
fn version_and_help_have_two_forms_each() -> Result {
    let (long, short) = (run(&["--version"])?, run(&["-V"])?);
    assert!(
        long.0 == 0 && long.1.starts_with("Mayfly v") && long.2.is_empty(),
        "{long:?}"
    );
    assert_eq!(long, short);
    let (long, short) = (run(&["--help"])?, run(&["-h"])?);
    assert!(long.0 == 0 && long.1.contains("--api-sock"), "{long:?}");
    assert_eq!(long, short);
    Ok(())
}

#[test]
fn help_names_every_option() -> Result {
    let help = run(&["--help"])?.1;
    let options = [
        "api-sock",
        "boot-timer",
        "check-config",
        "compile-seccomp",
        "config-file",
        "enable-pci",
        "help",
        "http-api-max-payload-size",
        "id",
        "level",
        "log-path",
        "metadata",
        "metrics-path",
        "mmds-size-limit",
        "module",
        "no-api",
        "no-pci",
        "no-seccomp",
        "parent-cpu-time-us",
        "seccomp-filter",
        "show-level",
        "show-log-origin",
        "start-time-cpu-us",
        "start-time-us",
        "version",
    ];
    let missing: Vec<_> = options
        .into_iter()
        .filter(|option| !help.contains(&format!("--{option}")))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
    Ok(())
}

#[test]
fn bad_arguments_end_with_153_and_are_named() -> Result {
    assert_ends(&["--foo"], 153, &["'foo'", "--help"])?;
    assert_ends(&["stray"], 153, &["'stray'"])?;
    assert_ends(&["--api-sock"], 153, &["'api-sock'", "requires a value"])?;
    assert_ends(&["--id", "a", "--id", "b"], 153, &["'id'", "more than once"])?;
    assert_ends(&["--no-api"], 153, &["'config-file'", "required"])?;
    assert_ends(&["--boot-timer=1"], 153, &["'boot-timer'", "takes no value"])?;
    assert_ends(
        &["--describe-snapshot", "f"],
        153,
        &["'describe-snapshot'", "leave it out"],
    )?;
    assert_ends(&["--id", "a_b"], 153, &["id", "a_b"])?;
    assert_ends(&["--id", ""], 153, &["id"])?;
    assert_ends(&["--start-time-us=x"], 153, &["start-time-us"])?;
    assert_ends(
        &["--http-api-max-payload-size", "many"],
        153,
        &["http-api-max-payload-size"],
    )?;
    Ok(())
}

#[test]
fn a_bad_level_ends_with_152() -> Result {
    assert_ends(&["--level", "Loud"], 152, &["Loud"])
}

#[test]
fn every_option_may_be_joined_to_its_value() -> Result {
    let builder = MonitorBuilder::new("joined")?;
    let log = builder.dir().join("other.log");
    let builder = builder.log_to_stdout().args([
        "--id=joined-1",
        "--level=Debug",
        "--http-api-max-payload-size=1000",
        "--start-time-us=1",
        "--start-time-cpu-us=1",
        "--parent-cpu-time-us=1",
        "--module=mayfly",
        "--enable-pci",
        "--no-seccomp",
        "--boot-timer",
    ]);
    let monitor = builder.args([format!("--log-path={}", log.display())]).start()?;
    assert_eq!(monitor.get("/")?.json()?["id"], "joined-1");
    assert!(log.exists());
    Ok(())
}

#[test]
fn the_default_instance_has_the_known_name() -> Result {
    let monitor = MonitorBuilder::new("id")?.start()?;
    assert_eq!(monitor.get("/")?.json()?["id"], "anonymous-instance");
    Ok(())
}

#[test]
fn a_signal_that_asks_to_end_removes_the_socket() -> Result {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let monitor = MonitorBuilder::new("signal")?.start()?;
        monitor.signal(signal)?;
        assert_eq!(monitor.wait_exit()?, -signal);
        assert!(!monitor.socket().exists());
    }
    Ok(())
}

#[test]
fn a_hangup_ends_with_156_and_removes_the_socket() -> Result {
    let monitor = MonitorBuilder::new("signal")?.start()?;
    monitor.signal(libc::SIGHUP)?;
    assert_eq!(monitor.wait_exit()?, 156);
    assert!(!monitor.socket().exists());
    Ok(())
}

#[test]
fn what_it_was_started_to_ignore_does_not_end_it() -> Result {
    // As a shell starts a job in the background.
    let ignore = || {
        // SAFETY: needed because the standard library sets no actions; the call takes and gives plain numbers.
        match unsafe { libc::signal(libc::SIGQUIT, libc::SIG_IGN) } {
            libc::SIG_ERR => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        }
    };
    let monitor = MonitorBuilder::new("signal")?.prepare(ignore).start()?;
    monitor.signal(libc::SIGQUIT)?;
    assert_eq!(monitor.get("/version")?.status, 200);
    Ok(())
}

#[test]
fn a_broken_pipe_does_not_end_it() -> Result {
    let monitor = MonitorBuilder::new("signal")?.start()?;
    monitor.signal(libc::SIGPIPE)?;
    assert_eq!(monitor.get("/version")?.status, 200);
    Ok(())
}

#[test]
fn a_socket_in_use_is_named_and_left_to_its_owner() -> Result {
    let owner = MonitorBuilder::new("owner")?.start()?;
    let socket = owner.socket().display().to_string();
    assert_ends(&["--api-sock", &socket], 1, &[&socket, "in use"])?;
    assert_eq!(owner.get("/version")?.status, 200);
    Ok(())
}

#[test]
fn a_file_in_the_place_of_the_socket_stays() -> Result {
    let builder = MonitorBuilder::new("file")?.without_api_socket();
    let file = builder.dir().join("precious");
    std::fs::write(&file, "content")?;
    let monitor = builder.args(["--api-sock", "precious"]).spawn()?;
    assert_eq!(monitor.wait_exit()?, 1);
    assert!(monitor.stderr().text().contains("precious"));
    assert_eq!(std::fs::read_to_string(&file)?, "content");
    Ok(())
}

#[test]
fn a_socket_path_that_cannot_be_is_named_with_what_is_wrong() -> Result {
    let long = format!("/tmp/{}", "x".repeat(200));
    assert_ends(&["--api-sock", &long], 1, &[&long, "shorter"])?;
    assert_ends(
        &["--api-sock", "/nonexistent/folder/sock"],
        1,
        &["\"/nonexistent/folder\"", "make it"],
    )?;
    assert_ends(&["--api-sock", "/proc/sock"], 1, &["/proc/sock"])
}

#[test]
fn log_lines_show_time_instance_and_thread_and_what_is_asked_for() -> Result {
    let log_of = |args: &[&str]| -> Result<String> {
        let monitor = MonitorBuilder::new("log")?
            .args(["--id", "log-1"])
            .args(args.iter().copied())
            .start()?;
        monitor.get("/version")?;
        Ok(monitor.log())
    };
    let plain = log_of(&[])?;
    let line = plain
        .lines()
        .find(|line| line.contains("Running Mayfly v"))
        .unwrap_or(&plain);
    let (time, rest) = line.split_once(' ').unwrap_or_default();
    let shape: String = time
        .chars()
        .map(|c| if c.is_ascii_digit() { '0' } else { c })
        .collect();
    assert_eq!(shape, "0000-00-00T00:00:00.000000000");
    assert!(rest.starts_with("[log-1:"), "{rest}");
    assert!(!plain.contains(":INFO"), "{plain}");

    let full = log_of(&["--show-level", "--show-log-origin"])?;
    assert!(full.contains(":INFO:") && full.contains(".rs:"), "{full}");
    Ok(())
}

#[test]
fn requests_and_their_results_are_logged() -> Result {
    let monitor = MonitorBuilder::new("log")?.start()?;
    monitor.request("PUT", "/actions", r#"{"action_type":"FlushMetrics"}"#)?;
    monitor.get("/version")?;
    let log = monitor.log();
    let request = r#"The API server received a Put request on "/actions" with body "{\"action_type\":\"FlushMetrics\"}"."#;
    let plain = request.replace('\\', "");
    assert!(log.contains(request) || log.contains(&plain), "{log}");
    assert!(
        log.contains("Received Error. Status code: 400 Bad Request. Message: "),
        "{log}"
    );
    assert!(
        log.contains("The request was executed successfully. Status code: 200 OK."),
        "{log}"
    );
    Ok(())
}

#[test]
fn the_level_decides_what_is_logged() -> Result {
    let monitor = MonitorBuilder::new("quiet")?.args(["--level", "error"]).start()?;
    monitor.get("/version")?;
    monitor.get("/nope")?;
    let log = monitor.log();
    assert!(
        !log.contains("Running") && log.contains("Received Error"),
        "{log}"
    );
    Ok(())
}

#[test]
fn without_a_log_file_the_log_is_on_standard_output() -> Result {
    let monitor = MonitorBuilder::new("stdout")?.log_to_stdout().start()?;
    wait_until("the first line", mayfly_tests::HOST_TIMEOUT, || {
        monitor.console().text().contains("Running Mayfly")
    })
}

#[test]
fn a_full_disk_for_the_log_loses_lines_and_nothing_else() -> Result {
    let monitor = MonitorBuilder::new("full")?
        .log_to_stdout()
        .metrics()
        .args(["--log-path", "/dev/full"])
        .start()?;
    assert_eq!(monitor.get("/version")?.status, 200);
    assert_ended_in_order(&monitor)?;
    let missed = monitor
        .metrics()?
        .last()
        .map(|line| line["logger"]["missed_log_count"].clone());
    assert!(
        missed.as_ref().and_then(serde_json::Value::as_u64) > Some(0),
        "{missed:?}"
    );
    Ok(())
}

fn assert_ended_in_order(monitor: &Monitor) -> Result {
    monitor.signal(libc::SIGTERM)?;
    assert_eq!(monitor.wait_exit()?, -libc::SIGTERM);
    Ok(())
}

#[test]
fn a_log_that_cannot_be_opened_is_named() -> Result {
    assert_ends(
        &["--log-path", "/nonexistent/log"],
        1,
        &["/nonexistent/log", "check the path", "No such file"],
    )?;
    assert_ends(&["--log-path", "/"], 1, &["a regular file", "directory"])?;
    assert_ends(
        &["--metrics-path", "/nonexistent/m"],
        1,
        &["/nonexistent/m", "check the path", "No such file"],
    )
}
