//! What templates make of the CPU that a guest finds.

use std::collections::BTreeSet;

use mayfly_tests::{Guest, Result, TestVm, Vm};
use serde_json::{Value, json};

/// The flags of the guest's first processor.
fn flags(guest: &Guest) -> Result<BTreeSet<String>> {
    let line = guest.check("grep -m1 ^flags /proc/cpuinfo")?;
    Ok(line.split(' ').skip(1).map(str::to_owned).collect())
}

/// The value of a line of the first processor in `/proc/cpuinfo`.
fn cpuinfo(guest: &Guest, key: &str) -> Result<String> {
    guest.check(&format!("sed -n 's/^{key}\\t*: //p' /proc/cpuinfo | head -n1"))
}

fn booted(name: &str, cpu_config: Value) -> Result<Vm> {
    TestVm::new(name).section("cpu-config", cpu_config).boot()
}

/// Changes of one register.
fn modifier(leaf: &str, flags: u32, register: &str, bitmap: &str) -> Value {
    json!({"leaf": leaf, "subleaf": "0x0", "flags": flags,
        "modifiers": [{"register": register, "bitmap": bitmap}]})
}

#[test]
fn a_custom_template_takes_flags_away_and_nothing_else() -> Result {
    let vm = TestVm::new("plain").boot()?;
    let plain = flags(&vm.guest())?;
    drop(vm);
    let template = json!({"cpuid_modifiers": [
        // SSE4.2 and POPCNT; then BMI1 and BMI2.
        modifier("0x1", 0, "ecx", "0b0xx_0xxxx_xxxx_xxxx_xxxx_xxxx"),
        modifier("0x7", 1, "ebx", "0b0_xxxx_0xxx"),
    ]});
    let vm = booted("custom", template)?;
    let hidden: BTreeSet<_> = ["sse4_2", "popcnt", "bmi1", "bmi2"].map(str::to_owned).into();
    assert!(hidden.is_subset(&plain), "{plain:?}");
    assert_eq!(flags(&vm.guest())?, &plain - &hidden);
    Ok(())
}

#[test]
fn every_vcpu_has_the_template_and_its_own_number() -> Result {
    let template = json!({"cpuid_modifiers": [modifier("0x1", 0, "ecx", "0b0xxx_xxxx_xxxx_xxxx_xxxx_xxxx")]});
    let vm = TestVm::new("custom-2")
        .vcpus(2)
        .section("cpu-config", template)
        .boot()?;
    let guest = vm.guest();
    assert_eq!(guest.run("grep -c ' popcnt' /proc/cpuinfo")?.stdout.trim(), "0");
    let ids = guest.check("sed -n 's/^initial apicid.*: //p' /proc/cpuinfo")?;
    assert_eq!(ids, "0\n1");
    Ok(())
}

/// The template for CPUs of this host's maker, and the family, model and name of the CPU that it shows.
fn native_template() -> Result<(&'static str, [&'static str; 3])> {
    let host = std::fs::read_to_string("/proc/cpuinfo")?;
    Ok(if host.contains("AuthenticAMD") {
        ("T2A", ["25", "1", "AMD EPYC"])
    } else {
        ("T2", ["6", "63", "Intel(R) Xeon(R) Processor"])
    })
}

#[test]
fn a_named_template_shows_the_same_cpu_on_every_host() -> Result {
    let (name, cpu) = native_template()?;
    let vm = TestVm::new("named")
        .vcpus(2)
        .machine("cpu_template", json!(name))
        .boot()?;
    let guest = vm.guest();
    let shown = ["cpu family", "model", "model name"].map(|key| cpuinfo(&guest, key));
    for (shown, expected) in shown.into_iter().zip(cpu) {
        assert_eq!(shown?, expected);
    }
    let flags = flags(&guest)?;
    for hidden in [
        "3dnow", "avx512f", "mmxext", "ospke", "rdpid", "sha_ni", "sse4a", "vaes",
    ] {
        assert!(!flags.contains(hidden), "{hidden} in {flags:?}");
    }
    for kept in ["aes", "bmi2", "cx16", "fsgsbase", "popcnt", "sse4_2", "x2apic"] {
        assert!(flags.contains(kept), "{kept} not in {flags:?}");
    }
    Ok(())
}
