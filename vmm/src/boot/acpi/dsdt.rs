//! The DSDT: which devices there are and what the guest does on an event, as AML.

mod hotplug;

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify, OpRegion,
    OpRegionSpace, Package, PackageBuilder, Path, ResourceTemplate, Scope, Store, ZERO,
};
use acpi_tables::sdt::Sdt;

use super::{AcpiMachine, OEM, REVISION, TABLE};
use crate::x86_64::layout;

/// Makes the table.
pub(super) fn build(machine: &AcpiMachine<'_>) -> Sdt {
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, REVISION);
    let mut aml = Vec::new();
    legacy_devices(&mut aml);
    power(&mut aml, machine.pci);
    processors(&mut aml, machine.vcpus);
    if machine.pci {
        pci_root(&mut aml);
        hotplug::slots(&mut aml);
    }
    for (uid, (base, gsi)) in machine.mmio_devices.iter().enumerate() {
        virtio_mmio(&mut aml, uid, *base, *gsi);
    }
    table.append_slice(&aml);
    table
}

fn path(name: &str) -> Path {
    Path::new(name)
}

fn name(of: &str, value: &dyn Aml) -> Name {
    Name::new(path(of), value)
}

/// An interrupt line of ISA kind: edge-triggered, active high, exclusive.
fn isa_interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn io(port: u16, length: u8) -> IO {
    IO::new(port, port, 1, length)
}

/// Serial port, keyboard controller and clock.
fn legacy_devices(aml: &mut Vec<u8>) {
    let serial_resources = (io(layout::SERIAL_PORT, 8), isa_interrupt(layout::SERIAL_GSI));
    let keyboard = [io(layout::I8042_DATA_PORT, 1), io(layout::I8042_COMMAND_PORT, 1)];
    let keyboard_interrupt = isa_interrupt(layout::I8042_GSI);
    let clock = io(layout::RTC_PORT, 2);
    Scope::new(
        path("_SB_"),
        vec![
            &Device::new(
                path("COM1"),
                vec![
                    &name("_HID", &EISAName::new("PNP0501")),
                    &name("_UID", &ZERO),
                    &name("_DDN", &"COM1"),
                    &name(
                        "_CRS",
                        &ResourceTemplate::new(vec![&serial_resources.1, &serial_resources.0]),
                    ),
                ],
            ),
            &Device::new(
                path("KBD_"),
                vec![
                    &name("_HID", &EISAName::new("PNP0303")),
                    &name(
                        "_CRS",
                        &ResourceTemplate::new(vec![&keyboard[0], &keyboard[1], &keyboard_interrupt]),
                    ),
                ],
            ),
            &Device::new(
                path("RTC_"),
                vec![
                    &name("_HID", &EISAName::new("PNP0B00")),
                    &name("_CRS", &ResourceTemplate::new(vec![&clock])),
                ],
            ),
        ],
    )
    .to_aml_bytes(aml);
}

/// The power button, the event device that tells of it and of PCI slots, and the way off.
fn power(aml: &mut Vec<u8>, pci: bool) {
    let (s5, port) = (layout::SLEEP_TYPE_S5, layout::GED_PORT);
    name("_S5_", &Package::new(vec![&s5, &ZERO, &ZERO, &ZERO])).to_aml_bytes(aml);
    // Level-triggered, active high.
    let interrupt = Interrupt::new(true, false, false, false, layout::GED_GSI);
    let pending = [FieldEntry::Named(*b"PEND", 32)];
    let (button, pressed) = (layout::GED_POWER_BUTTON, 0x80u8);
    let events = path("PEND");
    let target = path("\\_SB_.PWRB");
    let notify = Notify::new(&target, &pressed);
    let is_pressed = Equal::new(&Local(1), &button);
    let (store, and) = (
        Store::new(&Local(0), &events),
        And::new(&Local(1), &Local(0), &button),
    );
    let on_pressed = If::new(&is_pressed, vec![&notify]);
    let on_hotplug = hotplug::on_event(&Local(0));
    // Reading clears the register, so it is read once.
    let mut on_event: Vec<&dyn Aml> = vec![&store, &and, &on_pressed];
    if pci {
        on_event.push(&on_hotplug);
    }
    Scope::new(
        path("_SB_"),
        vec![
            &Device::new(
                path("PWRB"),
                vec![&name("_HID", &EISAName::new("PNP0C0C")), &name("_UID", &ZERO)],
            ),
            &Device::new(
                path("GED_"),
                vec![
                    &name("_HID", &"ACPI0013"),
                    &name("_UID", &ZERO),
                    &name("_CRS", &ResourceTemplate::new(vec![&interrupt])),
                    &OpRegion::new(path("EVTS"), OpRegionSpace::SystemIO, &port, &4u8),
                    &Field::new(
                        path("EVTS"),
                        FieldAccessType::DWord,
                        FieldLockRule::NoLock,
                        FieldUpdateRule::WriteAsZeroes,
                        pending.to_vec(),
                    ),
                    &Method::new(path("_EVT"), 1, true, on_event),
                ],
            ),
        ],
    )
    .to_aml_bytes(aml);
}

