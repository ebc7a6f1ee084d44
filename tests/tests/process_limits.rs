//! Rate limiters over the API, and changes of them on a running machine whose guest is a few instructions.

use std::time::Instant;

use mayfly_tests::{Drive, HOST_TIMEOUT, MonitorBuilder, Net, Result, Scratch, TestVm, TinyKernel, Vm};
use serde_json::{Value, json};

/// A running machine with a limited drive `data`, a limited card `net0`, and the entropy device.
struct Machine {
    vm: Vm,
    image: String,
    _scratch: Scratch,
}

fn bucket(size: u64) -> Value {
    json!({"size": size, "one_time_burst": null, "refill_time": 100})
}

fn start(name: &str, tap: &str) -> Result<Machine> {
    let scratch = Scratch::new(name)?;
    let kernel = TinyKernel::new().print("up\n").halt().write(&scratch)?;
    let image = scratch.file("image", [0; 4096])?;
    let limits = json!({"bandwidth": bucket(1), "ops": bucket(2)});
    let vm = TestVm::new(name)
        .kernel(kernel)
        .drive(Drive::new("data", &image).with("rate_limiter", limits.clone()))
        .net(Net::on("net0", tap).with("tx_rate_limiter", limits))
        .section("entropy", json!({"rate_limiter": {"ops": bucket(3)}}))
        .start()?;
    assert!(vm.console().wait_for("up\n", Instant::now() + HOST_TIMEOUT));
    Ok(Machine {
        vm,
        image: image.display().to_string(),
        _scratch: scratch,
    })
}

impl Machine {
    fn drive(&self) -> Result<Value> {
        Ok(self.vm.get("/vm/config")?.json()?["drives"][0].clone())
    }

    fn net(&self) -> Result<Value> {
        Ok(self.vm.get("/vm/config")?.json()?["network-interfaces"][0].clone())
    }
}

