//! The model specific registers that a vCPU starts with.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::VcpuStateError;

const SYSENTER_CS: u32 = 0x174;
const SYSENTER_ESP: u32 = 0x175;
const SYSENTER_EIP: u32 = 0x176;
const MISC_ENABLE: u32 = 0x1a0;
const MTRR_DEF_TYPE: u32 = 0x2ff;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const SYSCALL_MASK: u32 = 0xc000_0084;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// String instructions may be fast.
const FAST_STRING: u64 = 1 << 0;
/// MTRRs are on and the default type of memory is write-back, as firmware would leave them.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// Sets them. The guest's CPUID must be set before.
pub fn set_boot_msrs(vcpu: &VcpuFd) -> Result<(), VcpuStateError> {
    let zero = [
        SYSENTER_CS,
        SYSENTER_ESP,
        SYSENTER_EIP,
        STAR,
        LSTAR,
        CSTAR,
        SYSCALL_MASK,
        KERNEL_GS_BASE,
    ];
    let set = [
        (MISC_ENABLE, FAST_STRING),
        (MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
    ];
    let entries: Vec<_> = zero
        .map(|index| (index, 0))
        .into_iter()
        .chain(set)
        .map(|(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        })
        .collect();
    let msrs = Msrs::from_entries(&entries).expect("a handful");
    let count = vcpu
        .set_msrs(&msrs)
        .map_err(VcpuStateError::kvm("set the model specific registers"))?;
    match entries.get(count) {
        Some(refused) => Err(VcpuStateError::Msr { index: refused.index }),
        None => Ok(()),
    }
}
