//! The CPU that the guest sees: what KVM supports on this host, with the guest's own topology, without nested
//! virtualization. Pure functions over CPUID entries.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// The guest's processors: one package.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// vCPUs in all.
    pub vcpus: u8,
    /// vCPUs that share a core: 1 or 2.
    pub threads_per_core: u8,
}

impl Topology {
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

/// Bits that number `count` things.
fn bits_for(count: u8) -> u32 {
    u32::from(count.max(1)).next_power_of_two().trailing_zeros()
}

/// Leaf 1, ECX.
mod feature {
    pub(super) const MONITOR: u32 = 1 << 3;
    pub(super) const VMX: u32 = 1 << 5;
    pub(super) const TSC_DEADLINE: u32 = 1 << 24;
    pub(super) const HYPERVISOR: u32 = 1 << 31;
    /// Leaf 1, EDX: the package has several logical processors.
    pub(super) const HTT: u32 = 1 << 28;
    /// Leaf 0x8000_0001, ECX.
    pub(super) const CMP_LEGACY: u32 = 1 << 1;
    pub(super) const SVM: u32 = 1 << 2;
    /// Leaf 0x8000_001E numbers threads and cores.
    pub(super) const TOPOEXT: u32 = 1 << 22;
}

/// The CPUID of the vCPU with APIC id `id`, made from what KVM supports.
pub fn build(supported: &CpuId, id: u8, topology: Topology, tsc_deadline: bool) -> CpuId {
    let mut entries: Vec<_> = supported
        .as_slice()
        .iter()
        .filter(|entry| !is_replaced(entry))
        .copied()
        .collect();
    if has_amd_topology(&entries) && !entries.iter().any(|entry| entry.function == AMD_TOPOLOGY) {
        entries.push(kvm_cpuid_entry2 {
            function: AMD_TOPOLOGY,
            ..Default::default()
        });
    }
    let amd = entries.iter().any(|entry| entry.function == AMD_TOPOLOGY);
    for entry in &mut entries {
        adapt(entry, id, topology, tsc_deadline);
        if entry.function == 0x8000_0001 && amd {
            entry.ecx |= feature::TOPOEXT;
        }
    }
    let max_leaf = entries
        .iter()
        .find(|entry| entry.function == 0)
        .map_or(0, |entry| entry.eax);
    for leaf in [0xb, 0x1f] {
        if leaf <= max_leaf {
            entries.extend(extended_topology(leaf, id, topology));
        }
    }
    CpuId::from_entries(&entries).expect("fewer entries than KVM's own limit plus six")
}

/// AMD processors number threads and cores here; where the host does not, the guest can all the same.
const AMD_TOPOLOGY: u32 = 0x8000_001e;

/// Whether this is an AMD processor whose extended leaves reach [`AMD_TOPOLOGY`].
fn has_amd_topology(entries: &[kvm_cpuid_entry2]) -> bool {
    const AUTHENTIC_AMD: u32 = u32::from_le_bytes(*b"Auth");
    let find = |function| entries.iter().find(|entry| entry.function == function);
    find(0).is_some_and(|leaf| leaf.ebx == AUTHENTIC_AMD)
        && find(0x8000_0000).is_some_and(|leaf| leaf.eax >= AMD_TOPOLOGY)
}

/// Leaves that are left out, or written anew: extended topology, and SVM's.
fn is_replaced(entry: &kvm_cpuid_entry2) -> bool {
    matches!(entry.function, 0xb | 0x1f | 0x8000_000a)
}

fn adapt(entry: &mut kvm_cpuid_entry2, id: u8, topology: Topology, tsc_deadline: bool) {
    let several = topology.vcpus > 1;
    match entry.function {
        0x1 => {
            entry.ecx &= !(feature::VMX | feature::MONITOR | feature::TSC_DEADLINE);
            entry.ecx |= feature::HYPERVISOR | if tsc_deadline { feature::TSC_DEADLINE } else { 0 };
            entry.edx = entry.edx & !feature::HTT | if several { feature::HTT } else { 0 };
            let logical = 1u32 << topology.package_bits();
            entry.ebx = entry.ebx & 0xffff | logical << 16 | u32::from(id) << 24;
        }
        0x4 if entry.eax & 0x1f != 0 => {
            entry.eax = cache_sharing(entry.eax, topology) | (topology.cores() - 1) << 26;
        }
        // The performance monitoring unit is the host's.
        0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_0001 => {
            entry.ecx &= !(feature::SVM | feature::CMP_LEGACY);
            entry.ecx |= if several { feature::CMP_LEGACY } else { 0 };
        }
        0x8000_0008 => {
            let cores = u32::from(topology.vcpus) - 1;
            entry.ecx = entry.ecx & !0xf0ff | cores | topology.package_bits() << 12;
        }
        0x8000_001d if entry.eax & 0x1f != 0 => entry.eax = cache_sharing(entry.eax, topology),
        AMD_TOPOLOGY => {
            let threads = u32::from(topology.threads_per_core) - 1;
            entry.eax = u32::from(id);
            entry.ebx = u32::from(id) >> topology.thread_bits() | threads << 8;
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// The first register of a cache leaf, with the count of vCPUs that share the cache: the third level is the package's,
/// the others are a core's. Bits 26 and up are zero.
fn cache_sharing(eax: u32, topology: Topology) -> u32 {
    let level = eax >> 5 & 0x7;
    let bits = if level >= 3 {
        topology.package_bits()
    } else {
        topology.thread_bits()
    };
    eax & 0x3fff | ((1 << bits) - 1) << 14
}

/// Leaf 0xB or 0x1F: threads of a core, then of the package, then nothing (Intel SDM 2A, CPUID).
fn extended_topology(function: u32, id: u8, topology: Topology) -> [kvm_cpuid_entry2; 3] {
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
        level(0, topology.thread_bits(), topology.threads_per_core, THREAD),
        level(1, topology.package_bits(), topology.vcpus, CORE),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    const FOUR: Topology = Topology {
        vcpus: 4,
        threads_per_core: 2,
    };

    fn leaf(function: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn built(
        entries: &[kvm_cpuid_entry2],
        id: u8,
        topology: Topology,
        deadline: bool,
    ) -> Vec<kvm_cpuid_entry2> {
        build(&CpuId::from_entries(entries).unwrap(), id, topology, deadline)
            .as_slice()
            .to_vec()
    }

    #[test]
    fn leaks_no_nested_virtualization() {
        let host = [
            leaf(1, [0, 0, u32::MAX, 0]),
            leaf(0x8000_0001, [0, 0, u32::MAX, 0]),
            leaf(0x8000_000a, [1; 4]),
        ];
        let guest = built(&host, 0, FOUR, true);
        assert_eq!(guest.len(), 2);
        assert_eq!((guest[0].ecx & (1 << 5), guest[1].ecx & (1 << 2)), (0, 0));
    }

    #[test]
    fn shows_a_hypervisor_and_the_deadline_timer_that_kvm_has() {
        assert_eq!(built(&[leaf(1, [0; 4])], 0, FOUR, true)[0].ecx, 1 << 31 | 1 << 24);
        assert_eq!(
            built(&[leaf(1, [0, 0, 1 << 24, 0])], 0, FOUR, false)[0].ecx,
            1 << 31
        );
    }

    #[test]
    fn numbers_the_vcpu_in_every_topology_leaf() {
        let host = [
            leaf(0, [0x1f, 0, 0, 0]),
            leaf(1, [0; 4]),
            leaf(0x8000_001e, [0; 4]),
        ];
        let guest = built(&host, 3, FOUR, true);
        assert_eq!(guest[1].ebx, 3 << 24 | 4 << 16);
        assert_eq!((guest[2].eax, guest[2].ebx), (3, 1 | 1 << 8));
        let extended: Vec<_> = guest[3..]
            .iter()
            .map(|e| (e.function, e.eax, e.ebx, e.ecx, e.edx))
            .collect();
        assert_eq!(
            extended,
            [
                (0xb, 1, 2, 0x100, 3),
                (0xb, 2, 4, 0x201, 3),
                (0xb, 0, 0, 2, 3),
                (0x1f, 1, 2, 0x100, 3),
                (0x1f, 2, 4, 0x201, 3),
                (0x1f, 0, 0, 2, 3)
            ]
        );
    }

    #[test]
    fn an_amd_guest_knows_its_threads_even_where_the_host_does_not_tell() {
        let vendor = u32::from_le_bytes(*b"Auth");
        let host = [
            leaf(0, [1, vendor, 0, 0]),
            leaf(0x8000_0000, [0x8000_001f, 0, 0, 0]),
            leaf(0x8000_0001, [0; 4]),
        ];
        let guest = built(&host, 3, FOUR, true);
        assert_eq!(guest[2].ecx & (1 << 22), 1 << 22);
        assert_eq!(
            (guest[3].function, guest[3].eax, guest[3].ebx),
            (0x8000_001e, 3, 1 | 1 << 8)
        );
    }

    #[test]
    fn a_single_vcpu_is_no_multiprocessor() {
        let one = Topology {
            vcpus: 1,
            threads_per_core: 1,
        };
        let guest = built(
            &[leaf(1, [0, 0, 0, u32::MAX]), leaf(0x8000_0008, [0, 0, 0xffff, 0])],
            0,
            one,
            true,
        );
        assert_eq!((guest[0].edx & (1 << 28), guest[0].ebx >> 16), (0, 1));
        assert_eq!(guest[1].ecx & 0xf0ff, 0);
    }

    #[test]
    fn leaves_out_extended_topology_that_the_host_does_not_have() {
        assert_eq!(built(&[leaf(0, [0xa, 0, 0, 0])], 0, FOUR, true).len(), 1);
    }

    #[test]
    fn shares_the_third_cache_among_all() {
        let guest = built(
            &[leaf(4, [1 | 1 << 5, 0, 0, 0]), leaf(4, [3 | 3 << 5, 0, 0, 0])],
            0,
            FOUR,
            true,
        );
        assert_eq!((guest[0].eax >> 14 & 0xfff, guest[1].eax >> 14 & 0xfff), (1, 3));
        assert_eq!(guest[0].eax >> 26, 1);
    }

    #[test]
    fn hides_the_performance_monitoring_unit() {
        assert_eq!(built(&[leaf(0xa, [7; 4])], 0, FOUR, true)[0].eax, 0);
    }
}