#[test]
fn the_config_shows_what_takes_effect() -> Result {
    let monitor = MonitorBuilder::new("limits")?.start()?;
    let put = |limits: &str| {
        let body = format!(r#"{{"rate_limiter":{limits}}}"#);
        monitor.request("PUT", "/entropy", &body)?.success()?;
        let body = monitor.get("/vm/config")?.body;
        let start = body.find(r#""entropy":"#).unwrap_or_default();
        let end = body.find(r#","pmem""#).unwrap_or(body.len());
        Ok::<_, mayfly_tests::Failure>(body[start..end].to_owned())
    };
    let limited = put(
        r#"{"ops":{"size":5,"one_time_burst":7,"refill_time":9},"bandwidth":{"size":0,"refill_time":9}}"#,
    )?;
    let ops = r#"{"size":5,"one_time_burst":7,"refill_time":9}"#;
    assert_eq!(
        limited,
        format!(r#""entropy":{{"rate_limiter":{{"bandwidth":null,"ops":{ops}}}}}"#)
    );
    let disabled = put(r#"{"ops":{"size":5,"refill_time":0}}"#)?;
    assert_eq!(disabled, r#""entropy":{"rate_limiter":null}"#);
    Ok(())
}

#[test]
fn a_bucket_that_is_none_is_refused_with_the_reason() -> Result {
    let monitor = MonitorBuilder::new("limits")?.start()?;
    let refused = |bucket: &str, reason: &str| {
        let body = format!(r#"{{"rate_limiter":{{"ops":{bucket}}}}}"#);
        monitor
            .request("PUT", "/entropy", &body)
            .map(|answer| answer.assert_refused(&[reason]))
    };
    refused(r#"{"size":5}"#, "missing field `refill_time`")?;
    refused(r#"{"refill_time":5}"#, "missing field `size`")?;
    refused(
        r#"{"size":-5,"refill_time":5}"#,
        "invalid value: integer `-5`, expected u64",
    )?;
    refused(r#"{"size":"5","refill_time":5}"#, "expected u64")?;
    assert_eq!(monitor.get("/vm/config")?.json()?["entropy"], Value::Null);
    Ok(())
}

#[test]
fn a_patch_changes_the_buckets_it_names() -> Result {
    let machine = start("limits-patch", "mflimit0")?;
    let patch = json!({"drive_id": "data", "rate_limiter": {"ops": bucket(9)}});
    machine.vm.patch("/drives/data", &patch)?.success()?;
    assert_eq!(
        machine.drive()?["rate_limiter"],
        json!({"bandwidth": bucket(1), "ops": bucket(9)})
    );
    let off = json!({"drive_id": "data", "rate_limiter": {"bandwidth": {"size": 0, "refill_time": 1}}});
    machine.vm.patch("/drives/data", &off)?.success()?;
    assert_eq!(
        machine.drive()?["rate_limiter"],
        json!({"bandwidth": null, "ops": bucket(9)})
    );

    let card = json!({"iface_id": "net0", "rx_rate_limiter": {"bandwidth": bucket(5)},
        "tx_rate_limiter": {"bandwidth": bucket(0), "ops": bucket(0)}});
    machine.vm.patch("/network-interfaces/net0", &card)?.success()?;
    let net = machine.net()?;
    assert_eq!(
        net["rx_rate_limiter"],
        json!({"bandwidth": bucket(5), "ops": null})
    );
    assert_eq!(net["tx_rate_limiter"], Value::Null);
    assert_eq!(machine.vm.counted("patch_api_requests", "network_count")?, 1);
    assert_eq!(machine.vm.counted("patch_api_requests", "network_fails")?, 0);
    Ok(())
}

#[test]
fn a_patch_with_a_bad_part_changes_nothing() -> Result {
    let machine = start("limits-bad", "mflimit1")?;
    let before = machine.vm.get("/vm/config")?;
    let image =
        json!({"drive_id": "data", "path_on_host": "/nonexistent/disk", "rate_limiter": {"ops": bucket(9)}});
    let net =
        |rx: Value| json!({"iface_id": "net0", "tx_rate_limiter": {"ops": bucket(9)}, "rx_rate_limiter": rx});
    let card = "/network-interfaces/net0";
    let vm = &machine.vm;
    vm.patch("/drives/data", &image)?
        .assert_refused(&["/nonexistent/disk"]);
    vm.patch(card, &net(json!({"ops": {"size": 1}})))?
        .assert_refused(&["missing field `refill_time`"]);
    vm.patch(card, &net(json!({"nope": null})))?
        .assert_refused(&["unknown field `nope`"]);
    vm.patch(card, &json!({"iface_id": "other"}))?
        .assert_refused(&["The id from the path [net0] does not match the id from the body [other]!"]);
    assert_eq!(vm.get("/vm/config")?, before);
    assert_eq!(vm.counted("patch_api_requests", "network_fails")?, 3);

    let good = json!({"drive_id": "data", "path_on_host": machine.image, "rate_limiter": {"ops": bucket(9)}});
    vm.patch("/drives/data", &good)?.success()?;
    assert_eq!(machine.drive()?["rate_limiter"]["ops"], bucket(9));
    Ok(())
}

#[test]
fn a_patch_of_a_card_needs_the_card_and_a_running_machine() -> Result {
    let body = |id: &str| json!({"iface_id": id, "rx_rate_limiter": {"ops": bucket(9)}});
    let monitor = MonitorBuilder::new("limits")?.start()?;
    monitor
        .patch("/network-interfaces/net0", &body("net0"))?
        .assert_refused(&["The requested operation is not supported before starting the microVM."]);

    let machine = start("limits-none", "mflimit2")?;
    let refusal = ["Network config error: Unable to update the net device", "nope"];
    machine
        .vm
        .patch("/network-interfaces/nope", &body("nope"))?
        .assert_refused(&refusal);
    machine
        .vm
        .patch("/network-interfaces/net0", &json!({"iface_id": "net0"}))?
        .success()?;
    Ok(())
}

#[test]
fn the_console_drops_what_is_beyond_its_limit_and_the_guest_goes_on() -> Result {
    let scratch = Scratch::new("console")?;
    let kernel = TinyKernel::new()
        .print("0123456789dropped")
        .reset()
        .write(&scratch)?;
    let console = scratch.join("console");
    let hourly = json!({"size": 10, "refill_time": 3_600_000});
    let serial = json!({"serial_out_path": console, "rate_limiter": hourly});
    let vm = TestVm::new("console")
        .kernel(kernel)
        .section("serial", serial)
        .start()?;
    assert_eq!(vm.wait_exit()?, 0);
    assert_eq!(std::fs::read_to_string(&console)?, "0123456789");
    let uart = &vm.metrics()?[0]["uart"];
    assert_eq!(
        (&uart["write_count"], &uart["rate_limiter_dropped_bytes"]),
        (&json!(10), &json!(7))
    );
    Ok(())
}
