//! The state in which the first vCPU enters a kernel, and every vCPU's local interrupt pins.

use kvm_bindings::{kvm_dtable, kvm_fpu, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::{VcpuStateError, layout};
use crate::boot::kernel::Entry;
use crate::memory::GuestMemory;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of the flags register that is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;

const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
const TYPE_TSS: u8 = 0xb;

/// Bits of a page table entry: present, writable.
const TABLE: u64 = 0x03;
/// Present, writable, a page of 2 MiB.
const HUGE_PAGE: u64 = 0x83;

/// Sets the first vCPU's registers, and the tables in memory that they point to.
pub fn set_entry_state(vcpu: &VcpuFd, memory: &GuestMemory, entry: Entry) -> Result<(), VcpuStateError> {
    let long_mode = matches!(entry, Entry::Linux64(_));
    let regs = match entry {
        Entry::Pvh(address) => kvm_regs {
            rip: address.0,
            rbx: layout::PVH_START_INFO,
            ..empty_regs()
        },
        Entry::Linux64(address) => kvm_regs {
            rip: address.0,
            rsi: layout::ZERO_PAGE,
            ..empty_regs()
        },
    };
    vcpu.set_regs(&regs)
        .map_err(VcpuStateError::kvm("set the registers"))?;
    let fpu = kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu)
        .map_err(VcpuStateError::kvm("set the floating point registers"))?;

    let mut sregs = vcpu
        .get_sregs()
        .map_err(VcpuStateError::kvm("read the special registers"))?;
    let (code, data) = (segment(1, TYPE_CODE, long_mode), segment(2, TYPE_DATA, false));
    let tss = kvm_segment {
        s: 0,
        g: 0,
        db: 0,
        limit: 0x67,
        ..segment(3, TYPE_TSS, false)
    };
    write_gdt(memory, &[code, data, tss])?;
    sregs.gdt = kvm_dtable {
        base: layout::BOOT_GDT,
        limit: 4 * 8 - 1,
        ..Default::default()
    };
    sregs.idt = kvm_dtable::default();
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = tss;
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    if long_mode {
        write_page_tables(memory)?;
        sregs.cr0 |= CR0_PG;
        sregs.cr3 = layout::BOOT_PAGE_TABLES;
        sregs.cr4 |= CR4_PAE;
        sregs.efer |= EFER_LME | EFER_LMA;
    }
    vcpu.set_sregs(&sregs)
        .map_err(VcpuStateError::kvm("set the special registers"))
}

/// Connects the local APIC's pins as on a PC: LINT0 to the interrupt controllers, LINT1 to NMIs.
pub fn set_local_interrupts(vcpu: &VcpuFd) -> Result<(), VcpuStateError> {
    const LINT0: usize = 0x350;
    const LINT1: usize = 0x360;
    const DELIVER_EXTINT: u32 = 7 << 8;
    const DELIVER_NMI: u32 = 4 << 8;
    let mut lapic = vcpu
        .get_lapic()
        .map_err(VcpuStateError::kvm("read the local APIC"))?;
    for (register, mode) in [(LINT0, DELIVER_EXTINT), (LINT1, DELIVER_NMI)] {
        for (byte, value) in lapic.regs[register..register + 4]
            .iter_mut()
            .zip(mode.to_le_bytes())
        {
            *byte = value.cast_signed();
        }
    }
    vcpu.set_lapic(&lapic)
        .map_err(VcpuStateError::kvm("set the local APIC"))
}

fn empty_regs() -> kvm_regs {
    kvm_regs {
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    }
}

/// A flat segment with the selector of the given entry of the boot GDT.
fn segment(index: u16, kind: u8, long_mode: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: index * 8,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!long_mode),
        s: 1,
        l: u8::from(long_mode),
        g: 1,
        ..Default::default()
    }
}

/// Writes descriptors that match the segment registers, for a kernel that reloads them before it has its own.
fn write_gdt(memory: &GuestMemory, segments: &[kvm_segment; 3]) -> Result<(), VcpuStateError> {
    let mut table = vec![0u64];
    table.extend(segments.iter().map(descriptor));
    let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    let written = memory.write_slice(&bytes, GuestAddress(layout::BOOT_GDT));
    written.map_err(|source| VcpuStateError::Memory { source })
}

/// The segment as a descriptor of the GDT (Intel SDM 3A §3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let access = u64::from(segment.type_ | segment.s << 4 | segment.dpl << 5 | segment.present << 7);
    let flags = u64::from(segment.l << 1 | segment.db << 2 | segment.g << 3);
    limit & 0xffff | segment.base & 0xff_ffff << 16 | access << 40 | (limit >> 16 & 0xf) << 48 | flags << 52
}

/// Maps the first 4 GiB one to one with pages of 2 MiB: PML4, PDPT and four page directories.
fn write_page_tables(memory: &GuestMemory) -> Result<(), VcpuStateError> {
    let page = |index: u64| layout::BOOT_PAGE_TABLES + index * layout::PAGE_SIZE;
    let write = |value: u64, address: u64| {
        memory
            .write_obj(value, GuestAddress(address))
            .map_err(|source| VcpuStateError::Memory { source })
    };
    write(page(1) | TABLE, page(0))?;
    for directory in 0..4 {
        write(page(2 + directory) | TABLE, page(1) + directory * 8)?;
    }
    for entry in 0..4 * 512 {
        write(entry << 21 | HUGE_PAGE, page(2) + entry * 8)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_flat_segments() {
        assert_eq!(descriptor(&segment(1, TYPE_CODE, false)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(1, TYPE_CODE, true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(2, TYPE_DATA, false)), 0x00cf_9300_0000_ffff);
    }

    #[test]
    fn page_tables_map_one_to_one() {
        let memory = crate::memory::create(16).unwrap();
        write_page_tables(&memory).unwrap();
        let entry = |address| memory.read_obj::<u64>(GuestAddress(address)).unwrap();
        assert_eq!(entry(0x9000), 0xa003);
        assert_eq!(entry(0xa018), 0xe003);
        assert_eq!(entry(0xb008), 0x20_0083);
        assert_eq!(entry(0xeff8), 0xffe0_0083);
    }
}
