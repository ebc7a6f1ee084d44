//! Config files: what `GET /vm/config` answers is one, `--check-config` judges one, and what is wrong with one is said.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use mayfly_tests::{HOST_TIMEOUT, MonitorBuilder, Result, Scratch, Tap, TinyKernel, wait_until};
use serde_json::{Value, json};

static MACHINES: AtomicU32 = AtomicU32::new(0);

/// A folder with a kernel and a disk, and the config of a machine that has everything.
fn everything() -> Result<(Scratch, Value)> {
    let scratch = Scratch::new("config")?;
    let kernel = TinyKernel::new().print("up\n").halt().write(&scratch)?;
    let initrd = scratch.file("initrd", [0; 512])?;
    let disk = scratch.file("disk", vec![0; 4096])?;
    let pmem = scratch.file("pmem", vec![0; 2 << 20])?;
    let limiter = json!({"bandwidth": {"size": 1000, "one_time_burst": 7, "refill_time": 10}, "ops": null});
    let drive = |id: &str, root: bool| {
        json!({
            "drive_id": id, "partuuid": root.then_some("0eaa91a0-01"), "is_root_device": root,
            "cache_type": "Writeback", "is_read_only": true, "path_on_host": disk, "rate_limiter": limiter,
            "io_engine": "Async", "socket": null,
        })
    };
    // Tests that run at the same time each have taps of their own.
    let number = MACHINES.fetch_add(1, Ordering::Relaxed);
    let net = |id: &str, mac: &str| {
        json!({
            "iface_id": id, "host_dev_name": format!("mfcfg{number}{id}"), "guest_mac": mac, "mtu": 1400,
            "rx_rate_limiter": limiter, "tx_rate_limiter": null,
        })
    };
    let config = json!({
        "boot-source": {"kernel_image_path": kernel, "initrd_path": initrd, "boot_args": "quiet \"a b\""},
        "machine-config": {
            "vcpu_count": 2, "mem_size_mib": 64, "smt": true, "track_dirty_pages": true, "huge_pages": "None",
        },
        "drives": [drive("root", true), drive("data", false)],
        "network-interfaces": [net("a", "02:00:00:00:00:01"), net("b", "02:00:00:00:00:02")],
        "entropy": {"rate_limiter": limiter},
        "pmem": [{"id": "p", "path_on_host": pmem, "root_device": false, "read_only": false, "rate_limiter": null}],
        "vsock": {"guest_cid": 3, "uds_path": scratch.join("v.sock")},
        "serial": {"serial_out_path": scratch.join("serial")},
        "logger": null,
        "metrics": null,
    });
    Ok((scratch, config))
}

/// Runs `--check-config` on a config; exit code, standard output and standard error.
fn check(scratch: &Scratch, config: &Value, args: &[&str]) -> Result<(i32, String, String)> {
    let file = scratch.file("checked.json", config.to_string())?;
    check_file(&file, args)
}

fn check_file(file: &Path, args: &[&str]) -> Result<(i32, String, String)> {
    let builder = MonitorBuilder::new("check")?.without_api_socket().log_to_stdout();
    let file = file.display().to_string();
    let monitor = builder
        .args(["--check-config", &file])
        .args(args.iter().copied())
        .spawn()?;
    let code = monitor.wait_exit()?;
    Ok((code, monitor.console().text(), monitor.stderr().text()))
}

