//! The lines of the I/O APIC, as devices drive them.

use std::sync::{Arc, Mutex, PoisonError};

use devices::interrupt_line::{EdgeLine, LevelLine};

use crate::kvm;
use crate::x86_64::layout;

/// The level-triggered line of one device.
pub(crate) struct Level {
    vm: Arc<kvm::Vm>,
    gsi: u32,
}

impl Level {
    /// Line `gsi`, low.
    pub(crate) fn new(vm: Arc<kvm::Vm>, gsi: u32) -> Self {
        Self { vm, gsi }
    }
}

impl LevelLine for Level {
    fn set(&self, asserted: bool) {
        drive(&self.vm, self.gsi, asserted);
    }
}

/// The interrupt lines of the PCI bus. Slots share them, so a line is released when its last slot lets go.
pub(crate) struct Lines {
    vm: Arc<kvm::Vm>,
    lines: [Arc<Mutex<u32>>; 8],
}

/// The end of a line in one slot.
struct Pin {
    vm: Arc<kvm::Vm>,
    gsi: u32,
    slot: u8,
    /// A bit per slot that asserts the line.
    asserted: Arc<Mutex<u32>>,
}

impl Lines {
    /// All lines released.
    pub(crate) fn new(vm: Arc<kvm::Vm>) -> Self {
        Self {
            vm,
            lines: Default::default(),
        }
    }

    /// The line that pin A of `slot` drives.
    pub(crate) fn connect(&self, slot: u8) -> Arc<dyn LevelLine> {
        let gsi = layout::pci_intx_gsi(slot);
        let asserted = Arc::clone(&self.lines[usize::from(slot % 8)]);
        Arc::new(Pin {
            vm: Arc::clone(&self.vm),
            gsi,
            slot,
            asserted,
        })
    }
}

impl LevelLine for Pin {
    fn set(&self, asserted: bool) {
        let mut slots = self.asserted.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *slots != 0;
        let bit = 1 << self.slot;
        *slots = if asserted { *slots | bit } else { *slots & !bit };
        let after = *slots != 0;
        if before != after {
            drive(&self.vm, self.gsi, after);
        }
    }
}

/// Drives a line; devices cannot do anything about a failure.
fn drive(vm: &kvm::Vm, gsi: u32, active: bool) {
    if let Err(error) = vm.set_irq_line(gsi, active) {
        log::warn!("{}", crate::error::chain(&error));
    }
}

/// The interrupt line of a device on the MMIO bus.
///
/// Not an irqfd: of a line at the I/O APIC, the kernel hands those to a worker thread, which costs two switches with
/// each interrupt.
pub(crate) struct Edge {
    vm: Arc<kvm::Vm>,
    gsi: u32,
    /// Held from edge to edge: a line that is high already cannot rise.
    pulse: Mutex<()>,
}

impl Edge {
    /// Line `gsi`, low.
    pub(crate) fn new(vm: Arc<kvm::Vm>, gsi: u32) -> Self {
        let pulse = Mutex::new(());
        Self { vm, gsi, pulse }
    }
}

impl EdgeLine for Edge {
    fn pulse(&self) {
        let _held = self.pulse.lock().unwrap_or_else(PoisonError::into_inner);
        drive(&self.vm, self.gsi, true);
        drive(&self.vm, self.gsi, false);
    }
}
