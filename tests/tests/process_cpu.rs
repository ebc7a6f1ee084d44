//! CPU templates of machines whose guest is a few instructions: what fits this host starts, and what does not is refused
//! with a reason, after which the machine can still be started.

use std::path::Path;

use mayfly_tests::{Monitor, MonitorBuilder, Response, Result, TestVm, TinyKernel, Vm};
use serde_json::{Value, json};

/// A monitor with a kernel to boot.
fn monitor() -> Result<Monitor> {
    monitor_with(&TinyKernel::new().halt())
}

fn monitor_with(kernel: &TinyKernel) -> Result<Monitor> {
    let monitor = MonitorBuilder::new("cpu")?.start()?;
    let path = monitor.dir().join("kernel");
    std::fs::write(&path, kernel.elf())?;
    monitor
        .put("/boot-source", &json!({"kernel_image_path": path}))?
        .success()?;
    Ok(monitor)
}

fn start(monitor: &Monitor) -> Result<Response> {
    monitor.put("/actions", &json!({"action_type": "InstanceStart"}))
}

/// Changes of one register of leaf 0, which every CPU has.
fn leaf_0(register: &str, bitmap: &str) -> Value {
    json!({"cpuid_modifiers": [{"leaf": "0x0", "subleaf": "0x0", "flags": 0,
        "modifiers": [{"register": register, "bitmap": bitmap}]}]})
}

/// A template that is refused at start, each of these words in the reason.
#[track_caller]
fn assert_not_started(monitor: &Monitor, template: &Value, words: &[&str]) -> Result {
    monitor.put("/cpu-config", template)?.success()?;
    let refused = start(monitor)?;
    refused.assert_refused(&["Start microvm error", "CPU template"]);
    refused.assert_refused(words);
    assert_eq!(monitor.get("/")?.json()?["state"], "Not started");
    Ok(())
}

#[test]
fn a_template_that_this_host_cannot_fulfil_is_refused_at_start() -> Result {
    let monitor = monitor()?;
    let modifiers = |leaf: &str, flags: u32, register: &str, bitmap: &str| {
        json!({"cpuid_modifiers": [{"leaf": leaf, "subleaf": "0x0", "flags": flags,
            "modifiers": [{"register": register, "bitmap": bitmap}]}]})
    };
    let missing_leaf = modifiers("0x3fffffff", 0, "eax", "0b1");
    assert_not_started(&monitor, &missing_leaf, &["leaf 0x3fffffff"])?;
    assert_not_started(
        &monitor,
        &modifiers("0x1", 64, "eax", "0bx"),
        &["flags 64", "leaf 0x1"],
    )?;
    // MONITOR is hidden from every guest.
    let hidden = modifiers("0x1", 0, "ecx", "0b1xxx");
    assert_not_started(&monitor, &hidden, &["bits 0x8", "Ecx", "leaf 0x1"])?;
    let msr = json!({"msr_modifiers": [{"addr": "0xdeadbeef", "bitmap": "0b1"}]});
    assert_not_started(&monitor, &msr, &["register 0xdeadbeef"])?;
    let capability = json!({"kvm_capabilities": ["4000000000"]});
    assert_not_started(&monitor, &capability, &["capability 4000000000"])?;
    // The last template counts, and this one changes nothing.
    monitor.put("/cpu-config", &leaf_0("ebx", "0bx"))?.success()?;
    start(&monitor)?.success()?;
    monitor
        .put("/cpu-config", &json!({}))?
        .assert_refused(&["not supported after starting"]);
    Ok(())
}

#[test]
fn a_capability_that_is_waived_is_not_checked() -> Result {
    let monitor = monitor()?;
    // No KVM lacks the first, and the second is one that Mayfly checks and does without here.
    let body = json!({"kvm_capabilities": ["3", "!77"]});
    monitor.put("/cpu-config", &body)?.success()?;
    start(&monitor)?.success()?;
    Ok(())
}

#[test]
fn the_guest_reads_what_a_template_puts_into_a_register() -> Result {
    // IA32_SYSENTER_ESP, which is zero else; 'A' is 0b100_0001.
    let kernel = TinyKernel::new().print_msr(0x175).print_msr(0x176).reset();
    let monitor = monitor_with(&kernel)?;
    let template = json!({"msr_modifiers": [{"addr": "0x175", "bitmap": "0b1xx_xxx1"}]});
    monitor.put("/cpu-config", &template)?.success()?;
    start(&monitor)?.success()?;
    assert_eq!(monitor.wait_exit()?, 0);
    assert_eq!(monitor.console().text(), "A\0");
    Ok(())
}

