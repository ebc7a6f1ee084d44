//! Requests that are wrong: unknown paths, missing bodies, JSON that is none or of another shape. The wording of these
//! answers is part of the API.

use mayfly_tests::{Client, Failure, Monitor, MonitorBuilder, Response, Result};

fn monitor() -> Result<Monitor> {
    MonitorBuilder::new("request")?.start()
}

/// The fault message of a request that is refused with 400.
#[track_caller]
fn fault(monitor: &Monitor, method: &str, path: &str, body: &str) -> Result<String> {
    let response = monitor.request(method, path, body)?;
    assert_eq!(response.status, 400, "{response:?}");
    response.fault()
}

#[test]
fn unknown_paths_and_methods_are_named() -> Result {
    let monitor = monitor()?;
    let refused = |method, path, body| fault(&monitor, method, path, body);
    let text = "Invalid request method and/or path:";
    assert_eq!(refused("GET", "/nope", "")?, format!("{text} GET nope."));
    assert_eq!(
        refused("PATCH", "/boot-source", "{}")?,
        format!("{text} PATCH boot-source.")
    );
    assert_eq!(
        refused("DELETE", "/machine-config", "")?,
        format!("{text} DELETE machine-config.")
    );
    assert_eq!(refused("GET", "/actions", "")?, format!("{text} GET actions."));
    Ok(())
}

#[test]
fn resources_to_come_are_refused_with_a_reason() -> Result {
    let monitor = monitor()?;
    for (method, path, body) in [
        ("PUT", "/snapshot/create", "{}"),
        ("PUT", "/snapshot/load", "{}"),
        ("DELETE", "/drives/a", ""),
        ("DELETE", "/pmem/a", ""),
        ("DELETE", "/network-interfaces/a", ""),
    ] {
        let text = fault(&monitor, method, path, body)?;
        assert!(text.contains("not supported"), "{method} {path}: {text}");
    }
    Ok(())
}

#[test]
fn bodies_must_be_there_or_not() -> Result {
    let monitor = monitor()?;
    assert_eq!(
        fault(&monitor, "GET", "/version", "{}")?,
        "GET request cannot have a body."
    );
    assert_eq!(
        fault(&monitor, "PUT", "/machine-config", "")?,
        "Empty PUT request."
    );
    assert_eq!(
        fault(&monitor, "PATCH", "/machine-config", "")?,
        "Empty PATCH request."
    );
    assert_eq!(
        fault(&monitor, "PATCH", "/machine-config", "{}")?,
        "Empty PATCH request."
    );
    assert_eq!(
        fault(&monitor, "DELETE", "/vsock", "{}")?,
        "Empty Delete request."
    );
    assert_eq!(fault(&monitor, "PUT", "/nope", "")?, "Empty PUT request.");
    Ok(())
}

/// What serde_json says about a body.
#[track_caller]
fn json_fault(monitor: &Monitor, path: &str, body: &str) -> Result<String> {
    let text = fault(monitor, "PUT", path, body)?;
    let reason = text.strip_prefix("An error occurred when deserializing the json body of a request: ");
    reason
        .map(str::to_owned)
        .ok_or_else(|| Failure::new(text.clone()))
}

#[test]
fn what_is_no_json_is_refused_where_it_goes_wrong() -> Result {
    let monitor = monitor()?;
    let refused = |body| json_fault(&monitor, "/actions", body);
    assert_eq!(refused("{")?, "EOF while parsing an object at line 1 column 1.");
    assert_eq!(refused("not json")?, "expected ident at line 1 column 2.");
    let trailing = r#"{"action_type":"InstanceStart"}x"#;
    assert_eq!(refused(trailing)?, "trailing characters at line 1 column 32.");
    Ok(())
}

