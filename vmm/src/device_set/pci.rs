//! [`PciBus`]: the PCI bus as devices are plugged into it and unplugged from it.
//!
//! Called by the control thread. The guest takes part in hotplug through registers that ACPI code in the DSDT reads
//! and writes: it is told that a slot was filled or is to be emptied, and it says when it has let go of one.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::acpi::ged::{self, Ged};
use devices::acpi::pci_hotplug::{self, PciHotplug};
use devices::bus::Bus;
use devices::pci::root::{CONFIG_PORTS, CONFIG_PORTS_LEN, ECAM_LEN};
use devices::pci::{ConfigPorts, Ecam, PciSegment};
use devices::virtio::pci::{BAR_LEN, PciResources, PciVirtio};
use devices::virtio::{Transport, VirtioDevice};
use vmm_sys_util::eventfd::EventFd;

use super::wiring::{Bars, Kicks, MsiGsis};
use super::{DeviceSetError, Platform, SharedTransport, WiringError};
use crate::interrupt_lines::Lines;
use crate::x86_64::layout;

/// Notification ports set aside for each slot: enough for 32 queues.
const PORTS_PER_SLOT: u16 = 0x80;

/// The bus with what connects it to the machine.
pub(super) struct PciBus {
    segment: Arc<PciSegment>,
    bars: Arc<Bars>,
    lines: Lines,
    hotplug: Arc<Mutex<PciHotplug>>,
    ged: Arc<Mutex<Ged>>,
    /// Written when the guest has let go of a slot.
    ejection: EventFd,
    /// A bit for each slot that the guest was asked to let go of.
    asked: u32,
    /// A bit for each filled slot that the guest may still let go of, as it was asked and nobody waits any more.
    late: u32,
}

impl PciBus {
    /// An empty bus with its registers on the address and port buses.
    pub(super) fn new(platform: &Platform, pio: &Arc<Bus>) -> Result<Self, WiringError> {
        let mmio = &platform.mmio;
        let bars = Arc::new(Bars::new(mmio, pio, Arc::clone(&platform.vm)));
        let segment = Arc::new(PciSegment::new(bars.clone()));
        let ecam = Ecam::new(Arc::clone(&segment));
        mmio.insert(layout::PCI_ECAM.start, ECAM_LEN, Arc::new(Mutex::new(ecam)))?;
        let ports = ConfigPorts::new(Arc::clone(&segment));
        pio.insert(CONFIG_PORTS, CONFIG_PORTS_LEN, Arc::new(Mutex::new(ports)))?;
        let ejection = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let hotplug = PciHotplug::new(ejection.try_clone()?);
        let hotplug = Arc::new(Mutex::new(hotplug));
        let port = layout::PCI_HOTPLUG_PORT.into();
        pio.insert(port, pci_hotplug::PORTS, hotplug.clone())?;
        Ok(Self {
            segment,
            bars,
            lines: Lines::new(Arc::clone(&platform.vm)),
            hotplug,
            ged: Arc::clone(&platform.ged),
            ejection,
            asked: 0,
            late: 0,
        })
    }

    /// Puts the device into a free slot; gives the slot.
    pub(super) fn plug(
        &self,
        platform: &Platform,
        id: &str,
        device: Box<dyn VirtioDevice>,
    ) -> Result<(u8, SharedTransport), DeviceSetError> {
        let failed = DeviceSetError::connecting(id);
        let limit = usize::from(layout::PCI_SLOTS) - 1;
        let full = || DeviceSetError::Full { id: id.into(), limit };
        let slot = self.segment.free_slot().ok_or_else(full)?;
        let gsis = MsiGsis::new(Arc::clone(&platform.vm), PciVirtio::vector_count(device.info()));
        let gsis = Arc::new(gsis.map_err(|error| failed(error.into()))?);
        let resources = PciResources {
            bar_address: layout::PCI_MEMORY_WINDOW.start + u64::from(slot) * BAR_LEN,
            notify_ports: layout::PCI_IO_WINDOW.start + u16::from(slot) * PORTS_PER_SLOT,
            interrupt_line: u8::try_from(layout::pci_intx_gsi(slot)).expect("one of the I/O APIC's 24 lines"),
            router: gsis.clone(),
            intx: self.lines.connect(slot),
        };
        let (memory, host) = (platform.memory.clone(), Arc::clone(&platform.host));
        let function = PciVirtio::new(device, resources, memory, host);
        let mut function = function.map_err(|error| failed(error.into()))?;
        gsis.bind(function.irqfds())
            .map_err(|error| failed(error.into()))?;
        let kicks = function.slot().kicks().to_vec();
        let function = Arc::new(Mutex::new(function));
        self.bars.add(slot, function.clone(), kicks);
        if let Err(error) = self.segment.attach(slot, function.clone()) {
            self.bars.remove(slot);
            return Err(failed(error.into()));
        }
        Ok((slot, function))
    }

