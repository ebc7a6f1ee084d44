//! The guest's physical address space, I/O ports and interrupt lines: plain constants, used by whoever places a device
//! or tells the guest about one. All addresses and sizes are in bytes.
//!
//! ```text
//! 0x0000_0500  boot GDT                          RAM
//! 0x0000_6000  PVH start info, its tables        RAM
//! 0x0000_7000  zero page (Linux boot_params)     RAM
//! 0x0000_9000  page tables of the 64-bit entry   RAM
//! 0x0002_0000  kernel command line               RAM
//! 0x0009_fc00  EBDA: end of low RAM              reserved
//! 0x000e_0000  ACPI tables, RSDP first           reserved
//! 0x0010_0000  kernel; initrd at the top         RAM
//! 0xc000_0000  the hole:
//! 0xc000_0000    boot timer
//! 0xc000_1000    virtio-mmio devices, 4 KiB each
//! 0xd000_0000    PCI memory window, 256 MiB
//! 0xe000_0000    PCI ECAM of bus 0, 1 MiB        reserved
//! 0xfec0_0000    I/O APIC
//! 0xfee0_0000    local APICs
//! 0xfffb_d000    KVM's task state segment
//! 0x1_0000_0000  the rest of RAM
//! behind RAM     memory of devices: files of pmem devices, memory that is plugged in
//! ```

use std::ops::Range;

/// Size of a guest page.
pub const PAGE_SIZE: u64 = 0x1000;

/// The boot GDT, needed by the entry state only.
pub const BOOT_GDT: u64 = 0x500;
/// `hvm_start_info`, followed by its module list and memory map.
pub const PVH_START_INFO: u64 = 0x6000;
/// Linux's `boot_params`, one page.
pub const ZERO_PAGE: u64 = 0x7000;
/// Six pages: PML4, PDPT and four page directories.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// The kernel command line, NUL-terminated.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Room for the command line, the NUL included.
pub const COMMAND_LINE_MAX: usize = 2048;
/// End of the RAM below the legacy video and firmware area.
pub const EBDA: u64 = 0x9_fc00;
/// Start of the legacy video area.
pub const LEGACY_VIDEO: u64 = 0xa_0000;
/// ACPI tables, the RSDP first. It lies where a guest that is not told the address searches for it.
pub const ACPI_TABLES: Range<u64> = 0xe_0000..0x10_0000;
/// Start of the RAM that kernels and initrds are loaded to.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// The part of the address space below 4 GiB that devices have and RAM does not.
pub const HOLE: Range<u64> = 0xc000_0000..0x1_0000_0000;

/// The boot timer's register.
pub const BOOT_TIMER: u64 = 0xc000_0000;
/// Register window of the first virtio-mmio device.
pub const VIRTIO_MMIO_BASE: u64 = 0xc000_1000;
/// Distance and size of the virtio-mmio register windows.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// Interrupt lines of the virtio-mmio devices, in order; what the legacy devices and the GED leave free. Their number
/// is the limit of virtio-mmio devices.
pub const VIRTIO_MMIO_GSIS: [u32; 17] = [5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];

/// The window that the BARs of PCI devices lie in.
pub const PCI_MEMORY_WINDOW: Range<u64> = 0xd000_0000..0xe000_0000;
/// The ports that the I/O BARs of PCI devices lie in.
pub const PCI_IO_WINDOW: Range<u16> = 0x1000..0x2000;
/// The memory-mapped configuration space of PCI bus 0.
pub const PCI_ECAM: Range<u64> = 0xe000_0000..0xe010_0000;
/// The legacy PCI configuration ports: address at +0, data at +4.
pub const PCI_CONFIG_PORTS: Range<u16> = 0xcf8..0xd00;
/// Device slots on PCI bus 0.
pub const PCI_SLOTS: u8 = 32;

/// Registers of the I/O APIC.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Input lines of the I/O APIC, which are GSIs 0 to 23. GSIs from this number on are message-signalled.
pub const IOAPIC_LINES: u32 = 24;
/// Registers of each vCPU's local APIC.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM needs on Intel CPUs for real mode.
pub const KVM_TSS: usize = 0xfffb_d000;

/// The first serial port: eight ports.
pub const SERIAL_PORT: u16 = 0x3f8;
/// The interrupt line of the first serial port.
pub const SERIAL_GSI: u32 = 4;
/// The keyboard controller's data port.
pub const I8042_DATA_PORT: u16 = 0x60;
/// The keyboard controller's command and status port.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// The value that, written to [`I8042_COMMAND_PORT`], resets the machine.
pub const I8042_RESET: u8 = 0xfe;
/// The keyboard's interrupt line.
pub const I8042_GSI: u32 = 1;
/// The CMOS clock's index port; the data port follows.
pub const RTC_PORT: u16 = 0x70;
/// The CMOS clock's interrupt line.
pub const RTC_GSI: u32 = 8;