#[test]
fn unknown_missing_and_repeated_fields_are_named() -> Result {
    let monitor = monitor()?;
    let refused = |path, body| json_fault(&monitor, path, body);
    assert_eq!(
        refused("/actions", r#"{"action_type":"FlushMetrics","x":1}"#)?,
        "unknown field `x`, expected `action_type` at line 1 column 33."
    );
    assert_eq!(
        refused("/machine-config", r#"{"vcpu_count":1}"#)?,
        "missing field `mem_size_mib` at line 1 column 16."
    );
    assert_eq!(
        refused(
            "/actions",
            r#"{"action_type":"FlushMetrics","action_type":"FlushMetrics"}"#
        )?,
        "duplicate field `action_type` at line 1 column 43."
    );
    Ok(())
}

#[test]
fn wrong_types_and_ranges_and_names_are_named() -> Result {
    let monitor = monitor()?;
    let refused = |path, body| json_fault(&monitor, path, body);
    let wrong_type = refused("/machine-config", r#"{"vcpu_count":"1","mem_size_mib":128}"#)?;
    assert!(
        wrong_type.starts_with(r#"invalid type: string "1", expected u8 at line 1 column"#),
        "{wrong_type}"
    );
    let too_large = refused("/machine-config", r#"{"vcpu_count":256,"mem_size_mib":128}"#)?;
    assert!(
        too_large.starts_with("invalid value: integer `256`, expected u8 at line 1 column"),
        "{too_large}"
    );
    let unknown = refused("/actions", r#"{"action_type":"Foo"}"#)?;
    assert!(
        unknown.starts_with("unknown variant `Foo`, expected one of `"),
        "{unknown}"
    );
    let null = refused("/machine-config", "null")?;
    assert!(
        null.starts_with("invalid type: null, expected struct MachineConfig at line 1"),
        "{null}"
    );
    Ok(())
}

#[test]
fn bodies_of_the_wrong_kind_are_told_what_was_expected() -> Result {
    let monitor = monitor()?;
    for (method, path, expected) in [
        ("PUT", "/boot-source", "BootSourceConfig"),
        ("PUT", "/cpu-config", "CustomCpuTemplate"),
        ("PUT", "/entropy", "EntropyDeviceConfig"),
        ("PUT", "/mmds/config", "MmdsConfig"),
        ("PUT", "/serial", "SerialConfig"),
        ("PUT", "/logger", "LoggerConfig"),
        ("PUT", "/metrics", "MetricsConfig"),
        ("PUT", "/drives/a", "BlockDeviceConfig"),
        ("PUT", "/network-interfaces/a", "NetworkInterfaceConfig"),
        ("PATCH", "/machine-config", "MachineConfigUpdate"),
        ("PATCH", "/network-interfaces/a", "NetworkInterfaceUpdateConfig"),
        ("PATCH", "/vm", "Vm"),
    ] {
        let text = fault(&monitor, method, path, "7")?;
        let expected = format!("invalid type: integer `7`, expected struct {expected} at line 1 column 1.");
        assert!(text.ends_with(&expected), "{method} {path}: {text}");
    }
    let null = json_fault(
        &monitor,
        "/network-interfaces/a",
        r#"{"iface_id":"a","host_dev_name":null}"#,
    )?;
    assert!(
        null.starts_with("invalid type: null, expected a string at line 1 column 36"),
        "{null}"
    );
    Ok(())
}

#[test]
fn arrays_are_taken_by_position() -> Result {
    let monitor = monitor()?;
    monitor.request("PUT", "/machine-config", "[2,64]")?.success()?;
    assert_eq!(monitor.get("/machine-config")?.json()?["vcpu_count"], 2);
    // Clients know nothing of the fields that Mayfly adds.
    let patch = "[null,128,null,null,null,null]";
    monitor.request("PATCH", "/machine-config", patch)?.success()?;
    assert_eq!(monitor.get("/machine-config")?.json()?["mem_size_mib"], 128);
    Ok(())
}

#[test]
fn extra_slashes_and_path_tokens_are_ignored() -> Result {
    let monitor = monitor()?;
    let config = monitor.get("/machine-config")?;
    assert_eq!(monitor.get("/machine-config/")?, config);
    assert_eq!(monitor.get("//machine-config/extra")?, config);
    assert_eq!(monitor.get("/vm/config/x")?.status, 200);
    Ok(())
}

#[test]
fn ids_follow_their_rules() -> Result {
    let monitor = monitor()?;
    let refused = |path, body| fault(&monitor, "PUT", path, body);
    let drive = r#"{"drive_id":"a-b","path_on_host":"/dev/null","is_root_device":false}"#;
    let rule = "API Resource IDs can only contain alphanumeric characters and underscores.";
    assert_eq!(refused("/drives/a-b", drive)?, rule);
    assert_eq!(refused("/drives/", drive)?, "The ID cannot be empty.");
    assert_eq!(
        refused("/drives/b", drive)?,
        "The id from the path does not match the id from the body!"
    );
    let net = r#"{"iface_id":"b","host_dev_name":"tap0"}"#;
    let mismatch = "The id from the path [a] does not match the id from the body [b]!";
    assert_eq!(refused("/network-interfaces/a", net)?, mismatch);
    Ok(())
}

#[test]
fn unknown_fields_of_metrics_are_ignored() -> Result {
    let monitor = monitor()?;
    let body = serde_json::json!({"metrics_path": monitor.dir().join("m"), "later": 1});
    monitor.put("/metrics", &body)?.success()?;
    Ok(())
}

/// Requests of two clients meet in the queue to the control thread, whose implementation may give its processor away.
#[test]
fn requests_of_two_clients_may_meet() -> Result {
    let monitor = monitor()?;
    let socket = monitor.socket();
    let clients = [(); 2].map(|()| {
        let socket = socket.clone();
        std::thread::spawn(move || -> std::result::Result<(), String> {
            let mut client = Client::connect(&socket).map_err(|failure| failure.to_string())?;
            for _ in 0..20_000 {
                let answer = client.request("GET", "/", "");
                answer
                    .and_then(Response::success)
                    .map_err(|failure| failure.to_string())?;
            }
            Ok(())
        })
    });
    for client in clients {
        let end = client.join().map_err(|_| Failure::new("a client panicked"))?;
        end.map_err(|failure| monitor.failure(&failure))?;
    }
    Ok(())
}
