//! Threads, cores and the package: the leaves that number a vCPU among the others, and those that say who shares a cache.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::{Vendor, find, find_mut};

/// Leaf 1, EDX: the package has several logical processors.
const HTT: u32 = 1 << 28;
/// Leaf 0x8000_0001, ECX: the same, as AMD says it.
const CMP_LEGACY: u32 = 1 << 1;
/// Leaf 0x8000_0001, ECX: there is [`AMD_TOPOLOGY`].
const TOPOEXT: u32 = 1 << 22;
/// AMD's leaf of thread and core numbers.
const AMD_TOPOLOGY: u32 = 0x8000_001e;
/// Extended topology leaves, which are made anew.
const EXTENDED: [u32; 2] = [0xb, 0x1f];

/// The guest's processors: one package.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// vCPUs in all.
    pub vcpus: u8,
    /// vCPUs that share a core: 1 or 2.
    pub threads_per_core: u8,
}

impl Topology {
    /// The processors of a machine, whose vCPUs share cores in pairs with `smt`.
    pub fn new(vcpus: u8, smt: bool) -> Self {
        let threads_per_core = if smt && vcpus > 1 { 2 } else { 1 };
        Self {
            vcpus,
            threads_per_core,
        }
    }

    /// Writes the numbers of the vCPU with APIC id `id` into every leaf that has them.
    pub(super) fn apply(self, entries: &mut Vec<kvm_cpuid_entry2>, id: u8) {
        entries.retain(|entry| !EXTENDED.contains(&entry.function));
        if self.threads_per_core > 1 && Vendor::of(entries) == Vendor::Amd {
            number_amd_threads(entries);
        }
        entries.iter_mut().for_each(|entry| self.adapt(entry, id));
        let last = find(entries, 0, 0).map_or(0, |entry| entry.eax);
        for leaf in EXTENDED.into_iter().filter(|leaf| *leaf <= last) {
            entries.extend(self.extended(leaf, id));
        }
    }

    fn adapt(self, entry: &mut kvm_cpuid_entry2, id: u8) {
        let several = self.vcpus > 1;
        match entry.function {
            0x1 => {
                entry.edx = entry.edx & !HTT | if several { HTT } else { 0 };
                let logical = 1u32 << self.package_bits();
                entry.ebx = entry.ebx & 0xffff | logical << 16 | u32::from(id) << 24;
            }
            0x4 if entry.eax & 0x1f != 0 => {
                entry.eax = self.cache_sharing(entry.eax) | (self.cores() - 1) << 26;
            }
            0x8000_0001 => entry.ecx = entry.ecx & !CMP_LEGACY | if several { CMP_LEGACY } else { 0 },
            0x8000_0008 => {
                let others = u32::from(self.vcpus) - 1;
                entry.ecx = entry.ecx & !0xf0ff | others | self.package_bits() << 12;
            }
            0x8000_001d if entry.eax & 0x1f != 0 => entry.eax = self.cache_sharing(entry.eax),
            AMD_TOPOLOGY => {
                let others = u32::from(self.threads_per_core) - 1;
                entry.eax = u32::from(id);
                entry.ebx = u32::from(id) >> self.thread_bits() | others << 8;
                entry.ecx = 0;
            }
            _ => {}
        }
    }

    /// The first register of a cache leaf, with the count of vCPUs that share the cache: the third level is the
    /// package's, the others are a core's. Bits 26 and up are zero.
    fn cache_sharing(self, eax: u32) -> u32 {
        let level = eax >> 5 & 0x7;
        let bits = if level >= 3 {
            self.package_bits()
        } else {
            self.thread_bits()
        };
        eax & 0x3fff | ((1 << bits) - 1) << 14
    }

    /// Leaf 0xB or 0x1F: threads of a core, then of the package, then nothing (Intel SDM 2A, CPUID).
    fn extended(self, function: u32, id: u8) -> [kvm_cpuid_entry2; 3] {
        const THREAD: u32 = 1;
        const CORE: u32 = 2;
        let level = |index: u32, shift: u32, count: u8, kind: u32| kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: u32::from(count),
            ecx: kind << 8 | index,
            edx: u32::from(id),
            ..Default::default()
        };
        [
            level(0, self.thread_bits(), self.threads_per_core, THREAD),
            level(1, self.package_bits(), self.vcpus, CORE),
            level(2, 0, 0, 0),
        ]
    }

    /// Bits of an APIC id that number the threads of a core.
    fn thread_bits(self) -> u32 {
        bits_for(self.threads_per_core)
    }

    /// Bits of an APIC id that number the threads of the package.
    fn package_bits(self) -> u32 {
        bits_for(self.vcpus)
    }

    fn cores(self) -> u32 {
        u32::from((self.vcpus / self.threads_per_core).max(1))
    }
}

/// AMD guests find threads in one leaf only; they get it even where the host or its KVM has none.
fn number_amd_threads(entries: &mut Vec<kvm_cpuid_entry2>) {
    if let Some(limit) = find_mut(entries, 0x8000_0000, 0) {
        limit.eax = limit.eax.max(AMD_TOPOLOGY);
    }
    if let Some(features) = find_mut(entries, 0x8000_0001, 0) {
        features.ecx |= TOPOEXT;
    }
    if find(entries, AMD_TOPOLOGY, 0).is_none() {
        entries.push(kvm_cpuid_entry2 {
            function: AMD_TOPOLOGY,
            ..Default::default()
        });
    }
}

/// Bits that number `count` things.
fn bits_for(count: u8) -> u32 {
    u32::from(count.max(1)).next_power_of_two().trailing_zeros()
}
