//! The CPU that the guest sees: first [`baseline`], what KVM supports here without what is no guest's business; then
//! a template may change it; then [`for_vcpu`] numbers each vCPU. Pure functions over CPUID entries.

mod topology;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use serde::Deserialize;

pub use topology::Topology;

/// A register that the CPUID instruction answers in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the names are the processor's")]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    /// Its value in an entry.
    pub fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Register::Eax => entry.eax,
            Register::Ebx => entry.ebx,
            Register::Ecx => entry.ecx,
            Register::Edx => entry.edx,
        }
    }

    /// Its place in an entry.
    pub fn of_mut(self, entry: &mut kvm_cpuid_entry2) -> &mut u32 {
        match self {
            Register::Eax => &mut entry.eax,
            Register::Ebx => &mut entry.ebx,
            Register::Ecx => &mut entry.ecx,
            Register::Edx => &mut entry.edx,
        }
    }
}

/// Who made a CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the makers'")]
pub enum Vendor {
    Intel,
    Amd,
    Other,
}

impl Vendor {
    /// The maker that leaf 0 names.
    pub fn of(entries: &[kvm_cpuid_entry2]) -> Self {
        let name = find(entries, 0, 0).map(|leaf| [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes));
        match name.as_ref().map(|name| name.as_flattened()) {
            Some(b"GenuineIntel") => Vendor::Intel,
            Some(b"AuthenticAMD") => Vendor::Amd,
            _ => Vendor::Other,
        }
    }
}

/// Leaf 1, ECX.
mod leaf_1_ecx {
    pub(super) const DTES64: u32 = 1 << 2;
    pub(super) const MONITOR: u32 = 1 << 3;
    pub(super) const DS_CPL: u32 = 1 << 4;
    pub(super) const VMX: u32 = 1 << 5;
    pub(super) const SMX: u32 = 1 << 6;
    pub(super) const PDCM: u32 = 1 << 15;
    pub(super) const TSC_DEADLINE: u32 = 1 << 24;
    pub(super) const HYPERVISOR: u32 = 1 << 31;
}

/// Leaf 1, EDX.
mod leaf_1_edx {
    pub(super) const DS: u32 = 1 << 21;
}

/// Leaf 7, subleaf 0, EBX.
mod leaf_7_ebx {
    pub(super) const SGX: u32 = 1 << 2;
    pub(super) const HLE: u32 = 1 << 4;
    pub(super) const RTM: u32 = 1 << 11;
    pub(super) const PROCESSOR_TRACE: u32 = 1 << 25;
}

/// Leaf 7, subleaf 0, ECX.
mod leaf_7_ecx {
    pub(super) const SGX_LAUNCH_CONTROL: u32 = 1 << 30;
}

/// Leaf 7, subleaf 0, EDX.
mod leaf_7_edx {
    pub(super) const SGX_KEYS: u32 = 1 << 1;
    pub(super) const RTM_ALWAYS_ABORT: u32 = 1 << 11;
    pub(super) const TSX_FORCE_ABORT: u32 = 1 << 13;
    pub(super) const TSX_LOAD_TRACKING: u32 = 1 << 16;
    pub(super) const ARCH_LBR: u32 = 1 << 19;
    pub(super) const ARCH_CAPABILITIES: u32 = 1 << 29;
}

/// Leaf 7, subleaf 1, EAX.
mod leaf_7_1_eax {
    pub(super) const ARCH_PERFMON_EXT: u32 = 1 << 8;
}

/// Leaf 0x8000_0001, ECX.
mod extended_ecx {
    pub(super) const SVM: u32 = 1 << 2;
    pub(super) const IBS: u32 = 1 << 10;
    pub(super) const SKINIT: u32 = 1 << 12;
    pub(super) const PERFCTR_CORE: u32 = 1 << 23;
    pub(super) const PERFCTR_NB: u32 = 1 << 24;
    pub(super) const PERFCTR_LLC: u32 = 1 << 28;
}

/// Leaves that no guest has: performance monitoring (0xA, 0x1C, 0x23, 0x8000_001B, 0x8000_0022), SGX (0x12), processor
/// trace (0x14), SVM (0x8000_000A), memory encryption (0x8000_001F), and the host's topology (0x8000_0026).
const NO_LEAVES: [u32; 10] = [
    0xa,
    0x12,
    0x14,
    0x1c,
    0x23,
    0x8000_000a,
    0x8000_001b,
    0x8000_001f,
    0x8000_0022,
    0x8000_0026,
];