    /// Takes out a device that the guest has let go of; gives what vCPUs may still hold of it.
    pub(super) fn unplug(&mut self, slot: u8) -> Kicks {
        self.remove(slot).1
    }

    /// Takes out a device that the guest may be using; gives what vCPUs may still hold of it. The guest is asked to let go
    /// of it all the same, so that it misses it; a check finds only what is new.
    pub(super) fn take_away(&mut self, slot: u8) -> Kicks {
        let (bar, kicks) = self.remove(slot);
        if let Some(at) = bar {
            self.bars.bury(at);
        }
        self.hotplug().request(slot);
        self.notify();
        kicks
    }

    /// The guest finds nothing in the slot any more; the device ends with its last owner. Gives where its BAR was.
    fn remove(&mut self, slot: u8) -> (Option<u64>, Kicks) {
        self.forget(slot);
        let function = self.segment.detach(slot);
        let kicks = self.bars.remove(slot);
        let bar = function.and_then(|function| function.lock().unwrap_or_else(PoisonError::into_inner).bar());
        (bar, kicks)
    }

    /// Has the guest look at the slot, which was filled.
    pub(super) fn announce(&self, slot: u8) {
        self.hotplug().check(slot);
        self.notify();
    }

    /// Asks the guest to let go of the slot; false when it was asked before and has not answered yet.
    pub(super) fn ask(&mut self, slot: u8) -> bool {
        let asked = self.asked & 1 << slot != 0;
        if !asked {
            self.asked |= 1 << slot;
            self.late &= !(1 << slot);
            self.hotplug().request(slot);
            self.notify();
        }
        !asked
    }

    /// Does not wait for the slot any more, which stays filled.
    pub(super) fn withdraw(&mut self, slot: u8) {
        let asked = self.asked & 1 << slot;
        self.forget(slot);
        self.late |= asked;
    }

    /// The guest is asked nothing about the slot.
    fn forget(&mut self, slot: u8) {
        self.asked &= !(1 << slot);
        self.late &= !(1 << slot);
        self.hotplug().withdraw(slot);
    }

    /// The slots that the guest was asked to let go of, and has. Others it keeps: what it does on its own is no reason
    /// for the user to lose a device. One that it has let go of too late is there for it to take again.
    pub(super) fn take_ejected(&mut self) -> Vec<u8> {
        let ejected: Vec<u8> = self.hotplug().take_ejected().collect();
        for slot in &ejected {
            if self.late & 1 << slot != 0 {
                self.late &= !(1 << slot);
                self.announce(*slot);
            }
        }
        ejected
            .into_iter()
            .filter(|slot| self.asked & 1 << slot != 0)
            .collect()
    }

    /// Signalled when the guest has let go of a slot.
    pub(super) fn ejection(&self) -> RawFd {
        self.ejection.as_raw_fd()
    }

    fn hotplug(&self) -> MutexGuard<'_, PciHotplug> {
        self.hotplug.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn notify(&self) {
        let mut ged = self.ged.lock().unwrap_or_else(PoisonError::into_inner);
        ged.raise(ged::Event::PciHotplug);
    }
}
