//! ACPI: a hardware-reduced machine (ACPI 6.5 §4.1) described by RSDP, XSDT, FADT, MADT, MCFG and DSDT.
//!
//! Called once by the control thread while it builds a machine. No MP table is made: every kernel of the last twenty
//! years reads this one.

mod dsdt;

use acpi_tables::Aml;
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::{GenericAddress, Sdt};
use acpi_tables::xsdt::XSDT;
use devices::legacy::rtc;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::memory::GuestMemory;
use crate::x86_64::layout;

const OEM: [u8; 6] = *b"MAYFLY";
const TABLE: [u8; 8] = *b"MAYFLYVM";
const REVISION: u32 = 1;

/// What the tables describe beyond what every machine has.
#[derive(Debug, Clone, Copy)]
pub struct AcpiMachine<'a> {
    /// vCPUs; their APIC ids count from zero.
    pub vcpus: u8,
    /// Whether there is a PCI bus.
    pub pci: bool,
    /// Register window and interrupt of each virtio-mmio device.
    pub mmio_devices: &'a [(u64, u32)],
}

/// The tables cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// They are larger than the area for them.
    #[error("the ACPI tables take {size} bytes, more than the {limit} that are set aside")]
    TooLarge {
        /// Bytes needed.
        size: u64,
        /// Bytes there are.
        limit: u64,
    },
    /// Guest memory does not reach there.
    #[error("cannot write the ACPI tables into guest memory")]
    Memory(#[from] GuestMemoryError),
}

/// Writes all tables; gives the address of the RSDP.
pub fn build(memory: &GuestMemory, machine: &AcpiMachine<'_>) -> Result<GuestAddress, AcpiError> {
    let rsdp_at = GuestAddress(layout::ACPI_TABLES.start);
    let mut area = Area {
        memory,
        next: layout::ACPI_TABLES.start + Rsdp::len() as u64,
    };
    let dsdt = area.append(dsdt::build(machine).as_slice())?;
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(area.append(fadt(dsdt).as_slice())?);
    xsdt.add_entry(area.append(madt(machine).as_slice())?);
    if machine.pci {
        let mut mcfg = MCFG::new(OEM, TABLE, REVISION);
        mcfg.add_ecam(layout::PCI_ECAM.start, 0, 0, 0);
        xsdt.add_entry(area.append_aml(&mcfg)?);
    }
    let xsdt = area.append_aml(&xsdt)?;
    memory.write_slice(&bytes(&Rsdp::new(OEM, xsdt)), rsdp_at)?;
    Ok(rsdp_at)
}

