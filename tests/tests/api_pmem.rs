//! Pmem devices over the API: before start, at start and after it. The guest is a few instructions.

use mayfly_tests::{
    Drive, Failure, Monitor, MonitorBuilder, Pmem, Result, Scratch, TestVm, TinyKernel, Vm, zeros,
};
use serde_json::{Value, json};

fn monitor(name: &str) -> Result<Monitor> {
    MonitorBuilder::new(name)?.start()
}

fn pmem(id: &str, path: &str) -> Value {
    json!({"id": id, "path_on_host": path})
}

fn root(id: &str) -> Value {
    json!({"id": id, "path_on_host": "/nope", "root_device": true})
}

/// A monitor with something to boot.
fn with_kernel(name: &str) -> Result<(Monitor, Scratch)> {
    let (monitor, scratch) = (monitor(name)?, Scratch::new("kernel")?);
    let kernel = TinyKernel::new().halt().write(&scratch)?;
    monitor
        .put("/boot-source", &json!({"kernel_image_path": kernel}))?
        .success()?;
    Ok((monitor, scratch))
}

/// A running machine with one device `a` of 3 MiB.
fn running(read_only: bool) -> Result<(Vm, Scratch)> {
    let scratch = Scratch::new("pmem")?;
    let file = scratch.join("file");
    zeros(&file, 3 << 20)?;
    let device = Pmem::new("a", &file);
    let vm = TestVm::new("pmem")
        .kernel(TinyKernel::new().halt().write(&scratch)?)
        .pmem(if read_only { device.read_only() } else { device });
    Ok((vm.start()?, scratch))
}

#[test]
fn a_file_is_not_opened_before_start() -> Result {
    let monitor = monitor("pmem")?;
    monitor.put("/pmem/a", &pmem("a", "/nope"))?.success()?;
    let body = monitor.get("/vm/config")?.success()?.body;
    let shown = concat!(
        r#""pmem":[{"id":"a","path_on_host":"/nope","root_device":false,"read_only":false,"#,
        r#""rate_limiter":null}]"#
    );
    assert!(body.contains(shown), "{body}");
    Ok(())
}

#[test]
fn a_missing_or_empty_file_fails_the_start_and_can_be_mended() -> Result {
    let (monitor, scratch) = with_kernel("pmem")?;
    let file = scratch.join("file");
    let path = file.display().to_string();
    let start = json!({"action_type": "InstanceStart"});
    monitor.put("/pmem/a", &pmem("a", &path))?.success()?;
    monitor
        .put("/actions", &start)?
        .assert_refused(&["Start microvm error", "device 'a'", &path]);
    zeros(&file, 0)?;
    monitor
        .put("/actions", &start)?
        .assert_refused(&["Start microvm error", "size 0"]);
    zeros(&file, 1)?;
    monitor.put("/actions", &start)?.success()?;
    Ok(())
}

#[test]
fn there_is_one_root_device_among_drives_and_pmem() -> Result {
    let monitor = monitor("root")?;
    let disk = monitor.dir().join("disk");
    zeros(&disk, 512)?;
    let drive = json!({"drive_id": "d", "path_on_host": disk, "is_root_device": true});

    monitor.put("/pmem/a", &root("a"))?.success()?;
    monitor.put("/pmem/a", &root("a"))?.success()?;
    monitor
        .put("/pmem/b", &root("b"))?
        .assert_refused(&["Pmem config error", "pmem device 'a'"]);
    monitor
        .put("/drives/d", &drive)?
        .assert_refused(&["Drive config error", "pmem device 'a'"]);

    monitor.put("/pmem/a", &pmem("a", "/nope"))?.success()?;
    monitor.put("/drives/d", &drive)?.success()?;
    monitor
        .put("/pmem/b", &root("b"))?
        .assert_refused(&["Pmem config error", "drive 'd'"]);
    Ok(())
}