fn files(folder: &Path) -> Result<BTreeSet<String>> {
    let entries = std::fs::read_dir(folder)?;
    entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

/// Changes a value of the config that `path` leads to.
fn with(mut config: Value, path: &str, value: Value) -> Value {
    *config.pointer_mut(path).expect("the config has it") = value;
    config
}

#[test]
fn a_machine_with_everything_is_the_same_again_from_its_own_answer() -> Result {
    let (scratch, config) = everything()?;
    let file = scratch.file("first.json", config.to_string())?;
    let start = |file: &Path| -> Result<_> {
        let args = ["--config-file".into(), file.display().to_string()];
        let monitor = MonitorBuilder::new("again")?.args(args).start()?;
        wait_until("the start", HOST_TIMEOUT, || {
            let state = monitor.get("/").and_then(|answer| answer.json());
            state.is_ok_and(|info| info["state"] == "Running")
        })
        .map_err(|failure| monitor.failure(&failure.to_string()))?;
        Ok(monitor)
    };
    let first = start(&file)?;
    let answer = first.get("/vm/config")?.success()?.body;
    // The taps are made by the process and go with it.
    first.signal(libc::SIGTERM)?;
    first.wait_exit()?;

    let told: Value = serde_json::from_str(&answer)?;
    for (section, value) in config.as_object().into_iter().flatten() {
        if section != "serial" {
            assert_eq!(&told[section], value, "{section}");
        }
    }
    let second = start(&scratch.file("second.json", &answer)?)?;
    assert_eq!(second.get("/vm/config")?.success()?.body, answer);
    Ok(())
}

#[test]
fn every_section_but_two_may_be_null_or_left_out() -> Result {
    let (scratch, config) = everything()?;
    let kernel = &config["boot-source"]["kernel_image_path"];
    let least = json!({"boot-source": {"kernel_image_path": kernel}, "drives": []});
    assert_eq!(check(&scratch, &least, &[])?.0, 0);
    let nulls = json!({
        "boot-source": {"kernel_image_path": kernel, "initrd_path": null, "boot_args": null}, "drives": [],
        "balloon": null, "cpu-config": null, "logger": null, "metrics": null, "mmds-config": null, "vsock": null,
        "entropy": null, "memory-hotplug": null, "serial": null, "machine-config": null, "network-interfaces": null,
        "pmem": null,
    });
    let (code, _, stderr) = check(&scratch, &nulls, &[])?;
    assert_eq!((code, stderr.as_str()), (0, ""));
    Ok(())
}

#[test]
fn a_good_file_is_checked_without_leaving_anything_behind() -> Result {
    let (scratch, mut config) = everything()?;
    config["logger"] = json!({"log_path": scratch.join("log"), "level": "debug"});
    config["metrics"] = json!({"metrics_path": scratch.join("metrics")});
    scratch.file("checked.json", "")?;
    let before = files(&scratch)?;
    let (code, stdout, stderr) = check(&scratch, &config, &[])?;
    assert_eq!((code, stderr.as_str()), (0, ""));
    assert!(
        stdout.contains("checked.json") && stdout.contains("can be used"),
        "{stdout}"
    );
    assert_eq!(files(&scratch)?, before);
    for net in config["network-interfaces"].as_array().into_iter().flatten() {
        let tap = net["host_dev_name"].as_str().unwrap_or_default();
        assert!(!Tap::exists(tap), "{tap}");
    }
    Ok(())
}

#[test]
fn a_check_looks_at_the_files_that_the_command_line_names() -> Result {
    let (scratch, config) = everything()?;
    let good = scratch.join("lines").display().to_string();
    let said = |config: &Value, option: &str, path: &str| -> Result<String> {
        let (code, _, stderr) = check(&scratch, config, &[option, path])?;
        assert_eq!(code, i32::from(!stderr.is_empty()), "{stderr}");
        Ok(stderr)
    };
    assert_eq!(said(&config, "--metrics-path", &good)?, "");
    assert_eq!(said(&config, "--log-path", &good)?, "");
    let bad = "/nonexistent/lines";
    assert!(
        said(&config, "--metrics-path", bad)?.contains("Metrics error: cannot open '/nonexistent/lines'")
    );
    assert!(said(&config, "--log-path", bad)?.contains("Logger error: cannot open '/nonexistent/lines'"));
    let twice = with(config, "/metrics", json!({"metrics_path": scratch.join("other")}));
    let refusal = "section 'metrics' of the config file: Metrics error: the metrics path is set already";
    let stderr = said(&twice, "--metrics-path", &good)?;
    assert!(stderr.contains(refusal), "{stderr}");
    assert!(!Path::new(&good).exists());
    Ok(())
}

#[test]
fn a_check_needs_no_kvm() -> Result {
    let (scratch, config) = everything()?;
    let file = scratch.file("checked.json", config.to_string())?;
    // Without the right to open devices; root could open them whatever their mode.
    let drop_rights = || {
        // SAFETY: needed because the standard library cannot change users in a closure that runs before exec. The
        // calls take numbers and are allowed between fork and exec.
        match unsafe { (libc::setgid(65_534), libc::setuid(65_534)) } {
            (0, 0) => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    let mut plain = config;
    plain["network-interfaces"] = json!([]);
    std::fs::write(&file, plain.to_string())?;
    scratch.open_to_all()?;
    for name in ["pmem", "disk"] {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(scratch.join(name), std::fs::Permissions::from_mode(0o666))?;
    }
    let builder = MonitorBuilder::new("check")?.without_api_socket().log_to_stdout();
    let args = ["--check-config".to_owned(), file.display().to_string()];
    let monitor = builder.open_to_all()?.prepare(drop_rights).args(args).spawn()?;
    assert_eq!(monitor.wait_exit()?, 0, "{}", monitor.stderr().text());
    Ok(())
}

#[test]
fn a_bad_file_is_refused_with_its_section_and_object() -> Result {
    let (scratch, config) = everything()?;
    let path = |name: &str| json!(scratch.join(name));
    let no_kernel = scratch.file("no-kernel", [1; 4096])?;
    let bad = [
        (
            "/machine-config/vcpu_count",
            json!(99),
            ["'machine-config'", "vcpu_count"],
        ),
        (
            "/machine-config/mem_size_mib",
            json!("x"),
            ["'machine-config'", "invalid type"],
        ),
        (
            "/boot-source/kernel_image_path",
            path("none"),
            ["'boot-source'", "none"],
        ),
        (
            "/boot-source/kernel_image_path",
            json!(no_kernel),
            ["no-kernel", "bzImage"],
        ),
        (
            "/boot-source/boot_args",
            json!("x".repeat(2048)),
            ["'boot-source'", "2048"],
        ),
        ("/drives/1/path_on_host", path("none"), ["'drives'", "none"]),
        ("/drives/1/is_root_device", json!(true), ["'drives'", "root"]),
        ("/drives/1/drive_id", json!("root"), ["'drives'", "'root'"]),
        (
            "/network-interfaces/1/guest_mac",
            json!("02:00:00:00:00:01"),
            ["'network-interfaces'", "02:00"],
        ),
        (
            "/network-interfaces/0/host_dev_name",
            json!("a/b"),
            ["'network-interfaces'", "a/b"],
        ),
        ("/pmem/0/path_on_host", path("none"), ["'p'", "none"]),
        (
            "/serial/serial_out_path",
            json!("/nonexistent/s"),
            ["'serial'", "/nonexistent/s"],
        ),
        (
            "/logger",
            json!({"log_path": "/nonexistent/l"}),
            ["'logger'", "/nonexistent/l"],
        ),
        ("/logger", json!({"level": "loud"}), ["'logger'", "loud"]),
        (
            "/metrics",
            json!({"metrics_path": "/"}),
            ["'metrics'", "directory"],
        ),
    ];
    for (pointer, value, words) in bad {
        let (code, stdout, stderr) = check(&scratch, &with(config.clone(), pointer, value), &[])?;
        assert_eq!((code, stdout.as_str()), (1, ""), "{pointer}: {stderr}");
        assert!(
            words.iter().all(|word| stderr.contains(word)),
            "{pointer}: {words:?} in {stderr}"
        );
    }
    Ok(())
}

#[test]
fn too_many_devices_for_the_transport_are_refused() -> Result {
    let (scratch, config) = everything()?;
    let drives: Vec<_> = (0..18)
        .map(|i| with(config["drives"][1].clone(), "/drive_id", json!(format!("d{i}"))))
        .collect();
    let many = json!({"boot-source": config["boot-source"], "drives": drives});
    assert_eq!(check(&scratch, &many, &[])?.0, 0);
    let (code, _, stderr) = check(&scratch, &many, &["--no-pci"])?;
    assert_eq!(code, 1);
    assert!(
        stderr.contains("'d17'") && stderr.contains("17 devices"),
        "{stderr}"
    );
    Ok(())
}

#[test]
fn a_guest_memory_that_is_too_small_for_the_kernel_is_refused() -> Result {
    let (scratch, config) = everything()?;
    let initrd = scratch.join("large");
    std::fs::File::create(&initrd)?.set_len(100 << 20)?;
    let config = with(config, "/boot-source/initrd_path", json!(initrd));
    let (code, _, stderr) = check(&scratch, &config, &[])?;
    assert_eq!(code, 1);
    assert!(stderr.contains("initrd") && stderr.contains("large"), "{stderr}");
    Ok(())
}

#[test]
fn what_is_no_config_is_refused() -> Result {
    let scratch = Scratch::new("config")?;
    let refused = |text: &str, words: &[&str]| -> Result {
        let (code, _, stderr) = check_file(&scratch.file("bad.json", text)?, &[])?;
        assert_eq!(code, 1);
        assert!(
            words.iter().all(|word| stderr.contains(word)),
            "{words:?} in {stderr}"
        );
        Ok(())
    };
    refused("", &["bad.json", "EOF"])?;
    refused("{\"drives\": [],", &["EOF", "line 1 column 14"])?;
    refused("{\"drives\": []}", &["missing field `boot-source`"])?;
    refused("{\"driver\": []}", &["unknown field `driver`"])?;
    let (code, _, stderr) = check_file(&scratch.join("none.json"), &[])?;
    assert_eq!(code, 1);
    assert!(
        stderr.contains("none.json': check the path") && stderr.contains("No such file"),
        "{stderr}"
    );
    Ok(())
}

#[test]
fn a_start_from_a_bad_file_says_the_same_as_a_check() -> Result {
    let (scratch, config) = everything()?;
    let bad = with(config, "/drives/0/path_on_host", json!("/nonexistent/disk"));
    let file = scratch.file("bad.json", bad.to_string())?;
    let (_, _, checked) = check_file(&file, &[])?;
    let args = ["--no-api", "--config-file", &file.display().to_string()];
    let monitor = MonitorBuilder::new("start")?
        .without_api_socket()
        .args(args)
        .spawn()?;
    assert_eq!(monitor.wait_exit()?, 1);
    assert_eq!(monitor.stderr().text(), checked);
    assert!(
        checked.contains("section 'drives' of the config file: Drive config error"),
        "{checked}"
    );
    Ok(())
}