/// ACPI generic event device: a 32-bit register of pending events ([`GED_POWER_BUTTON`]...); reading clears it.
pub const GED_PORT: u16 = 0x600;
/// Bit of the GED register: the PCI hotplug registers have news.
pub const GED_PCI_HOTPLUG: u32 = 1 << 1;
/// PCI hotplug registers, 32 bits each with a bit per slot: filled slots, slots to be emptied, ejected slots.
pub const PCI_HOTPLUG_PORT: u16 = 0x610;
/// The GED's interrupt line, level-triggered.
pub const GED_GSI: u32 = 9;
/// Bit of the GED register: the power button was pressed.
pub const GED_POWER_BUTTON: u32 = 1 << 0;
/// ACPI sleep control register, one byte: bit 5 starts the transition to the state in bits 2 to 4 (ACPI 6.5 §4.8.3.7).
pub const SLEEP_CONTROL_PORT: u16 = 0x604;
/// ACPI sleep status register, one byte: bit 7 is set after waking, and cleared by writing it.
pub const SLEEP_STATUS_PORT: u16 = 0x605;
/// What the guest writes to [`SLEEP_CONTROL_PORT`] to turn the machine off: SLP_EN with [`SLEEP_TYPE_S5`].
pub const SLEEP_CONTROL_POWER_OFF: u8 = 1 << 5 | SLEEP_TYPE_S5 << 2;
/// The sleep type of the soft-off state.
pub const SLEEP_TYPE_S5: u8 = 5;

/// The register window of the `index`th virtio-mmio device and its interrupt line; `None` past the last one.
pub fn virtio_mmio_device(index: usize) -> Option<(u64, u32)> {
    let gsi = *VIRTIO_MMIO_GSIS.get(index)?;
    Some((
        VIRTIO_MMIO_BASE + u64::try_from(index).ok()? * VIRTIO_MMIO_SIZE,
        gsi,
    ))
}

/// The interrupt line that pin INTA of the PCI device in `slot` is wired to.
pub const fn pci_intx_gsi(slot: u8) -> u32 {
    16 + (slot % 8) as u32
}

/// Where `size` bytes of RAM lie: one range, or two around the hole.
pub fn ram_ranges(size: u64) -> impl Iterator<Item = Range<u64>> {
    let low = 0..size.min(HOLE.start);
    let high = (size > HOLE.start).then(|| HOLE.end..HOLE.end.saturating_add(size - HOLE.start));
    std::iter::once(low).chain(high)
}

/// Where the memory of devices may lie in a machine with `ram_size` bytes of RAM, whose CPU has addresses below `limit`:
/// behind RAM, the hole included.
pub fn device_memory(ram_size: u64, limit: u64) -> Range<u64> {
    let ram_end = ram_ranges(ram_size).last().map_or(0, |range| range.end);
    let start = ram_end.max(HOLE.end);
    start..limit.max(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn ends(size: u64) -> Vec<u64> {
        ram_ranges(size).map(|range| range.end).collect()
    }

    #[test]
    fn small_ram_is_one_range() {
        assert_eq!(ends(16 * MIB), [16 * MIB]);
    }

    #[test]
    fn ram_that_just_reaches_the_hole_is_one_range() {
        assert_eq!(ends(3072 * MIB), [0xc000_0000]);
    }

    #[test]
    fn ram_beyond_the_hole_continues_at_4_gib() {
        assert_eq!(ends(5120 * MIB), [0xc000_0000, 0x1_8000_0000]);
    }

    #[test]
    fn memory_of_devices_is_behind_ram_and_the_hole() {
        let limit = 1 << 36;
        assert_eq!(device_memory(16 * MIB, limit), HOLE.end..limit);
        assert_eq!(device_memory(5120 * MIB, limit), 0x1_8000_0000..limit);
        assert!(device_memory(1 << 40, limit).is_empty());
    }

    #[test]
    fn no_virtio_mmio_interrupt_line_is_taken_by_a_legacy_device() {
        let taken = [0, I8042_GSI, 2, SERIAL_GSI, RTC_GSI, GED_GSI];

        assert!(
            VIRTIO_MMIO_GSIS
                .iter()
                .all(|gsi| !taken.contains(gsi) && *gsi < IOAPIC_LINES)
        );
    }

    #[test]
    fn virtio_mmio_devices_end_with_the_interrupt_lines() {
        assert_eq!(virtio_mmio_device(0), Some((0xc000_1000, 5)));
        assert_eq!(virtio_mmio_device(16), Some((0xc001_1000, 23)));
        assert_eq!(virtio_mmio_device(17), None);
    }

    #[test]
    fn power_off_value_carries_the_enable_bit() {
        assert_eq!(SLEEP_CONTROL_POWER_OFF, 0x34);
    }
}