/// The area of the tables, filled from the start.
struct Area<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl Area<'_> {
    fn append(&mut self, table: &[u8]) -> Result<u64, AcpiError> {
        let start = self.next.next_multiple_of(16);
        let end = start + table.len() as u64;
        if end > layout::ACPI_TABLES.end {
            let limit = layout::ACPI_TABLES.end - layout::ACPI_TABLES.start;
            return Err(AcpiError::TooLarge {
                size: end - layout::ACPI_TABLES.start,
                limit,
            });
        }
        self.memory.write_slice(table, GuestAddress(start))?;
        self.next = end;
        Ok(start)
    }

    fn append_aml(&mut self, table: &dyn Aml) -> Result<u64, AcpiError> {
        self.append(&bytes(table))
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// The Fixed ACPI Description Table (ACPI 6.5 §5.2.9) of a machine without fixed hardware.
fn fadt(dsdt: u64) -> Sdt {
    const LENGTH: u32 = 276;
    const CENTURY: usize = 108;
    const BOOT_ARCHITECTURE: usize = 109;
    const FLAGS: usize = 112;
    const RESET_REGISTER: usize = 116;
    const RESET_VALUE: usize = 128;
    const MINOR_VERSION: usize = 131;
    const X_DSDT: usize = 140;
    const SLEEP_CONTROL: usize = 244;
    const SLEEP_STATUS: usize = 256;
    const HYPERVISOR: usize = 268;

    const HAS_8042: u16 = 1 << 1;
    const NO_VGA: u16 = 1 << 2;
    const NO_ASPM: u16 = 1 << 4;
    const WBINVD: u32 = 1 << 0;
    const POWER_BUTTON_IS_A_DEVICE: u32 = 1 << 4;
    const SLEEP_BUTTON_IS_A_DEVICE: u32 = 1 << 5;
    const RESET_REGISTER_SUPPORTED: u32 = 1 << 10;
    const HARDWARE_REDUCED: u32 = 1 << 20;

    let mut table = Sdt::new(*b"FACP", LENGTH, 6, OEM, TABLE, REVISION);
    table.write_u8(CENTURY, rtc::CENTURY);
    table.write_u16(BOOT_ARCHITECTURE, HAS_8042 | NO_VGA | NO_ASPM);
    let buttons = POWER_BUTTON_IS_A_DEVICE | SLEEP_BUTTON_IS_A_DEVICE;
    table.write_u32(
        FLAGS,
        WBINVD | buttons | RESET_REGISTER_SUPPORTED | HARDWARE_REDUCED,
    );
    table.write(
        RESET_REGISTER,
        GenericAddress::io_port_address::<u8>(layout::I8042_COMMAND_PORT),
    );
    table.write_u8(RESET_VALUE, layout::I8042_RESET);
    table.write_u8(MINOR_VERSION, 5);
    table.write_u64(X_DSDT, dsdt);
    table.write(
        SLEEP_CONTROL,
        GenericAddress::io_port_address::<u8>(layout::SLEEP_CONTROL_PORT),
    );
    table.write(
        SLEEP_STATUS,
        GenericAddress::io_port_address::<u8>(layout::SLEEP_STATUS_PORT),
    );
    table.write_bytes(HYPERVISOR, b"MAYFLY\0\0");
    table
}

/// The Multiple APIC Description Table (ACPI 6.5 §5.2.12). The legacy interrupt controller is not announced.
fn madt(machine: &AcpiMachine<'_>) -> Sdt {
    const LENGTH: u32 = 44;
    const LOCAL_APIC: usize = 36;
    /// A local APIC NMI structure: LINT1 of all processors (UID 0xff), polarity and trigger as the bus has them.
    const NMI: [u8; 6] = [4, 6, 0xff, 0, 0, 1];

    let mut table = Sdt::new(*b"APIC", LENGTH, 6, OEM, TABLE, REVISION);
    table.write_u32(LOCAL_APIC, layout::LOCAL_APIC);
    for id in 0..machine.vcpus {
        table.append_slice(&bytes(&ProcessorLocalApic::new(id, id, EnabledStatus::Enabled)));
    }
    // Its id follows those of the processors.
    table.append_slice(&bytes(&IoApic::new(machine.vcpus, layout::IOAPIC, 0)));
    table.append_slice(&NMI);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn built(machine: &AcpiMachine<'_>) -> (GuestMemory, GuestAddress) {
        let memory = crate::memory::create(16).unwrap();
        let rsdp = build(&memory, machine).unwrap();
        (memory, rsdp)
    }

    fn table(memory: &GuestMemory, address: u64) -> Vec<u8> {
        let length: u32 = memory.read_obj(GuestAddress(address + 4)).unwrap();
        let mut bytes = vec![0; length as usize];
        memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn tables(memory: &GuestMemory, rsdp: GuestAddress) -> Vec<Vec<u8>> {
        let xsdt = table(memory, memory.read_obj(GuestAddress(rsdp.0 + 24)).unwrap());
        let entries = xsdt[36..].as_chunks::<8>().0.iter();
        entries
            .map(|address| table(memory, u64::from_le_bytes(*address)))
            .collect()
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_has_its_checksum() {
        let machine = AcpiMachine {
            vcpus: 32,
            pci: true,
            mmio_devices: &[],
        };
        let (memory, rsdp) = built(&machine);
        let all = tables(&memory, rsdp);
        let names: Vec<_> = all
            .iter()
            .map(|table| String::from_utf8_lossy(&table[..4]).into_owned())
            .collect();
        assert_eq!(names, ["FACP", "APIC", "MCFG"]);
        assert!(all.iter().all(|table| sum(table) == 0));
        let mut root = [0; 36];
        memory.read_slice(&mut root, rsdp).unwrap();
        assert_eq!(
            (&root[..8], sum(&root[..20]), sum(&root)),
            (&b"RSD PTR "[..], 0, 0)
        );
    }

    #[test]
    fn the_fadt_points_to_a_sound_dsdt() {
        let (memory, rsdp) = built(&AcpiMachine {
            vcpus: 1,
            pci: false,
            mmio_devices: &[(0xc000_1000, 5)],
        });
        let fadt = tables(&memory, rsdp).remove(0);
        let dsdt = table(&memory, u64::from_le_bytes(fadt[140..148].try_into().unwrap()));
        assert_eq!((&dsdt[..4], sum(&dsdt)), (&b"DSDT"[..], 0));
        assert!(dsdt.windows(8).any(|window| window == b"LNRO0005"));
    }

    #[test]
    fn the_madt_lists_processors_io_apic_and_nmi_pin() {
        let (memory, rsdp) = built(&AcpiMachine {
            vcpus: 2,
            pci: true,
            mmio_devices: &[],
        });
        let madt = tables(&memory, rsdp).remove(1);
        assert_eq!(madt[36..44], [0, 0, 0xe0, 0xfe, 0, 0, 0, 0]);
        let structures = [
            &[0, 8, 0, 0, 1, 0, 0, 0][..],
            &[0, 8, 1, 1, 1, 0, 0, 0],
            &[1, 12, 2, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0],
            &[4, 6, 0xff, 0, 0, 1],
        ];
        assert_eq!(madt[44..], structures.concat());
    }

    #[test]
    fn a_machine_without_pci_has_no_mcfg() {
        let (memory, rsdp) = built(&AcpiMachine {
            vcpus: 1,
            pci: false,
            mmio_devices: &[],
        });
        assert!(tables(&memory, rsdp).iter().all(|table| &table[..4] != b"MCFG"));
    }
}
