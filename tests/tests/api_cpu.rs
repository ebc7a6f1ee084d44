//! CPU templates over the API, before start.

use mayfly_tests::{Monitor, MonitorBuilder, Result};
use serde_json::{Value, json};

fn monitor() -> Result<Monitor> {
    MonitorBuilder::new("cpu")?.metrics().start()
}

fn machine(more: Value) -> Value {
    let mut machine = json!({"vcpu_count": 1, "mem_size_mib": 128});
    for (key, value) in more.as_object().into_iter().flatten() {
        machine[key] = value.clone();
    }
    machine
}

fn put_machine(monitor: &Monitor, more: Value) -> Result<mayfly_tests::Response> {
    monitor.put("/machine-config", &machine(more))
}

/// The named template that the monitor shows.
fn template(monitor: &Monitor) -> Result<Option<Value>> {
    Ok(monitor
        .get("/machine-config")?
        .json()?
        .get("cpu_template")
        .cloned())
}

#[test]
fn a_named_template_is_shown_after_smt_and_is_deprecated() -> Result {
    let monitor = monitor()?;
    for name in ["C3", "T2", "T2S", "T2CL", "T2A"] {
        let answer = put_machine(&monitor, json!({"cpu_template": name}))?.success()?;
        assert_eq!(answer.header("Deprecation"), Some("true"));
        let shown = monitor.get("/machine-config")?.body;
        let expected = format!(r#""smt":false,"cpu_template":"{name}","track_dirty_pages":"#);
        assert!(shown.contains(&expected), "{shown}");
    }
    let answer = monitor.patch("/machine-config", &json!({"cpu_template": "T2"}))?;
    assert_eq!(answer.success()?.header("Deprecation"), Some("true"));
    Ok(())
}

#[test]
fn a_named_template_stays_until_another_word_about_templates() -> Result {
    let monitor = monitor()?;
    put_machine(&monitor, json!({"cpu_template": "T2"}))?.success()?;
    put_machine(&monitor, json!({}))?.success()?;
    monitor
        .patch("/machine-config", &json!({"vcpu_count": 2}))?
        .success()?;
    assert_eq!(template(&monitor)?, Some(json!("T2")));
    put_machine(&monitor, json!({"cpu_template": "None"}))?.success()?;
    assert_eq!(template(&monitor)?, None);
    put_machine(&monitor, json!({"cpu_template": "T2A"}))?.success()?;
    monitor.put("/cpu-config", &json!({}))?.success()?;
    assert_eq!(template(&monitor)?, None);
    Ok(())
}

#[test]
fn a_custom_template_is_taken_again_and_again_and_never_shown() -> Result {
    let monitor = monitor()?;
    let body = json!({
        "kvm_capabilities": ["121", "!56"],
        "cpuid_modifiers": [{"leaf": "0x7", "subleaf": "0b0", "flags": 1,
            "modifiers": [{"register": "ebx", "bitmap": "0b0_xxxx"}]}],
        "msr_modifiers": [{"addr": "0x10a", "bitmap": "0b0"}]
    });
    for body in [&body, &json!({}), &body] {
        let answer = monitor.put("/cpu-config", body)?.success()?;
        assert_eq!(answer.header("Deprecation"), None);
        assert_eq!(
            monitor.get("/vm/config")?.json()?.get("cpu-config"),
            Some(&Value::Null)
        );
    }
    let log = monitor.log();
    assert!(log.contains(r#"Put request on "/cpu-config"."#), "{log}");
    Ok(())
}

#[test]
fn what_is_wrong_in_a_template_is_said_in_the_known_words() -> Result {
    let monitor = monitor()?;
    let refused = |body: &str| -> Result<String> {
        let fault = monitor.request("PUT", "/cpu-config", body)?.fault()?;
        Ok(fault.replacen(
            "An error occurred when deserializing the json body of a request: ",
            "",
            1,
        ))
    };
    assert_eq!(
        refused(r#"{"msr_modifiers":[{"addr":"zz","bitmap":"0b1"}]}"#)?,
        "No supported number system prefix found in value [zz]. Make sure to prefix the number with '0x' for \
         hexadecimal numbers or '0b' for binary numbers. at line 1 column 30."
    );
    assert_eq!(
        refused(r#"{"msr_modifiers":[{"addr":"0x1","bitmap":"0bz"}]}"#)?,
        "Failed to parse string [0bz] as a bitmap - unknown character: 122 at line 1 column 47."
    );
    assert_eq!(
        refused(r#"{"kvm_capabilities":["x"]}"#)?,
        "Failed to parse string [x] as a kvm capability - can not convert to numeric: invalid digit found in string \
         at line 1 column 25."
    );
    assert_eq!(
        refused(r#"{"reg_modifiers":[]}"#)?,
        "unknown field `reg_modifiers`, expected one of `kvm_capabilities`, `cpuid_modifiers`, `msr_modifiers` at \
         line 1 column 16."
    );
    Ok(())
}

#[test]
fn requests_for_a_template_are_counted_with_their_failures() -> Result {
    let monitor = monitor()?;
    monitor.put("/cpu-config", &json!({}))?.success()?;
    monitor
        .put("/cpu-config", &json!({"x": 1}))?
        .assert_refused(&["unknown field"]);
    // A monitor without a machine writes its metrics when it ends.
    monitor.signal(libc::SIGTERM)?;
    monitor.wait_exit()?;
    let lines = monitor.metrics()?;
    let sum = |name: &str| -> u64 {
        let counts = lines
            .iter()
            .filter_map(|line| line["put_api_requests"][name].as_u64());
        counts.sum()
    };
    assert_eq!((sum("cpu_cfg_count"), sum("cpu_cfg_fails")), (2, 1));
    Ok(())
}
