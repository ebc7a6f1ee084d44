//! CPU templates: changes of what a guest sees of its CPU, custom ones or the named ones of [`named()`], which are data
//! of the same kind. Applied by the control thread while it builds a machine.
//!
//! A template takes features away from the [`baseline`](super::cpuid::baseline); it cannot give a guest what this
//! host's CPU or KVM lacks, and says so before the guest finds out.

mod named;

use kvm_bindings::{Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::VcpuStateError;
use super::cpuid::{Register, Vendor, find, find_mut};
use crate::config::{CpuTemplate, CpuidModifier, MsrModifier};

pub use named::named;

/// A template does not fit this host.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// A named template for the CPUs of another maker.
    #[error(
        "the CPU template {template:?} is for {needed:?} CPUs, and this host's CPU is of vendor {found:?}"
    )]
    Vendor {
        /// Its name.
        template: CpuTemplate,
        /// Whose CPUs it is for.
        needed: Vendor,
        /// Whose CPU this is.
        found: Vendor,
    },
    /// A CPUID leaf that the guest's CPU lacks.
    #[error(
        "the CPU template changes CPUID leaf {leaf:#x}, subleaf {subleaf:#x}, which guests do not have on this host"
    )]
    NoLeaf {
        /// EAX.
        leaf: u32,
        /// ECX.
        subleaf: u32,
    },
    /// Flags that this leaf does not have.
    #[error(
        "the CPU template gives CPUID leaf {leaf:#x}, subleaf {subleaf:#x}, the flags {given}; on this host they are \
         {present}"
    )]
    Flags {
        /// EAX.
        leaf: u32,
        /// ECX.
        subleaf: u32,
        /// What the template says.
        given: u32,
        /// What KVM says.
        present: u32,
    },
    /// Features that the guest's CPU lacks.
    #[error(
        "the CPU template sets the bits {bits:#x} of {register:?} in CPUID leaf {leaf:#x}, subleaf {subleaf:#x}, which \
         stand for features that guests do not have on this host"
    )]
    NoFeature {
        /// EAX.
        leaf: u32,
        /// ECX.
        subleaf: u32,
        /// Where.
        register: Register,
        /// Which.
        bits: u32,
    },
    /// A model specific register that the guest's CPU lacks.
    #[error(
        "the CPU template changes the model specific register {addr:#x}, which guests do not have on this host"
    )]
    NoMsr {
        /// Its number.
        addr: u32,
    },
    /// KVM does not take the value.
    #[error(
        "KVM refuses the value {value:#x} that the CPU template gives the model specific register {addr:#x}"
    )]
    MsrValue {
        /// Its number.
        addr: u32,
        /// The value.
        value: u64,
    },
    /// The guest would leave out mitigations that it needs.
    #[error(
        "the CPU template sets the bits {bits:#x} of the model specific register {ARCH_CAPABILITIES:#x}, and this \
         host's CPU is not immune to what they promise: leave these bits alone, or use a template for this CPU"
    )]
    NotImmune {
        /// The promises.
        bits: u64,
    },
}

/// Changes a machine's CPUID, which must be the baseline.
pub fn apply_to_cpuid(
    modifiers: &[CpuidModifier],
    machine: &mut [kvm_cpuid_entry2],
) -> Result<(), TemplateError> {
    let baseline = machine.to_vec();
    for modifier in modifiers {
        let (leaf, subleaf) = (modifier.leaf, modifier.subleaf);
        let places = (find_mut(machine, leaf, subleaf), find(&baseline, leaf, subleaf));
        let (Some(entry), Some(before)) = places else {
            return Err(TemplateError::NoLeaf { leaf, subleaf });
        };
        if entry.flags != modifier.flags {
            return Err(TemplateError::Flags {
                leaf,
                subleaf,
                given: modifier.flags,
                present: entry.flags,
            });
        }
        for change in &modifier.modifiers {
            let register = change.register;
            let place = register.of_mut(entry);
            *place = change.bitmap.apply(*place);
            let bits = *place & !register.of(before) & feature_bits(leaf, subleaf, register);
            if bits != 0 {
                return Err(TemplateError::NoFeature {
                    leaf,
                    subleaf,
                    register,
                    bits,
                });
            }
        }
    }
    Ok(())
}

/// The bits of a register that each stand for a feature, so that none can be had by setting it; without those that
/// follow the state of a vCPU or the topology of the machine.
fn feature_bits(leaf: u32, subleaf: u32, register: Register) -> u32 {
    use Register::{Eax, Ebx, Ecx, Edx};
    const OSXSAVE: u32 = 1 << 27;
    const HTT: u32 = 1 << 28;
    const OSPKE: u32 = 1 << 4;
    const CMP_LEGACY: u32 = 1 << 1;
    const TOPOEXT: u32 = 1 << 22;
    match (leaf, subleaf, register) {
        (0x1, _, Ecx) => !OSXSAVE,
        (0x1, _, Edx) => !HTT,
        (0x7, 0, Ecx) => !OSPKE,
        (0x7, 0, Ebx | Edx) | (0x7, 1 | 2, _) => u32::MAX,
        (0xd, 0, Eax | Edx) | (0xd, 1, Eax | Ecx | Edx) => u32::MAX,
        (0x4000_0001, _, Eax) => u32::MAX,
        (0x8000_0001, _, Ecx) => !(CMP_LEGACY | TOPOEXT),
        (0x8000_0001, _, Edx) | (0x8000_0007, _, Edx) => u32::MAX,
        (0x8000_0008, _, Ebx) | (0x8000_0021, _, Eax) => u32::MAX,
        _ => 0,
    }
}

/// What the CPU is immune to, and how it is not; Intel's IA32_ARCH_CAPABILITIES.
const ARCH_CAPABILITIES: u32 = 0x10a;
/// The bits of it that tell of a weakness, so that setting one is safe: RSBA and RRSBA.
const WEAKNESSES: u64 = 1 << 2 | 1 << 19;

/// Changes the registers of a vCPU, whose CPUID must be set before.
pub fn apply_to_msrs(modifiers: &[MsrModifier], vcpu: &VcpuFd) -> Result<(), VcpuStateError> {
    for modifier in modifiers {
        let addr = modifier.addr;
        let mut msrs = one(addr, 0);
        let read = vcpu
            .get_msrs(&mut msrs)
            .map_err(VcpuStateError::kvm("read a model specific register"))?;
        let old = msrs.as_slice().first().filter(|_| read == 1).map(|msr| msr.data);
        let value = new_value(modifier, old)?;
        let set = vcpu
            .set_msrs(&one(addr, value))
            .map_err(VcpuStateError::kvm("set a model specific register"))?;
        if set != 1 {
            return Err(TemplateError::MsrValue { addr, value }.into());
        }
    }
    Ok(())
}

/// What a register is to hold, that holds `old`; `None` stands for a register that is not there.
fn new_value(modifier: &MsrModifier, old: Option<u64>) -> Result<u64, TemplateError> {
    let addr = modifier.addr;
    let old = old.ok_or(TemplateError::NoMsr { addr })?;
    let value = modifier.bitmap.apply(old);
    let bits = value & !old & !WEAKNESSES;
    if addr == ARCH_CAPABILITIES && bits != 0 {
        return Err(TemplateError::NotImmune { bits });
    }
    Ok(value)
}

/// A list with one register.
fn one(index: u32, data: u64) -> Msrs {
    let entry = kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    Msrs::from_entries(&[entry]).expect("one")
}

#[cfg(test)]
mod tests;
