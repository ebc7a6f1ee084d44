//! The balloon over the API: before start, and after it without a driver. The guest is a few instructions.

use mayfly_tests::{Monitor, MonitorBuilder, Result, Scratch, TestVm, TinyKernel, Vm};
use serde_json::{Value, json};

fn monitor() -> Result<Monitor> {
    MonitorBuilder::new("balloon")?.start()
}

fn balloon(amount_mib: u64) -> Value {
    json!({"amount_mib": amount_mib, "deflate_on_oom": false})
}

/// A running machine of 128 MiB, with these sections.
fn running(section: Option<Value>) -> Result<(Vm, Scratch)> {
    let scratch = Scratch::new("balloon")?;
    let vm = TestVm::new("balloon").kernel(TinyKernel::new().halt().write(&scratch)?);
    let vm = match section {
        Some(balloon) => vm.section("balloon", balloon),
        None => vm,
    };
    Ok((vm.start()?, scratch))
}

#[test]
fn shows_what_was_put_with_its_defaults() -> Result {
    let monitor = monitor()?;
    monitor
        .get("/balloon")?
        .assert_refused(&["Balloon config error: No balloon device found."]);
    monitor.put("/balloon", &balloon(64))?.success()?;
    let expected = concat!(
        r#"{"amount_mib":64,"deflate_on_oom":false,"stats_polling_interval_s":0,"#,
        r#""free_page_hinting":false,"free_page_reporting":false}"#
    );
    assert_eq!(monitor.get("/balloon/")?.success()?.body, expected);
    let config = monitor.get("/vm/config")?.success()?.body;
    assert!(
        config.starts_with(&format!(r#"{{"balloon":{expected},"#)),
        "{config}"
    );
    Ok(())
}

#[test]
fn balloon_and_memory_must_fit_each_other() -> Result {
    let monitor = monitor()?;
    for amount_mib in [129, 1 << 24] {
        monitor
            .put("/balloon", &balloon(amount_mib))?
            .assert_refused(&["Balloon config error: Amount of pages requested is too large."]);
    }
    monitor.put("/balloon", &balloon(128))?.success()?;
    let machine = |size| json!({"vcpu_count": 1, "mem_size_mib": size});
    let smaller = "Machine config error: The memory size (MiB) is smaller than the previously set balloon";
    monitor
        .put("/machine-config", &machine(127))?
        .assert_refused(&[smaller]);
    monitor
        .patch("/machine-config", &json!({"mem_size_mib": 64}))?
        .assert_refused(&[smaller]);
    assert_eq!(monitor.get("/machine-config")?.json()?["mem_size_mib"], 128);
    monitor.put("/machine-config", &machine(256))?.success()?;
    monitor.put("/balloon", &balloon(256))?.success()?;
    Ok(())
}

#[test]
fn malformed_bodies_and_paths_are_refused_as_clients_know_it() -> Result {
    let monitor = monitor()?;
    let put = |body: &str| monitor.request("PUT", "/balloon", body);
    put(r#"{"amount_mib":1}"#)?.assert_refused(&["missing field `deflate_on_oom` at line 1 column 16."]);
    put(r#"{"amount_mib":-1,"deflate_on_oom":false}"#)?
        .assert_refused(&["invalid value: integer `-1`, expected u32"]);
    put(r#"{"amount_mib":1,"deflate_on_oom":false,"must_tell_host":true}"#)?
        .assert_refused(&["unknown field `must_tell_host`"]);
    monitor
        .get("/balloon/foo")?
        .assert_refused(&["Unrecognized GET request path `foo`."]);
    monitor
        .request("PATCH", "/balloon", "")?
        .assert_refused(&["Empty PATCH request."]);
    monitor
        .request("DELETE", "/balloon", "")?
        .assert_refused(&["Invalid request method and/or path: DELETE balloon."]);
    Ok(())
}

#[test]
fn changes_and_statistics_are_for_after_the_start() -> Result {
    let monitor = monitor()?;
    monitor.put("/balloon", &balloon(1))?.success()?;
    for path in ["/balloon/statistics", "/balloon/hinting/status"] {
        monitor
            .get(path)?
            .assert_refused(&["not supported before starting"]);
    }
    monitor
        .patch("/balloon", &json!({"amount_mib": 2}))?
        .assert_refused(&["not supported before starting"]);
    monitor
        .request("PATCH", "/balloon/hinting/start", "")?
        .assert_refused(&["not supported before starting"]);
    Ok(())
}

#[test]
fn a_machine_without_balloon_says_so() -> Result {
    let (vm, _scratch) = running(None)?;
    let none = "Failed perform action on device: Device not found";
    for path in ["/balloon", "/balloon/statistics", "/balloon/hinting/status"] {
        vm.get(path)?
            .assert_refused(&[&format!("Internal VMM error: {none}")]);
    }
    vm.patch("/balloon", &json!({"amount_mib": 2}))?
        .assert_refused(&[&format!("Balloon update error: {none}")]);
    vm.put("/balloon", &balloon(1))?
        .assert_refused(&["not supported after starting"]);
    Ok(())
}

#[test]
fn a_balloon_without_driver_takes_no_changes() -> Result {
    let (vm, _scratch) = running(Some(balloon(1)))?;
    let inactive = "Balloon update error: Balloon: Device not activated yet.";
    vm.patch("/balloon", &json!({"amount_mib": 2}))?
        .assert_refused(&[inactive]);
    vm.patch("/balloon/statistics", &json!({"stats_polling_interval_s": 1}))?
        .assert_refused(&[inactive]);
    for body in ["", "{}"] {
        vm.request("PATCH", "/balloon/hinting/start", body)?
            .assert_refused(&[inactive]);
        vm.request("PATCH", "/balloon/hinting/stop", body)?
            .assert_refused(&[inactive]);
    }
    vm.patch("/balloon", &json!({"amount_mib": 129}))?
        .assert_refused(&["Balloon update error: Balloon: Requested memory should be less than 128MiB"]);
    assert_eq!(vm.get("/balloon")?.json()?["amount_mib"], 1);
    vm.get("/balloon/statistics")?
        .assert_refused(&["Statistics are not enabled"]);
    vm.get("/balloon/hinting/status")?
        .assert_refused(&["Hinting is not enabled"]);
    Ok(())
}

#[test]
fn what_was_asked_for_can_be_seen_before_the_driver_is_there() -> Result {
    let all = json!({
        "amount_mib": 3, "deflate_on_oom": true, "stats_polling_interval_s": 1, "free_page_hinting": true,
    });
    let (vm, _scratch) = running(Some(all))?;
    // The order of the keys is part of the API.
    assert_eq!(
        vm.get("/balloon/statistics")?.success()?.body,
        r#"{"target_pages":768,"actual_pages":0,"target_mib":3,"actual_mib":0}"#
    );
    assert_eq!(
        vm.get("/balloon/hinting/status")?.success()?.body,
        r#"{"host_cmd":0,"guest_cmd":null}"#
    );
    vm.action("FlushMetrics")?;
    let lines = vm.metrics()?;
    assert_eq!(
        lines[lines.len() - 1]["balloon"],
        json!({
            "activate_fails": 0, "inflate_count": 0, "stats_updates_count": 0, "stats_update_fails": 0,
            "deflate_count": 0, "event_fails": 0, "free_page_report_count": 0, "free_page_report_freed": 0,
            "free_page_report_fails": 0, "free_page_hint_count": 0, "free_page_hint_freed": 0,
            "free_page_hint_fails": 0,
        })
    );
    Ok(())
}

#[test]
fn a_config_file_can_have_a_balloon() -> Result {
    let scratch = Scratch::new("balloon")?;
    let vm = TestVm::new("balloon")
        .kernel(TinyKernel::new().halt().write(&scratch)?)
        .section("balloon", balloon(5))
        .config_file()
        .start()?;
    assert_eq!(vm.get("/balloon")?.json()?["amount_mib"], 5);
    Ok(())
}
