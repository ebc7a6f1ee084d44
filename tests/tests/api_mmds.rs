//! The metadata service over the API: its store, its config, and what may be done when. No Linux guest is needed.

use std::time::Instant;

use mayfly_tests::{
    Failure, HOST_TIMEOUT, Monitor, MonitorBuilder, Net, Result, Scratch, TestVm, TinyKernel, Vm,
};
use serde_json::{Value, json};

fn monitor() -> Result<Monitor> {
    MonitorBuilder::new("mmds")?.start()
}

/// A process with a card `net0`, on a tap of this name.
fn with_card(tap: &str) -> Result<Monitor> {
    let monitor = monitor()?;
    let card = json!({"iface_id": "net0", "host_dev_name": tap});
    monitor.put("/network-interfaces/net0", &card)?.success()?;
    Ok(monitor)
}

/// A running machine, with these sections of its config and the card `net0` on a tap of this name.
fn running(tap: &str, mmds: Option<Value>) -> Result<Vm> {
    let scratch = Scratch::new("mmds")?;
    let kernel = TinyKernel::new().print("up\n").halt().write(&scratch)?;
    let machine = TestVm::new("mmds").kernel(kernel).net(Net::on("net0", tap));
    let vm = match mmds {
        Some(mmds) => machine.section("mmds-config", mmds).config_file().start()?,
        None => machine.start()?,
    };
    assert!(vm.console().wait_for("up\n", Instant::now() + HOST_TIMEOUT));
    Ok(vm)
}

const UNINITIALIZED: &str = "MMDS error: The MMDS data store is not initialized.";

#[test]
fn the_store_is_an_empty_object_until_something_is_put() -> Result {
    let monitor = monitor()?;
    assert_eq!(monitor.get("/mmds")?.success()?.body, "{}");
    let patched = monitor.patch("/mmds", &json!({"a": 1}))?;
    assert_eq!((patched.status, patched.fault()?.as_str()), (400, UNINITIALIZED));
    assert_eq!(monitor.get("/mmds")?.body, "{}");
    Ok(())
}

