use std::collections::BTreeSet;

use super::*;
use crate::x86_64::template::apply_to_cpuid;

const NAMES: [CpuTemplate; 5] = [
    CpuTemplate::C3,
    CpuTemplate::T2,
    CpuTemplate::T2S,
    CpuTemplate::T2CL,
    CpuTemplate::T2A,
];

/// A host that has every feature in every leaf that a table could name.
fn host(vendor: &[u8; 12]) -> Vec<kvm_cpuid_entry2> {
    let word = |at: usize| u32::from_le_bytes(vendor[at..at + 4].try_into().unwrap());
    let basic = (1..=0x1f).map(|function| (function, 0));
    let state = (1..=18).map(|index| (0xd, index));
    let extended = (0x8000_0000..=0x8000_0021).map(|function| (function, 0));
    let all = basic.chain([(7, 1), (7, 2)]).chain(state).chain(extended);
    let full = all.map(|(function, index)| kvm_cpuid_entry2 {
        function,
        index,
        eax: u32::MAX,
        ebx: u32::MAX,
        ecx: u32::MAX,
        edx: u32::MAX,
        ..Default::default()
    });
    let first = kvm_cpuid_entry2 {
        eax: 0x1f,
        ebx: word(0),
        edx: word(4),
        ecx: word(8),
        ..Default::default()
    };
    std::iter::once(first).chain(full).collect()
}

fn host_for(template: CpuTemplate) -> Vec<kvm_cpuid_entry2> {
    host(match template {
        CpuTemplate::T2A => b"AuthenticAMD",
        _ => b"GenuineIntel",
    })
}

fn guest(template: CpuTemplate) -> Vec<kvm_cpuid_entry2> {
    let mut machine = host_for(template);
    let changes = named(template, &machine).unwrap();
    apply_to_cpuid(&changes.cpuid_modifiers, &mut machine).unwrap();
    machine
}

fn register(template: CpuTemplate, leaf: u32, subleaf: u32, register: Register) -> u32 {
    register.of(find(&guest(template), leaf, subleaf).unwrap())
}

#[test]
fn no_table_changes_a_register_twice() {
    for template in NAMES {
        let changes = named(template, &host_for(template)).unwrap().cpuid_modifiers;
        let places: BTreeSet<_> = changes
            .iter()
            .map(|change| (change.leaf, change.subleaf, change.modifiers[0].register as u8))
            .collect();
        assert_eq!(places.len(), changes.len(), "{template:?}");
    }
}

#[test]
fn no_guest_sees_wide_vectors_or_new_state() {
    const AVX512: u32 = mask(&[16, 17, 21, 26, 27, 28, 30, 31]);
    for template in NAMES {
        assert_eq!(register(template, 0x7, 0, Ebx) & AVX512, 0, "{template:?}");
        assert_eq!(register(template, 0xd, 0, Eax), 7, "{template:?}");
        assert_eq!(register(template, 0xd, 9, Ebx), 0, "{template:?}");
    }
}

#[test]
fn each_generation_has_its_vector_instructions() {
    let avx2 = NAMES.map(|template| register(template, 0x7, 0, Ebx) >> 5 & 1);
    assert_eq!(avx2, [0, 1, 1, 1, 1]);
    let fma = NAMES.map(|template| register(template, 0x1, 0, Ecx) >> 12 & 1);
    assert_eq!(fma, [0, 1, 1, 1, 1]);
    let adx = NAMES.map(|template| register(template, 0x7, 0, Ebx) >> 19 & 1);
    assert_eq!(adx, [0, 0, 0, 1, 1]);
}

#[test]
fn cascade_lake_and_milan_offer_programs_the_same() {
    for (leaf, place) in [(0x1, Ecx), (0x7, Ebx), (0x7, Ecx), (0x7, Edx)] {
        let shared = |template| register(template, leaf, 0, place) & !(1 << 29 | 1 << 10);
        assert_eq!(
            shared(CpuTemplate::T2CL),
            shared(CpuTemplate::T2A),
            "{leaf:#x} {place:?}"
        );
    }
}

#[test]
fn only_the_templates_that_set_arch_capabilities_show_it() {
    let shown = NAMES.map(|template| register(template, 0x7, 0, Edx) >> 29 & 1 == 1);
    let set = NAMES.map(|template| {
        let changes = named(template, &host_for(template)).unwrap();
        !changes.msr_modifiers.is_empty()
    });
    assert_eq!(shown, [false, false, true, true, false]);
    assert_eq!(set, shown);
}

#[test]
fn the_guest_reads_one_model_and_one_name() {
    assert_eq!(register(CpuTemplate::T2, 1, 0, Eax), 0x306f2);
    assert_eq!(register(CpuTemplate::T2A, 0x8000_0001, 0, Eax), 0x00a0_0f11);
    let name = [Eax, Ebx, Ecx].map(|place| register(CpuTemplate::T2A, 0x8000_0002, 0, place));
    assert_eq!(name.map(u32::to_le_bytes).as_flattened(), b"AMD EPYC\0\0\0\0");
}

#[test]
fn refuses_the_cpu_of_another_maker() {
    for (template, vendor) in [
        (CpuTemplate::T2, b"AuthenticAMD"),
        (CpuTemplate::C3, b"AuthenticAMD"),
        (CpuTemplate::T2A, b"GenuineIntel"),
        (CpuTemplate::T2A, b"CentaurHauls"),
    ] {
        assert!(matches!(
            named(template, &host(vendor)),
            Err(TemplateError::Vendor { .. })
        ));
    }
}

#[test]
fn none_changes_nothing() {
    assert_eq!(named(CpuTemplate::None, &[]).unwrap(), CpuConfig::default());
}