#[test]
fn ids_and_fields_are_checked() -> Result {
    let monitor = monitor("pmem")?;
    let put = |path: &str, body: &Value| monitor.put(path, body);
    put("/pmem/a", &pmem("b", "/nope"))?.assert_refused(&["path does not match"]);
    put("/pmem/a-b", &pmem("a-b", "/nope"))?.assert_refused(&["alphanumeric"]);
    put("/pmem/a", &json!({"id": "a", "path_on_host": "/x", "size": 1}))?.assert_refused(&["unknown field"]);
    assert_eq!(monitor.get("/vm/config")?.json()?["pmem"], json!([]));
    Ok(())
}

#[test]
fn a_change_before_start_and_a_device_that_cannot_be_attached_after_it_are_refused() -> Result {
    let before = monitor("pmem")?;
    before
        .patch("/pmem/a", &json!({"id": "a"}))?
        .assert_refused(&["before starting"]);
    let (vm, _scratch) = running(false)?;
    vm.put("/pmem/a", &pmem("a", "/nope"))?
        .assert_refused(&["Pmem", "'a'"]);
    vm.put("/pmem/b", &pmem("b", "/nope"))?
        .assert_refused(&["Pmem", "/nope"]);
    assert_eq!(vm.get("/vm/config")?.json()?["pmem"][0]["id"], "a");
    Ok(())
}

#[test]
fn a_change_without_limits_does_nothing_whatever_its_id() -> Result {
    let (vm, _scratch) = running(true)?;
    vm.patch("/pmem/a", &json!({"id": "a"}))?.success()?;
    vm.patch("/pmem/nobody", &json!({"id": "nobody"}))?.success()?;
    vm.patch("/pmem/nobody", &json!({"id": "nobody", "rate_limiter": {}}))?
        .assert_refused(&["Pmem config error", "nobody"]);
    Ok(())
}

#[test]
fn limits_of_a_running_device_change() -> Result {
    let (vm, _scratch) = running(false)?;
    let bucket = |size: u64| json!({"size": size, "one_time_burst": null, "refill_time": 100});
    let limits = json!({"bandwidth": null, "ops": bucket(5)});
    let patch = |limits: &Value| vm.patch("/pmem/a", &json!({"id": "a", "rate_limiter": limits}));
    patch(&limits)?.success()?;
    let shown = || Ok::<_, Failure>(vm.get("/vm/config")?.json()?["pmem"][0]["rate_limiter"].clone());
    assert_eq!(shown()?, limits);
    patch(&json!({"ops": bucket(0)}))?.success()?;
    assert_eq!(shown()?, Value::Null);
    // An array is taken by position here too.
    vm.patch("/pmem/a", &json!(["a", limits]))?.success()?;
    assert_eq!(shown()?, limits);
    Ok(())
}

#[test]
fn metrics_have_the_sum_and_each_device() -> Result {
    let (vm, _scratch) = running(false)?;
    vm.action("FlushMetrics")?;
    let lines = vm.metrics()?;
    let line = lines.last().expect("a line was just written");
    for group in ["pmem", "pmem_a"] {
        assert_eq!(
            line[group],
            json!({
                "activate_fails": 0, "cfg_fails": 0, "event_fails": 0, "queue_event_count": 0,
                "rate_limiter_throttled_events": 0, "rate_limiter_event_count": 0,
            })
        );
    }
    assert_eq!(line["put_api_requests"]["pmem_count"], 1);
    Ok(())
}

#[test]
fn pmem_goes_together_with_a_root_drive() -> Result {
    let scratch = Scratch::new("both")?;
    let (disk, file) = (scratch.join("disk"), scratch.join("file"));
    zeros(&disk, 512)?;
    zeros(&file, 4096)?;
    let vm = TestVm::new("both")
        .kernel(TinyKernel::new().halt().write(&scratch)?)
        .drive(Drive::new("root", &disk).root())
        .pmem(Pmem::new("a", &file))
        .config_file()
        .start()?;
    assert_eq!(vm.get("/vm/config")?.json()?["pmem"][0]["id"], "a");
    Ok(())
}