/// Features that no guest has: nested virtualization, the performance monitoring and tracing units, which are the
/// host's, enclaves, and transactional memory, which leaks data on many of the CPUs that have it.
fn hide_features(entry: &mut kvm_cpuid_entry2) {
    match (entry.function, entry.index) {
        (0x1, _) => {
            use leaf_1_ecx::{DS_CPL, DTES64, MONITOR, PDCM, SMX, VMX};
            entry.ecx &= !(DTES64 | MONITOR | DS_CPL | VMX | SMX | PDCM);
            entry.edx &= !leaf_1_edx::DS;
        }
        (0x7, 0) => {
            use leaf_7_ebx::{HLE, PROCESSOR_TRACE, RTM, SGX};
            use leaf_7_edx::{ARCH_LBR, RTM_ALWAYS_ABORT, SGX_KEYS, TSX_FORCE_ABORT, TSX_LOAD_TRACKING};
            entry.ebx &= !(SGX | HLE | RTM | PROCESSOR_TRACE);
            entry.ecx &= !leaf_7_ecx::SGX_LAUNCH_CONTROL;
            entry.edx &= !(SGX_KEYS | RTM_ALWAYS_ABORT | TSX_FORCE_ABORT | TSX_LOAD_TRACKING | ARCH_LBR);
        }
        (0x7, 1) => entry.eax &= !leaf_7_1_eax::ARCH_PERFMON_EXT,
        (0x8000_0001, _) => {
            use extended_ecx::{IBS, PERFCTR_CORE, PERFCTR_LLC, PERFCTR_NB, SKINIT, SVM};
            entry.ecx &= !(SVM | IBS | SKINIT | PERFCTR_CORE | PERFCTR_NB | PERFCTR_LLC);
        }
        _ => {}
    }
}

/// The CPU that all guests on this host have when nothing else is asked for.
pub fn baseline(supported: &CpuId, tsc_deadline: bool) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<_> = supported
        .as_slice()
        .iter()
        .filter(|entry| !NO_LEAVES.contains(&entry.function))
        .copied()
        .collect();
    entries.iter_mut().for_each(hide_features);
    if let Some(leaf) = find_mut(&mut entries, 0x1, 0) {
        leaf.ecx &= !leaf_1_ecx::TSC_DEADLINE;
        leaf.ecx |= leaf_1_ecx::HYPERVISOR;
        leaf.ecx |= if tsc_deadline { leaf_1_ecx::TSC_DEADLINE } else { 0 };
    }
    // KVM offers Intel's register on every CPU. No AMD CPU has it, and some systems do not start where one does.
    let amd = Vendor::of(&entries) == Vendor::Amd;
    if let Some(leaf) = find_mut(&mut entries, 0x7, 0).filter(|_| amd) {
        leaf.edx &= !leaf_7_edx::ARCH_CAPABILITIES;
    }
    entries
}

/// The CPUID of the vCPU with APIC id `id`.
pub fn for_vcpu(machine: &[kvm_cpuid_entry2], id: u8, topology: Topology) -> CpuId {
    let announced = |entry: &&kvm_cpuid_entry2| is_announced(machine, entry);
    let mut entries: Vec<_> = machine.iter().filter(announced).copied().collect();
    topology.apply(&mut entries, id);
    CpuId::from_entries(&entries).expect("KVM knows far fewer leaves than the 256 that fit")
}

/// Whether a leaf is within the count that the CPU says it has: a template may have lowered that.
fn is_announced(machine: &[kvm_cpuid_entry2], entry: &kvm_cpuid_entry2) -> bool {
    let last = |leaf| find(machine, leaf, 0).map_or(u32::MAX, |entry| entry.eax);
    match entry.function {
        0x7 => last(0) >= 0x7 && entry.index <= last(0x7),
        0..0x4000_0000 => entry.function <= last(0),
        0x8000_0000..0xc000_0000 => entry.function <= last(0x8000_0000),
        _ => true,
    }
}

/// The entry of a leaf and subleaf.
pub fn find(entries: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32) -> Option<&kvm_cpuid_entry2> {
    entries
        .iter()
        .find(|entry| entry.function == leaf && entry.index == subleaf)
}

/// The entry of a leaf and subleaf, to be changed.
pub fn find_mut(entries: &mut [kvm_cpuid_entry2], leaf: u32, subleaf: u32) -> Option<&mut kvm_cpuid_entry2> {
    entries
        .iter_mut()
        .find(|entry| entry.function == leaf && entry.index == subleaf)
}

#[cfg(test)]
mod tests;
