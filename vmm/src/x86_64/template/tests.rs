use super::*;
use crate::config::{Bitmap, CpuidModifier, RegisterModifier};

fn modifier(leaf: u32, subleaf: u32, register: Register, bitmap: (u32, u32)) -> CpuidModifier {
    let (mask, value) = bitmap;
    CpuidModifier {
        leaf,
        subleaf,
        flags: 0,
        modifiers: vec![RegisterModifier {
            register,
            bitmap: Bitmap { mask, value },
        }],
    }
}

fn machine() -> Vec<kvm_cpuid_entry2> {
    let leaf = |function, ecx| kvm_cpuid_entry2 {
        function,
        ecx,
        eax: 0x1234,
        ..Default::default()
    };
    let indexed = kvm_cpuid_entry2 {
        flags: 1,
        ..leaf(7, 0b1000)
    };
    vec![leaf(1, 0b0110), indexed]
}

fn applied(modifiers: Vec<CpuidModifier>) -> Result<Vec<kvm_cpuid_entry2>, TemplateError> {
    let mut machine = machine();
    apply_to_cpuid(&modifiers, &mut machine).map(|()| machine)
}

#[test]
fn changes_the_bits_of_the_bitmap_and_no_others() {
    let changed = applied(vec![
        modifier(1, 0, Register::Ecx, (0b0010, 0)),
        modifier(1, 0, Register::Eax, (0xff, 0x56)),
    ])
    .unwrap();
    assert_eq!((changed[0].ecx, changed[0].eax), (0b0100, 0x1256));
    assert_eq!(changed[1], machine()[1]);
}

#[test]
fn a_feature_that_was_taken_away_can_be_given_back() {
    let changed = applied(vec![
        modifier(1, 0, Register::Ecx, (0b0010, 0)),
        modifier(1, 0, Register::Ecx, (0b0010, 0b0010)),
    ]);
    assert_eq!(changed.unwrap(), machine());
}

#[test]
fn refuses_a_leaf_that_guests_do_not_have() {
    for (leaf, subleaf) in [(2, 0), (7, 1), (u32::MAX, u32::MAX)] {
        let error = applied(vec![modifier(leaf, subleaf, Register::Eax, (0, 0))]).unwrap_err();
        assert!(matches!(error, TemplateError::NoLeaf { .. }), "{error}");
    }
}

#[test]
fn refuses_flags_that_the_leaf_does_not_have() {
    let message = applied(vec![modifier(7, 0, Register::Ecx, (0, 0))])
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("leaf 0x7") && message.contains("flags 0") && message.ends_with("they are 1"),
        "{message}"
    );
}

#[test]
fn refuses_features_that_guests_do_not_have() {
    let message = applied(vec![modifier(1, 0, Register::Ecx, (0b1110, 0b1110))])
        .unwrap_err()
        .to_string();
    assert!(message.contains("bits 0x8 of Ecx in CPUID leaf 0x1"), "{message}");
}

#[test]
fn bits_that_follow_the_topology_are_nobodys_feature() {
    let changed = applied(vec![modifier(1, 0, Register::Edx, (1 << 28, 1 << 28))]);
    assert_eq!(changed.unwrap()[0].edx, 1 << 28);
}

fn msr(addr: u32, mask: u64, value: u64) -> MsrModifier {
    MsrModifier {
        addr,
        bitmap: Bitmap { mask, value },
    }
}

#[test]
fn a_register_keeps_the_bits_that_the_bitmap_leaves_alone() {
    assert_eq!(
        new_value(&msr(0x1a0, 0xff00, 0x1200), Some(0x3456)).unwrap(),
        0x1256
    );
}

#[test]
fn refuses_a_register_that_guests_do_not_have() {
    assert!(matches!(
        new_value(&msr(0x1234, 0, 0), None),
        Err(TemplateError::NoMsr { addr: 0x1234 })
    ));
}

#[test]
fn a_guest_is_not_told_of_an_immunity_that_the_cpu_lacks() {
    let promised = |value| new_value(&msr(0x10a, u64::MAX, value), Some(0b10_0010));
    assert_eq!(promised(0b10_0000).unwrap(), 0b10_0000);
    assert_eq!(promised(1 << 2 | 1 << 19).unwrap(), 1 << 2 | 1 << 19);
    assert!(matches!(
        promised(0b10_0001),
        Err(TemplateError::NotImmune { bits: 1 })
    ));
}
