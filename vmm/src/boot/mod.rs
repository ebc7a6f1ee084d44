//! From a config to vCPUs that are about to run a kernel: images, command line, tables, entry state. Called by
//! `Vm::build` on the control thread.

pub mod acpi;
mod bzimage;
pub mod cmdline;
mod elf;
pub mod image;
pub mod initrd;
pub mod kernel;
mod params;

use kvm_ioctls::VcpuFd;
use vm_memory::GuestMemoryError;

use self::acpi::{AcpiError, AcpiMachine};
use self::cmdline::{CommandLine, CommandLineError};
use self::image::{Image, ImageError, ImageKind};
use self::initrd::InitrdError;
use self::kernel::{Entry, KernelError, Placement};
use crate::config::{HugePages, VmConfig};
use crate::kvm::{self, ImmediateExit, KvmError};
use crate::memory::GuestMemory;
use crate::x86_64::cpu::Cpu;
use crate::x86_64::{VcpuStateError, layout, registers};

/// A machine cannot be made ready to boot.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The command line.
    #[error(transparent)]
    CommandLine(#[from] CommandLineError),
    /// A file to be booted.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The initrd.
    #[error(transparent)]
    Initrd(#[from] InitrdError),
    /// The tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// Guest memory is too small for the boot structures.
    #[error("cannot write the boot parameters into guest memory")]
    Memory(#[from] GuestMemoryError),
    /// The machine.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A vCPU's state.
    #[error(transparent)]
    Vcpu(#[from] VcpuStateError),
}

/// What a boot needs to know of the machine.
pub struct Plan<'a> {
    /// The config.
    pub config: &'a VmConfig,
    /// The whole command line.
    pub command_line: &'a CommandLine,
    /// Whether there is a PCI bus.
    pub pci: bool,
    /// Register window and interrupt of each virtio-mmio device.
    pub mmio_devices: &'a [(u64, u32)],
}

/// The user's command line, or the default.
pub fn command_line(config: &VmConfig) -> Result<CommandLine, BootError> {
    let text = config
        .boot_source
        .boot_args
        .as_deref()
        .unwrap_or(cmdline::DEFAULT);
    Ok(CommandLine::new(text)?)
}

/// Adds what the devices call for: the root device, and the places of virtio-mmio devices for kernels without ACPI.
pub fn add_device_parameters(
    line: &mut CommandLine,
    config: &VmConfig,
    mmio_devices: &[(u64, u32)],
) -> Result<(), BootError> {
    // Linux numbers them in the order in which it finds them.
    if let Some((index, root)) = config.pmem.iter().enumerate().find(|(_, pmem)| pmem.root_device) {
        line.push(&format!("root=/dev/pmem{index}"))?;
        line.push(if root.read_only { "ro" } else { "rw" })?;
    }
    if let Some(root) = config.drives.iter().find(|drive| drive.is_root_device) {
        match &root.partuuid {
            Some(uuid) => line.push(&format!("root=PARTUUID={uuid}"))?,
            None => line.push("root=/dev/vda")?,
        }
        line.push(if root.read_only() { "ro" } else { "rw" })?;
    }
    if !mmio_devices.is_empty() && !line.contains("pci") {
        // Spares the kernel the search for a bus that is not there.
        line.push("pci=off")?;
    }
    for (base, gsi) in mmio_devices {
        let size = layout::VIRTIO_MMIO_SIZE >> 10;
        line.push(&format!("virtio_mmio.device={size}K@{base:#x}:{gsi}"))?;
    }
    Ok(())
}

/// Puts kernel, initrd, command line, tables and parameters into guest memory.
pub fn load(memory: &GuestMemory, plan: &Plan<'_>) -> Result<Entry, BootError> {
    let source = &plan.config.boot_source;
    let image = Image::open(ImageKind::Kernel, source.kernel_image_path.as_ref())?;
    // Pages of the image would be others than those that are shared.
    let private = !plan.config.shares_memory();
    let placement = match plan.config.machine_config.huge_pages {
        HugePages::None if private => Placement::Mapped,
        _ => Placement::Copied,
    };
    let kernel = kernel::load(memory, &image, placement)?;
    let initrd = match &source.initrd_path {
        Some(path) => {
            let image = Image::open(ImageKind::Initrd, path.as_ref())?;
            Some(initrd::load(memory, &image, &kernel)?)
        }
        None => None,
    };
    plan.command_line.write(memory)?;
    let machine = AcpiMachine {
        vcpus: plan.config.machine_config.vcpu_count,
        pci: plan.pci,
        mmio_devices: plan.mmio_devices,
    };
    let rsdp = acpi::build(memory, &machine)?;
    match kernel.entry {
        Entry::Pvh(_) => params::write_start_info(memory, initrd, rsdp)?,
        Entry::Linux64(_) => params::write_zero_page(memory, kernel.setup_header.as_deref(), initrd, rsdp)?,
    }
    Ok(kernel.entry)
}

/// Makes the vCPUs; the first is about to enter the kernel, the others wait for it to start them.
pub fn create_vcpus(
    vm: &kvm::Vm,
    memory: &GuestMemory,
    (cpu, count): (&Cpu<'_>, u8),
    entry: Entry,
) -> Result<Vec<(u8, VcpuFd, ImmediateExit)>, BootError> {
    let make = |id| {
        let (vcpu, exit) = vm.create_vcpu(id)?;
        cpu.set_up(&vcpu, id)?;
        registers::set_local_interrupts(&vcpu)?;
        if id == 0 {
            registers::set_entry_state(&vcpu, memory, entry)?;
        }
        Ok((id, vcpu, exit))
    };
    (0..count).map(make).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The command line of a machine with two virtio-mmio devices, whose user gave this one.
    fn with_two_mmio_devices(args: &str) -> String {
        let places = [(0xc000_1000, 5), (0xc000_2000, 6)];
        let mut line = CommandLine::new(args).unwrap();
        add_device_parameters(&mut line, &VmConfig::default(), &places).unwrap();
        line.as_string()
    }

    const DEVICES: &str = "virtio_mmio.device=4K@0xc0001000:5 virtio_mmio.device=4K@0xc0002000:6";

    #[test]
    fn kernels_without_acpi_are_told_where_mmio_devices_are() {
        assert_eq!(
            with_two_mmio_devices("panic=1"),
            format!("panic=1 pci=off {DEVICES}")
        );
    }

    #[test]
    fn what_the_user_says_of_pci_stays_beside_mmio_devices() {
        for args in ["pci=off", "quiet pci=nomsi"] {
            assert_eq!(with_two_mmio_devices(args), format!("{args} {DEVICES}"));
        }
    }

    #[test]
    fn places_of_mmio_devices_go_before_the_arguments_of_init() {
        assert_eq!(
            with_two_mmio_devices("quiet -- pci=1"),
            format!("quiet pci=off {DEVICES} -- pci=1")
        );
    }

    #[test]
    fn without_mmio_devices_nothing_is_said_of_pci() {
        let mut line = CommandLine::new("panic=1").unwrap();
        add_device_parameters(&mut line, &VmConfig::default(), &[]).unwrap();
        assert_eq!(line.as_string(), "panic=1");
    }
}