fn processors(aml: &mut Vec<u8>, count: u8) {
    for id in 0..count {
        let device = format!("C{id:03}");
        Scope::new(
            path("_SB_"),
            vec![&Device::new(
                path(&device),
                vec![&name("_HID", &"ACPI0007"), &name("_UID", &id)],
            )],
        )
        .to_aml_bytes(aml);
    }
}

/// The host bridge of bus 0, its window and its interrupt lines, and the range of its configuration space.
fn pci_root(aml: &mut Vec<u8>) {
    let last = |end: u64| u32::try_from(end - 1).expect("the window lies below 4 GiB");
    let first = |start: u64| u32::try_from(start).expect("the window lies below 4 GiB");
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        first(layout::PCI_MEMORY_WINDOW.start),
        last(layout::PCI_MEMORY_WINDOW.end),
        None,
    );
    let buses = AddressSpace::new_bus_number(0u16, 0u16);
    let ports = io(layout::PCI_CONFIG_PORTS.start, 8);
    let io_window = AddressSpace::new_io(layout::PCI_IO_WINDOW.start, layout::PCI_IO_WINDOW.end - 1, None);
    let ecam_size = u32::try_from(layout::PCI_ECAM.end - layout::PCI_ECAM.start).expect("one bus");
    let ecam = Memory32Fixed::new(true, first(layout::PCI_ECAM.start), ecam_size);
    let routes = interrupt_routes();
    Scope::new(
        path("_SB_"),
        vec![
            &Device::new(
                path("PCI0"),
                vec![
                    &name("_HID", &EISAName::new("PNP0A08")),
                    &name("_CID", &EISAName::new("PNP0A03")),
                    &name("_SEG", &ZERO),
                    &name("_BBN", &ZERO),
                    &name("_UID", &ZERO),
                    &name(
                        "_CRS",
                        &ResourceTemplate::new(vec![&buses, &ports, &io_window, &window]),
                    ),
                    &name("_PRT", &routes),
                ],
            ),
            &Device::new(
                path("MCFG"),
                vec![
                    &name("_HID", &EISAName::new("PNP0C02")),
                    &name("_UID", &ZERO),
                    &name("_CRS", &ResourceTemplate::new(vec![&ecam])),
                ],
            ),
        ],
    )
    .to_aml_bytes(aml);
}

/// Which line each slot's pin A drives. Devices use no other pin.
fn interrupt_routes() -> PackageBuilder {
    let mut routes = PackageBuilder::new();
    for slot in 0..layout::PCI_SLOTS {
        let address = u32::from(slot) << 16 | 0xffff;
        let gsi = layout::pci_intx_gsi(slot);
        routes.add_element(&Package::new(vec![&address, &ZERO, &ZERO, &gsi]));
    }
    routes
}

fn virtio_mmio(aml: &mut Vec<u8>, uid: usize, base: u64, gsi: u32) {
    let base = u32::try_from(base).expect("virtio-mmio windows lie below 4 GiB");
    let size = u32::try_from(layout::VIRTIO_MMIO_SIZE).expect("one page");
    let (window, interrupt) = (Memory32Fixed::new(true, base, size), isa_interrupt(gsi));
    let device = format!("V{uid:03}");
    Scope::new(
        path("_SB_"),
        vec![&Device::new(
            path(&device),
            vec![
                &name("_HID", &"LNRO0005"),
                &name("_UID", &uid),
                &name("_CCA", &1u8),
                &name("_CRS", &ResourceTemplate::new(vec![&window, &interrupt])),
            ],
        )],
    )
    .to_aml_bytes(aml);
}