#[test]
fn any_json_is_put_patched_and_read_back() -> Result {
    let monitor = monitor()?;
    let put = |body: &str| -> Result<String> {
        assert_eq!(monitor.request("PUT", "/mmds", body)?.status, 204);
        Ok(monitor.get("/mmds")?.success()?.body)
    };
    assert_eq!(put("[1,\"a\"]")?, "[1,\"a\"]");
    assert_eq!(put("5")?, "5");
    assert_eq!(put("null")?, "{}");
    assert_eq!(
        put(r#"{"b": {"c": 1, "d": 2}, "a": "x"}"#)?,
        r#"{"a":"x","b":{"c":1,"d":2}}"#
    );
    let patch = json!({"b": {"c": null, "e": [3]}, "a": "y"});
    assert_eq!(monitor.patch("/mmds", &patch)?.status, 204);
    // What follows the first part of the path does not matter to a patch.
    assert_eq!(monitor.patch("/mmds/config", &json!({"f": true}))?.status, 204);
    let expected = r#"{"a":"y","b":{"d":2,"e":[3]},"f":true}"#;
    assert_eq!(monitor.get("/mmds")?.body, expected);
    Ok(())
}

#[test]
fn what_is_no_json_or_no_path_is_refused() -> Result {
    let monitor = monitor()?;
    monitor.put("/mmds", &json!({"a": 1}))?.success()?;
    monitor
        .request("PUT", "/mmds", "{")?
        .assert_refused(&["EOF while parsing an object at line 1 column 1."]);
    monitor
        .request("PUT", "/mmds", "")?
        .assert_refused(&["Empty PUT request."]);
    monitor
        .request("PATCH", "/mmds", "")?
        .assert_refused(&["Empty PATCH request."]);
    monitor
        .request("PUT", "/mmds/foo", "{}")?
        .assert_refused(&["Unrecognized PUT request path `foo`."]);
    monitor
        .request("DELETE", "/mmds", "")?
        .assert_refused(&["Invalid request method and/or path: DELETE mmds."]);
    assert_eq!(monitor.get("/mmds")?.body, r#"{"a":1}"#);
    Ok(())
}

#[test]
fn what_is_too_large_is_answered_413_and_changes_nothing() -> Result {
    let monitor = MonitorBuilder::new("mmds")?
        .args(["--mmds-size-limit", "20"])
        .start()?;
    let overflow = r#"{"fault_message":"MMDS limit exceeded error: The MMDS patch request doesn't fit."}"#;
    assert_eq!(monitor.put("/mmds", &json!({"a": "0123456789ab"}))?.status, 204);
    let put = monitor.put("/mmds", &json!({"a": "0123456789abc"}))?;
    assert_eq!((put.status, put.body.as_str()), (413, overflow));
    let patch = monitor.patch("/mmds", &json!({"b": 1}))?;
    assert_eq!((patch.status, patch.body.as_str()), (413, overflow));
    assert_eq!(monitor.get("/mmds")?.body, r#"{"a":"0123456789ab"}"#);
    let log = monitor.log();
    assert!(log.contains("Status code: 413 Payload Too Large."), "{log}");
    Ok(())
}

#[test]
fn the_store_is_limited_as_requests_are_unless_told_otherwise() -> Result {
    let monitor = MonitorBuilder::new("mmds")?
        .args(["--http-api-max-payload-size", "100"])
        .start()?;
    assert_eq!(monitor.put("/mmds", &json!({"a": "x".repeat(80)}))?.status, 204);
    assert_eq!(monitor.patch("/mmds", &json!({"b": "x".repeat(80)}))?.status, 413);
    Ok(())
}

#[test]
fn the_config_names_cards_that_are_there() -> Result {
    let monitor = with_card("mftest20")?;
    let refused = |body: &Value, words: &[&str]| -> Result {
        monitor.put("/mmds/config", body)?.assert_refused(words);
        Ok(())
    };
    refused(
        &json!({"network_interfaces": []}),
        &["MMMDS config error: ", "empty"],
    )?;
    let unknown = json!({"network_interfaces": ["net0", "net1"]});
    refused(
        &unknown,
        &["MMMDS config error: ", "'net1'", "/network-interfaces/net1"],
    )?;
    let routed = json!({"network_interfaces": ["net0"], "ipv4_address": "10.0.0.1"});
    refused(&routed, &["MMMDS config error: ", "10.0.0.1", "169.254.1.0"])?;
    refused(&json!({"version": "V2"}), &["missing field `network_interfaces`"])?;
    refused(
        &json!({"network_interfaces": ["net0"], "x": 1}),
        &["unknown field `x`"],
    )?;
    assert_eq!(monitor.get("/vm/config")?.json()?["mmds-config"], Value::Null);
    Ok(())
}

#[test]
fn the_config_is_shown_with_its_defaults_and_v1_is_deprecated() -> Result {
    let monitor = with_card("mftest21")?;
    let shown = || -> Result<String> {
        let body = monitor.get("/vm/config")?.body;
        let start = body.find(r#""mmds-config":"#).unwrap_or_default();
        let end = body.find(r#","network-interfaces""#).unwrap_or(body.len());
        Ok(body[start..end].to_owned())
    };
    let v1 = monitor.put("/mmds/config", &json!({"network_interfaces": ["net0"]}))?;
    assert_eq!((v1.status, v1.header("Deprecation")), (204, Some("true")));
    assert_eq!(
        shown()?,
        r#""mmds-config":{"version":"V1","network_interfaces":["net0"],"ipv4_address":"169.254.169.254","imds_compat":false}"#
    );
    let full =
        r#"{"version":"V2","network_interfaces":["net0"],"ipv4_address":"169.254.2.3","imds_compat":true}"#;
    let v2 = monitor.request("PUT", "/mmds/config", full)?;
    assert_eq!((v2.status, v2.header("Deprecation")), (204, None));
    assert_eq!(shown()?, format!(r#""mmds-config":{full}"#));
    Ok(())
}

#[test]
fn the_store_is_used_after_start_if_it_was_before() -> Result {
    let vm = running("mftest22", None)?;
    for answer in [
        vm.get("/mmds")?,
        vm.put("/mmds", &json!({}))?,
        vm.patch("/mmds", &json!({}))?,
    ] {
        assert_eq!((answer.status, answer.fault()?.as_str()), (400, UNINITIALIZED));
    }
    let config = vm.put("/mmds/config", &json!({"network_interfaces": ["net0"]}))?;
    config.assert_refused(&["not supported after starting"]);
    Ok(())
}

#[test]
fn a_config_file_sets_the_service_up_and_the_api_fills_it() -> Result {
    let vm = running(
        "mftest23",
        Some(json!({"network_interfaces": ["net0"], "version": "V2"})),
    )?;
    assert_eq!(vm.get("/vm/config")?.json()?["mmds-config"]["version"], "V2");
    assert_eq!(vm.get("/mmds")?.success()?.body, "{}");
    vm.put("/mmds", &json!({"a": 1}))?.success()?;
    vm.patch("/mmds", &json!({"b": 2}))?.success()?;
    vm.pause()?;
    vm.patch("/mmds", &json!({"a": null}))?.success()?;
    assert_eq!(vm.get("/mmds")?.body, r#"{"b":2}"#);
    Ok(())
}

#[test]
fn a_config_file_with_a_card_that_is_not_there_is_refused() -> Result {
    let scratch = Scratch::new("mmds")?;
    let kernel = TinyKernel::new().halt().write(&scratch)?;
    let vm = TestVm::new("mmds")
        .kernel(kernel)
        .section("mmds-config", json!({"network_interfaces": ["other"]}))
        .config_file_without_api()
        .start()?;
    assert_eq!(vm.wait_exit()?, 1);
    let text = vm.stderr().text();
    let refusal = "MMMDS config error: there is no network interface 'other'";
    assert!(text.contains(refusal), "{text}");
    Ok(())
}

#[test]
fn a_detached_card_serves_no_metadata_until_it_is_attached_again() -> Result {
    let vm = running(
        "mfmmdsgone",
        Some(json!({"network_interfaces": ["net0"], "version": "V2"})),
    )?;
    let shown = || Ok::<_, Failure>(vm.get("/vm/config")?.json()?["mmds-config"].clone());
    let before = shown()?;
    assert_eq!(before["network_interfaces"], json!(["net0"]));
    vm.request("DELETE", "/network-interfaces/net0", r#"{"force":true}"#)?
        .success()?;
    assert_eq!(shown()?, Value::Null);
    let card = json!({"iface_id": "net0", "host_dev_name": "mfmmdsgone"});
    vm.put("/network-interfaces/net0", &card)?.success()?;
    assert_eq!(shown()?, before);
    Ok(())
}

#[test]
fn a_file_fills_the_store() -> Result {
    let scratch = Scratch::new("mmds")?;
    let file = scratch.file("metadata.json", r#"{"from": "file"}"#)?;
    let args = ["--metadata".to_owned(), file.display().to_string()];
    let monitor = MonitorBuilder::new("mmds")?.args(args).start()?;
    assert_eq!(monitor.get("/mmds")?.body, r#"{"from":"file"}"#);
    Ok(())
}

#[test]
fn a_file_that_cannot_fill_the_store_ends_the_process() -> Result {
    let scratch = Scratch::new("mmds")?;
    let ends = |content: &str, words: &[&str]| -> Result {
        let file = scratch.file("metadata.json", content)?.display().to_string();
        let builder = MonitorBuilder::new("mmds")?.args(["--mmds-size-limit", "10", "--metadata", &file]);
        let monitor = builder.spawn()?;
        assert_eq!(monitor.wait_exit()?, 1);
        let text = monitor.stderr().text();
        assert!(
            text.contains(&file) && words.iter().all(|word| text.contains(word)),
            "{text}"
        );
        Ok(())
    };
    ends("{", &["is not JSON", "EOF"])?;
    ends("\"123456789\"", &["more than 10 bytes", "--mmds-size-limit"])?;
    let monitor = MonitorBuilder::new("mmds")?
        .args(["--metadata", "/nonexistent"])
        .spawn()?;
    assert_eq!(monitor.wait_exit()?, 1);
    assert!(monitor.stderr().text().contains("metadata file '/nonexistent'"));
    Ok(())
}

#[test]
fn metadata_does_not_get_into_the_log() -> Result {
    let monitor = monitor()?;
    for path in ["/mmds", "/mmds/", "//mmds", "/mmds/foo"] {
        monitor.request("PUT", path, r#"{"key": "secret"}"#)?;
    }
    monitor
        .request("PATCH", "/mmds", r#"{"key": "secret"}"#)?
        .success()?;
    let log = monitor.log();
    assert!(log.contains(r#"received a Put request on "/mmds"."#), "{log}");
    assert!(!log.contains("secret"), "{log}");
    Ok(())
}
