//! Every endpoint's success and refusal before start, and the exact bytes of the answers. No guest is needed.

use mayfly_tests::{Monitor, MonitorBuilder, Result, TinyKernel, zeros};
use serde_json::{Value, json};

fn monitor(name: &str) -> Result<Monitor> {
    MonitorBuilder::new(name)?.start()
}

/// A kernel that is fine as a file; its path.
fn kernel(monitor: &Monitor) -> Result<String> {
    let path = monitor.dir().join("kernel");
    std::fs::write(&path, TinyKernel::new().halt().elf())?;
    Ok(path.display().to_string())
}

/// A disk image of 8 MiB; its path.
fn image(monitor: &Monitor) -> Result<String> {
    let path = monitor.dir().join("disk.img");
    zeros(&path, 8 << 20)?;
    Ok(path.display().to_string())
}

fn drive(path: &str) -> Value {
    json!({"drive_id": "data", "path_on_host": path, "is_root_device": false})
}

#[test]
fn get_root_describes_the_instance() -> Result {
    let monitor = MonitorBuilder::new("info")?.args(["--id", "my-vm-1"]).start()?;
    let body = r#"{"id":"my-vm-1","state":"Not started","vmm_version":"1.16.1","app_name":"Mayfly"}"#;
    assert_eq!(monitor.get("/")?.success()?.body, body);
    Ok(())
}

