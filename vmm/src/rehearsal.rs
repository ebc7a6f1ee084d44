//! What building a machine would find wrong with its config, found without KVM: for `--check-config`.

use devices::catalog::{DeviceConfig, Services};
use devices::memory_host::{FileMapping, MappedFile, MemoryHost, MemoryHostError, SlottedMemory};

use crate::boot;
use crate::config::VmConfig;
use crate::device_set::DeviceSetError;
use crate::memory;
use crate::vm::{Settings, VmError};
use crate::x86_64::layout;

/// Loads kernel and initrd into memory of the guest's size, puts the command line together, counts the devices, and
/// opens files that are opened at the start only. Everything is let go of again.
pub(crate) fn rehearse(config: &VmConfig, settings: &Settings) -> Result<(), VmError> {
    let ram = memory::create(config.machine_config.mem_size_mib as u64)?;
    let mut command_line = boot::command_line(config)?;
    let pci = settings.pci && !command_line.has_value("pci", "off");
    let mmio_places = places(config, pci)?;
    boot::add_device_parameters(&mut command_line, config, &mmio_places)?;
    for device in config.devices() {
        open_late(&device)?;
    }
    let plan = boot::Plan {
        config,
        command_line: &command_line,
        pci,
        mmio_devices: &mmio_places,
    };
    boot::load(&ram, &plan)?;
    Ok(())
}

/// Where virtio-mmio devices would be; nowhere with PCI. Fails when there are too many devices.
fn places(config: &VmConfig, pci: bool) -> Result<Vec<(u64, u32)>, VmError> {
    let devices = config.devices();
    let limit = if pci {
        usize::from(layout::PCI_SLOTS) - 1
    } else {
        layout::VIRTIO_MMIO_GSIS.len()
    };
    if let Some(device) = devices.get(limit) {
        let id = device.id().to_owned();
        return Err(DeviceSetError::Full { id, limit }.into());
    }
    let count = if pci { 0 } else { devices.len() };
    Ok((0..count).filter_map(layout::virtio_mmio_device).collect())
}

/// Opens what a check of the section leaves for the start: clients may make the file of a pmem device later, but a
/// config file that is checked is to be complete.
fn open_late(device: &DeviceConfig) -> Result<(), DeviceSetError> {
    if matches!(device, DeviceConfig::Pmem(_)) {
        let services = Services {
            memory: &Nowhere,
            mmds: None,
        };
        let built = device.build(&services);
        built.map_err(|source| DeviceSetError::Build {
            id: device.id().into(),
            source,
        })?;
    }
    Ok(())
}

/// Takes files that no guest will see.
struct Nowhere;

impl MemoryHost for Nowhere {
    fn map_file(&self, _: &FileMapping<'_>) -> Result<Box<dyn MappedFile>, MemoryHostError> {
        Ok(Box::new(Unmapped))
    }

    fn reserve(&self, size: u64, _: u64) -> Result<Box<dyn SlottedMemory>, MemoryHostError> {
        Err(MemoryHostError::NoRoom { size, free: 0 })
    }
}

struct Unmapped;

impl MappedFile for Unmapped {
    fn start(&self) -> u64 {
        0
    }
}
