//! Devices that exist for ACPI: what the tables describe and the guest's ACPI code drives.

pub mod ged;
pub mod pci_hotplug;