#[test]
fn get_version_has_the_api_level_and_the_version() -> Result {
    let body = monitor("version")?.get("/version")?.success()?.body;
    assert!(
        body.starts_with(r#"{"firecracker_version":"1.16.1","mayfly_version":""#),
        "{body}"
    );
    Ok(())
}

#[test]
fn machine_config_has_defaults_in_the_known_order() -> Result {
    let expected = concat!(
        r#"{"vcpu_count":1,"mem_size_mib":128,"smt":false,"track_dirty_pages":false,"#,
        r#""huge_pages":"None"}"#
    );
    assert_eq!(
        monitor("machine")?.get("/machine-config")?.success()?.body,
        expected
    );
    Ok(())
}

#[test]
fn put_machine_config_resets_what_it_leaves_out() -> Result {
    let monitor = monitor("machine")?;
    monitor
        .put(
            "/machine-config",
            &json!({"vcpu_count": 2, "mem_size_mib": 256, "smt": true}),
        )?
        .success()?;
    monitor
        .put("/machine-config", &json!({"vcpu_count": 4, "mem_size_mib": 64}))?
        .success()?;
    let config = monitor.get("/machine-config")?.json()?;
    assert_eq!(
        (&config["vcpu_count"], &config["mem_size_mib"], &config["smt"]),
        (&json!(4), &json!(64), &json!(false))
    );
    Ok(())
}

#[test]
fn patch_machine_config_keeps_what_it_leaves_out() -> Result {
    let monitor = monitor("machine")?;
    monitor
        .put(
            "/machine-config",
            &json!({"vcpu_count": 2, "mem_size_mib": 256, "smt": true}),
        )?
        .success()?;
    monitor
        .patch("/machine-config", &json!({"mem_size_mib": 512}))?
        .success()?;
    let config = monitor.get("/machine-config")?.json()?;
    assert_eq!(
        (&config["vcpu_count"], &config["mem_size_mib"], &config["smt"]),
        (&json!(2), &json!(512), &json!(true))
    );
    Ok(())
}

#[test]
fn machine_config_out_of_range_is_refused_and_changes_nothing() -> Result {
    let monitor = monitor("machine")?;
    let before = monitor.get("/vm/config")?;
    let put = |vcpus: u8, mem: usize, smt: bool| {
        monitor.put(
            "/machine-config",
            &json!({"vcpu_count": vcpus, "mem_size_mib": mem, "smt": smt}),
        )
    };
    put(0, 128, false)?.assert_refused(&["Machine config error", "vcpu"]);
    put(33, 128, false)?.assert_refused(&["Machine config error", "vcpu"]);
    put(3, 128, true)?.assert_refused(&["Machine config error", "vcpu"]);
    put(1, 0, false)?.assert_refused(&["Machine config error", "mem_size_mib"]);
    monitor
        .patch("/machine-config", &json!({"vcpu_count": 33}))?
        .assert_refused(&["Machine config error"]);
    assert_eq!(monitor.get("/vm/config")?, before);
    put(32, 128, false)?.success()?;
    Ok(())
}

#[test]
fn cpu_template_none_is_taken_as_deprecated() -> Result {
    let monitor = monitor("template")?;
    let body = json!({"vcpu_count": 1, "mem_size_mib": 128, "cpu_template": "None"});
    let answer = monitor.put("/machine-config", &body)?.success()?;
    assert_eq!(answer.header("Deprecation"), Some("true"));
    assert_eq!(monitor.get("/machine-config")?.json()?.get("cpu_template"), None);
    Ok(())
}

#[test]
fn an_empty_vm_config_has_every_key_in_the_known_order() -> Result {
    let expected = concat!(
        r#"{"balloon":null,"drives":[],"boot-source":{"kernel_image_path":"","initrd_path":null,"boot_args":null},"#,
        r#""cpu-config":null,"logger":null,"machine-config":{"vcpu_count":1,"mem_size_mib":128,"smt":false,"#,
        r#""track_dirty_pages":false,"huge_pages":"None"},"metrics":null,"mmds-config":null,"network-interfaces":[],"#,
        r#""vsock":null,"entropy":null,"pmem":[],"memory-hotplug":null}"#
    );
    assert_eq!(monitor("config")?.get("/vm/config")?.success()?.body, expected);
    Ok(())
}

#[test]
fn vm_config_shows_boot_source_drive_and_entropy_with_defaults() -> Result {
    let monitor = monitor("config")?;
    let (kernel, image) = (kernel(&monitor)?, image(&monitor)?);
    monitor
        .put(
            "/boot-source",
            &json!({"kernel_image_path": kernel, "boot_args": "quiet"}),
        )?
        .success()?;
    monitor.put("/drives/data", &drive(&image))?.success()?;
    monitor.put("/entropy", &json!({}))?.success()?;

    let body = monitor.get("/vm/config")?.success()?.body;

    let drives = concat!(
        r#""drives":[{"drive_id":"data","partuuid":null,"is_root_device":false,"cache_type":"Unsafe","#,
        r#""is_read_only":false,"path_on_host":"IMAGE","rate_limiter":null,"io_engine":"Sync","socket":null}]"#
    );
    assert!(body.contains(&drives.replace("IMAGE", &image)), "{body}");
    let boot = r#""boot-source":{"kernel_image_path":"KERNEL","initrd_path":null,"boot_args":"quiet"}"#;
    assert!(body.contains(&boot.replace("KERNEL", &kernel)), "{body}");
    assert!(body.contains(r#""entropy":{"rate_limiter":null}"#), "{body}");
    Ok(())
}

#[test]
fn a_drive_with_a_known_id_replaces_it() -> Result {
    let monitor = monitor("replace")?;
    let image = image(&monitor)?;
    monitor.put("/drives/data", &drive(&image))?.success()?;
    let mut second = drive(&image);
    second["is_read_only"] = json!(true);
    monitor.put("/drives/data", &second)?.success()?;
    let drives = monitor.get("/vm/config")?.json()?["drives"].clone();
    assert_eq!(
        (drives.as_array().map(Vec::len), &drives[0]["is_read_only"]),
        (Some(1), &json!(true))
    );
    Ok(())
}

#[test]
fn the_root_drive_comes_first_and_there_is_one() -> Result {
    let monitor = monitor("root")?;
    let image = image(&monitor)?;
    let root = |id: &str| json!({"drive_id": id, "path_on_host": image, "is_root_device": true});
    monitor.put("/drives/data", &drive(&image))?.success()?;
    monitor.put("/drives/root", &root("root"))?.success()?;
    monitor
        .put("/drives/other", &root("other"))?
        .assert_refused(&["Drive config error", "root"]);
    let drives = monitor.get("/vm/config")?.json()?["drives"].clone();
    assert_eq!(
        (&drives[0]["drive_id"], &drives[1]["drive_id"]),
        (&json!("root"), &json!("data"))
    );
    Ok(())
}

#[test]
fn logger_and_metrics_and_serial_take_their_files() -> Result {
    let monitor = monitor("files")?;
    let path = |name: &str| monitor.dir().join(name).display().to_string();
    monitor
        .put(
            "/logger",
            &json!({"log_path": path("other.log"), "level": "Debug", "show_level": true}),
        )?
        .success()?;
    monitor
        .put("/metrics", &json!({"metrics_path": path("m")}))?
        .success()?;
    monitor
        .put("/serial", &json!({"serial_out_path": path("serial")}))?
        .success()?;
    let log = std::fs::read_to_string(path("other.log"))?;
    assert!(log.contains("204 No Content"), "{log}");
    Ok(())
}

#[test]
fn metrics_can_be_configured_once() -> Result {
    let monitor = monitor("metrics")?;
    let body = json!({"metrics_path": monitor.dir().join("m")});
    monitor.put("/metrics", &body)?.success()?;
    monitor
        .put("/metrics", &body)?
        .assert_refused(&["Metrics", "already"]);
    Ok(())
}

#[test]
fn what_needs_a_running_machine_is_refused_before_start() -> Result {
    let monitor = monitor("before")?;
    let refusal = "The requested operation is not supported before starting the microVM.";
    let answers = [
        monitor.put("/actions", &json!({"action_type": "FlushMetrics"}))?,
        monitor.put("/actions", &json!({"action_type": "SendCtrlAltDel"}))?,
        monitor.put("/actions", &json!({"action_type": "PowerButton"}))?,
        monitor.patch("/vm", &json!({"state": "Paused"}))?,
        monitor.patch("/vm", &json!({"state": "Resumed"}))?,
        monitor.patch(
            "/drives/data",
            &json!({"drive_id": "data", "path_on_host": "/dev/null"}),
        )?,
    ];
    answers
        .iter()
        .for_each(|answer| answer.assert_refused(&[refusal]));
    Ok(())
}

#[test]
fn a_start_without_a_kernel_is_refused_and_can_be_repeated() -> Result {
    let monitor = monitor("no-kernel")?;
    let start = json!({"action_type": "InstanceStart"});
    monitor
        .put("/actions", &start)?
        .assert_refused(&["Start microvm error", "kernel"]);
    assert_eq!(monitor.get("/")?.json()?["state"], "Not started");
    monitor
        .put("/boot-source", &json!({"kernel_image_path": kernel(&monitor)?}))?
        .success()?;
    monitor.put("/actions", &start)?.success()?;
    assert_eq!(monitor.get("/")?.json()?["state"], "Running");
    Ok(())
}
