use kvm_bindings::{CpuId, kvm_cpuid_entry2};

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

fn subleaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        index,
        ..leaf(function, registers)
    }
}

fn vendor_leaf(last: u32, name: &[u8; 12]) -> kvm_cpuid_entry2 {
    let word = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
    leaf(0, [last, word(0), word(8), word(4)])
}

fn baseline_of(host: &[kvm_cpuid_entry2], deadline: bool) -> Vec<kvm_cpuid_entry2> {
    baseline(&CpuId::from_entries(host).unwrap(), deadline)
}

fn vcpu(machine: &[kvm_cpuid_entry2], id: u8, topology: Topology) -> Vec<kvm_cpuid_entry2> {
    for_vcpu(machine, id, topology).as_slice().to_vec()
}

#[test]
fn hides_what_is_no_guests_business() {
    let all = [u32::MAX; 4];
    let host = [
        leaf(1, all),
        leaf(7, all),
        subleaf(7, 1, all),
        leaf(0x8000_0001, all),
    ];
    let guest = baseline_of(&host, true);
    let hidden: Vec<_> = guest
        .iter()
        .map(|entry| [!entry.eax, !entry.ebx, !entry.ecx, !entry.edx])
        .collect();
    assert_eq!(hidden[0], [0, 0, 0x807c, 1 << 21]);
    assert_eq!(hidden[1], [0, 0x0200_0814, 1 << 30, 0x0009_2802]);
    assert_eq!(hidden[2], [1 << 8, 0, 0, 0]);
    assert_eq!(hidden[3], [0, 0, 0x1180_1404, 0]);
}

#[test]
fn leaves_of_hidden_units_are_not_there() {
    let hidden = NO_LEAVES.map(|function| leaf(function, [7; 4]));
    assert_eq!(baseline_of(&hidden, true).len(), 0);
}

#[test]
fn shows_a_hypervisor_and_the_deadline_timer_that_kvm_has() {
    assert_eq!(baseline_of(&[leaf(1, [0; 4])], true)[0].ecx, 1 << 31 | 1 << 24);
    assert_eq!(baseline_of(&[leaf(1, [0, 0, 1 << 24, 0])], false)[0].ecx, 1 << 31);
}

#[test]
fn only_intel_cpus_have_the_register_of_architectural_capabilities() {
    let seven = leaf(7, [0, 0, 0, u32::MAX]);
    let amd = baseline_of(&[vendor_leaf(7, b"AuthenticAMD"), seven], true);
    let intel = baseline_of(&[vendor_leaf(7, b"GenuineIntel"), seven], true);
    assert_eq!([amd[1].edx >> 29 & 1, intel[1].edx >> 29 & 1], [0, 1]);
}

#[test]
fn knows_the_vendors() {
    let vendor = |name| Vendor::of(&[vendor_leaf(1, name)]);
    assert_eq!(vendor(b"GenuineIntel"), Vendor::Intel);
    assert_eq!(vendor(b"AuthenticAMD"), Vendor::Amd);
    assert_eq!(vendor(b"CentaurHauls"), Vendor::Other);
    assert_eq!(Vendor::of(&[]), Vendor::Other);
}

#[test]
fn a_leaf_beyond_the_announced_ones_is_not_there() {
    let machine = [
        leaf(0, [7, 0, 0, 0]),
        leaf(7, [0; 4]),
        subleaf(7, 1, [1; 4]),
        leaf(0xd, [1; 4]),
        leaf(0x4000_0000, [1; 4]),
        leaf(0x8000_0000, [0x8000_0001, 0, 0, 0]),
        leaf(0x8000_0001, [0; 4]),
        leaf(0x8000_0008, [0; 4]),
    ];
    let functions: Vec<_> = vcpu(&machine, 0, FOUR)
        .iter()
        .map(|entry| (entry.function, entry.index))
        .collect();
    assert_eq!(
        functions,
        [
            (0, 0),
            (7, 0),
            (0x4000_0000, 0),
            (0x8000_0000, 0),
            (0x8000_0001, 0)
        ]
    );
}

#[test]
fn numbers_the_vcpu_in_every_topology_leaf() {
    let host = [
        leaf(0, [0x1f, 0, 0, 0]),
        leaf(1, [0; 4]),
        leaf(0x8000_001e, [0; 4]),
    ];
    let guest = vcpu(&host, 3, FOUR);
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
fn the_hosts_own_extended_topology_is_replaced() {
    let host = [
        leaf(0, [0xb, 0, 0, 0]),
        subleaf(0xb, 0, [9; 4]),
        subleaf(0xb, 3, [9; 4]),
    ];
    let guest = vcpu(&host, 0, FOUR);
    assert_eq!(guest.len(), 4);
    assert_eq!(
        guest[1..].iter().map(|entry| entry.eax).collect::<Vec<_>>(),
        [1, 2, 0]
    );
}

#[test]
fn an_amd_guest_knows_its_threads_even_where_the_host_does_not_tell() {
    let host = [
        vendor_leaf(1, b"AuthenticAMD"),
        leaf(0x8000_0000, [0x8000_0008, 0, 0, 0]),
        leaf(0x8000_0001, [0; 4]),
    ];
    let guest = vcpu(&host, 3, FOUR);
    assert_eq!((guest[1].eax, guest[2].ecx & (1 << 22)), (0x8000_001e, 1 << 22));
    assert_eq!(
        (guest[3].function, guest[3].eax, guest[3].ebx),
        (0x8000_001e, 3, 1 | 1 << 8)
    );
    assert_eq!(vcpu(&host, 3, Topology::new(4, false)).len(), 3);
}

#[test]
fn a_single_vcpu_is_no_multiprocessor() {
    let host = [leaf(1, [0, 0, 0, u32::MAX]), leaf(0x8000_0008, [0, 0, 0xffff, 0])];
    let guest = vcpu(&host, 0, Topology::new(1, true));
    assert_eq!((guest[0].edx & (1 << 28), guest[0].ebx >> 16), (0, 1));
    assert_eq!(guest[1].ecx & 0xf0ff, 0);
}

#[test]
fn leaves_out_extended_topology_that_the_host_does_not_have() {
    assert_eq!(vcpu(&[leaf(0, [0xa, 0, 0, 0])], 0, FOUR).len(), 1);
}

#[test]
fn shares_the_third_cache_among_all() {
    let host = [leaf(4, [1 | 1 << 5, 0, 0, 0]), leaf(4, [3 | 3 << 5, 0, 0, 0])];
    let guest = vcpu(&host, 0, FOUR);
    assert_eq!((guest[0].eax >> 14 & 0xfff, guest[1].eax >> 14 & 0xfff), (1, 3));
    assert_eq!(guest[0].eax >> 26, 1);
}

#[test]
fn threads_of_three_cores_are_numbered_in_pairs() {
    let host = [leaf(0x8000_0008, [0; 4]), leaf(0x8000_001e, [0; 4])];
    let six = Topology::new(6, true);
    let cores: Vec<_> = (0..6).map(|id| vcpu(&host, id, six)[1].ebx & 0xff).collect();
    assert_eq!(cores, [0, 0, 1, 1, 2, 2]);
    assert_eq!(vcpu(&host, 0, six)[0].ecx, 5 | 3 << 12);
}