/// A named template for the CPUs of the maker that did not make this one.
fn foreign_template() -> (&'static str, &'static str) {
    let vendor = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if vendor.contains("AuthenticAMD") {
        ("T2", "is for Intel CPUs")
    } else {
        ("T2A", "is for Amd CPUs")
    }
}

#[test]
fn a_named_template_for_another_maker_is_refused_at_start() -> Result {
    let monitor = monitor()?;
    let (name, reason) = foreign_template();
    monitor
        .patch("/machine-config", &json!({"cpu_template": name}))?
        .success()?;
    start(&monitor)?.assert_refused(&["Start microvm error", name, reason]);
    assert_eq!(monitor.get("/")?.json()?["state"], "Not started");
    monitor
        .patch("/machine-config", &json!({"cpu_template": "None"}))?
        .success()?;
    start(&monitor)?.success()?;
    Ok(())
}

/// A machine from a config file whose kernel says a word and resets.
fn from_file(cpu_config: Value) -> Result<Vm> {
    let scratch = mayfly_tests::Scratch::new("kernel")?;
    let kernel = TinyKernel::new().print("up\n").reset().write(&scratch)?;
    let vm = TestVm::new("file")
        .kernel(kernel)
        .section("cpu-config", cpu_config)
        .config_file()
        .start()?;
    vm.wait_exit()?;
    Ok(vm)
}

#[test]
fn a_config_file_holds_a_template_or_names_a_file_with_one() -> Result {
    let scratch = mayfly_tests::Scratch::new("template")?;
    let template = scratch.file("template.json", leaf_0("ebx", "0bx").to_string())?;
    for source in [leaf_0("ebx", "0bx"), json!(template)] {
        assert_eq!(from_file(source)?.console().text(), "up\n");
    }
    Ok(())
}

#[test]
fn a_template_that_a_config_file_cannot_have_is_named() -> Result {
    let scratch = mayfly_tests::Scratch::new("template")?;
    let broken = scratch.file("broken.json", r#"{"cpuid_modifier":[]}"#)?;
    let kernel = TinyKernel::new().halt().write(&scratch)?;
    for (source, words) in [
        (
            json!("/nonexistent/template"),
            ["/nonexistent/template", "No such file"],
        ),
        (json!(broken), ["broken.json", "unknown field `cpuid_modifier`"]),
        (
            json!({"kvm_capabilities": ["4000000000"]}),
            ["capability", "4000000000"],
        ),
        (json!(7), ["CPU template", "7"]),
    ] {
        let builder = MonitorBuilder::new("config")?;
        let config = TestVm::new("").kernel(&kernel).section("cpu-config", source);
        std::fs::write(builder.dir().join("config.json"), config.config()?.to_string())?;
        let monitor = builder.args(["--config-file", "config.json"]).spawn()?;
        assert_eq!(monitor.wait_exit()?, 1);
        let said = monitor.stderr().text();
        assert!(words.iter().all(|word| said.contains(word)), "{words:?}: {said}");
    }
    Ok(())
}

#[test]
fn checking_a_config_file_reads_the_template_that_it_names() -> Result {
    let scratch = mayfly_tests::Scratch::new("template")?;
    let kernel = TinyKernel::new().halt().write(&scratch)?;
    let good = scratch.file("good.json", leaf_0("ebx", "0bx").to_string())?;
    for (template, code, word) in [
        (good.as_path(), 0, ""),
        (Path::new("/nonexistent"), 1, "section 'cpu-config'"),
    ] {
        let builder = MonitorBuilder::new("check")?.without_api_socket();
        let config = TestVm::new("")
            .kernel(&kernel)
            .section("cpu-config", json!(template));
        std::fs::write(builder.dir().join("config.json"), config.config()?.to_string())?;
        let monitor = builder.args(["--check-config", "config.json"]).spawn()?;
        assert_eq!(monitor.wait_exit()?, code);
        assert!(
            monitor.stderr().text().contains(word),
            "{}",
            monitor.stderr().text()
        );
    }
    Ok(())
}
