//! What connects PCI devices to KVM: BARs on the bus with their notification addresses, and MSI routes.
//!
//! vCPU threads get here when the guest moves a BAR or programs an interrupt; the data path does not.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use devices::bus::{Bus, BusDevice, SharedDevice};
use devices::pci::{BarMapper, MsiMessage, MsiRouter};
use devices::virtio::pci::{BAR_LEN, PciVirtio};
use vmm_sys_util::eventfd::EventFd;

use crate::kvm::{self, KvmError};
use crate::x86_64::layout;

/// What a write to each queue's notification address signals.
pub(crate) type Kicks = Vec<Arc<EventFd>>;

/// The BARs of all slots.
///
/// The buses hold the segment, which holds the BARs: a machine would never end if these held the buses.
pub(crate) struct Bars {
    mmio: Weak<Bus>,
    pio: Weak<Bus>,
    vm: Arc<kvm::Vm>,
    slots: Mutex<BTreeMap<u8, Registers>>,
    /// Where BARs were whose devices were taken away under the guest's hands.
    graves: Mutex<BTreeSet<u64>>,
}

/// The registers behind a BAR, and those for notifications.
#[derive(Clone)]
struct Registers {
    device: SharedDevice,
    kicks: Kicks,
}

impl Bars {
    /// No BARs yet.
    pub(crate) fn new(mmio: &Arc<Bus>, pio: &Arc<Bus>, vm: Arc<kvm::Vm>) -> Self {
        let (mmio, pio) = (Arc::downgrade(mmio), Arc::downgrade(pio));
        Self {
            mmio,
            pio,
            vm,
            slots: Mutex::default(),
            graves: Mutex::default(),
        }
    }

    /// Makes a slot's registers known; they are mapped when the guest enables them.
    pub(crate) fn add(&self, slot: u8, device: SharedDevice, kicks: Kicks) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.insert(slot, Registers { device, kicks });
    }

    /// Forgets a slot's registers, which are mapped no more; gives what its notifications signalled.
    pub(crate) fn remove(&self, slot: u8) -> Kicks {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let registers = slots.remove(&slot);
        registers.map(|registers| registers.kicks).unwrap_or_default()
    }

    /// Answers with zeros at `at`, where a BAR was whose device was taken away. A driver that resets its device waits
    /// for a status of zero, without end, and what is not there reads as ones. Ends when another BAR comes there.
    pub(crate) fn bury(&self, at: u64) {
        let grave: SharedDevice = Arc::new(Mutex::new(Grave));
        if bus(&self.mmio).is_ok_and(|mmio| mmio.insert(at, BAR_LEN, grave).is_ok()) {
            self.graves().insert(at);
        }
    }

    fn graves(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.graves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn registers(&self, slot: u8) -> io::Result<Registers> {
        let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots
            .get(&slot)
            .cloned()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn map(&self, at: u64, registers: &Registers) -> io::Result<()> {
        let window = layout::PCI_MEMORY_WINDOW;
        if at < window.start || at > window.end - BAR_LEN {
            return Err(outside_window());
        }
        let mmio = bus(&self.mmio)?;
        // All BARs have this size, so a grave in the way is exactly there.
        if self.graves().remove(&at) {
            mmio.remove(at);
        }
        mmio.insert(at, BAR_LEN, Arc::clone(&registers.device))
            .map_err(io::Error::other)
    }

    fn map_ports(&self, at: u16, kicks: &[Arc<EventFd>]) -> io::Result<()> {
        let count = PciVirtio::port_count(u16::try_from(kicks.len()).map_err(io::Error::other)?);
        let window = layout::PCI_IO_WINDOW;
        if at < window.start || at > window.end - count {
            return Err(outside_window());
        }
        let ports: SharedDevice = Arc::new(Mutex::new(NotifyPorts(kicks.to_vec())));
        bus(&self.pio)?
            .insert(at.into(), count.into(), ports)
            .map_err(io::Error::other)?;
        for (queue, kick) in (0u16..).zip(kicks) {
            if let Err(error) = self
                .vm
                .register_ioevent_port(kick, PciVirtio::notify_port(at, queue))
            {
                self.unmap_ports(at, &kicks[..usize::from(queue)]);
                return Err(io::Error::other(error));
            }
        }
        Ok(())
    }

    fn unmap_ports(&self, at: u16, kicks: &[Arc<EventFd>]) {
        if let Ok(pio) = bus(&self.pio) {
            pio.remove(at.into());
        }
        for (queue, kick) in (0u16..).zip(kicks) {
            if let Err(error) = self
                .vm
                .unregister_ioevent_port(kick, PciVirtio::notify_port(at, queue))
            {
                log::warn!("{}", crate::error::chain(&error));
            }
        }
    }
}

/// A bus is there as long as the machine.
fn bus(bus: &Weak<Bus>) -> io::Result<Arc<Bus>> {
    bus.upgrade().ok_or_else(|| io::ErrorKind::NotFound.into())
}

fn outside_window() -> io::Error {
    io::Error::other("it is outside the window of PCI devices")
}

/// What is left of a device that was taken away: it ignores writes and reads as zero.
struct Grave;

impl BusDevice for Grave {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _: u64, _: &[u8]) {}
}

/// The notification ports of a device, for accesses that no ioeventfd takes: reads.
struct NotifyPorts(Kicks);

impl BusDevice for NotifyPorts {
    fn read(&mut self, _: u64, _: &mut [u8]) {}

    fn write(&mut self, offset: u64, _: &[u8]) {
        let queue = usize::try_from(offset / 4).unwrap_or(usize::MAX);
        if let Some(kick) = self.0.get(queue) {
            // Only a full counter refuses, and then the io loop is awake already.
            let _ = kick.write(1);
        }
    }
}

impl BarMapper for Bars {
    fn moved(&self, slot: u8, old: Option<u64>, new: Option<u64>) -> io::Result<()> {
        let registers = self.registers(slot)?;
        if let Some(old) = old {
            bus(&self.mmio)?.remove(old);
        }
        new.map_or(Ok(()), |new| self.map(new, &registers))
    }

    fn moved_io(&self, slot: u8, old: Option<u16>, new: Option<u16>) -> io::Result<()> {
        let Registers { kicks, .. } = self.registers(slot)?;
        if let Some(old) = old {
            self.unmap_ports(old, &kicks);
        }
        new.map_or(Ok(()), |new| self.map_ports(new, &kicks))
    }
}

/// The GSIs behind a device's MSI-X vectors.
pub(crate) struct MsiGsis {
    vm: Arc<kvm::Vm>,
    gsis: Vec<u32>,
}

impl MsiGsis {
    /// Takes `count` GSIs.
    pub(crate) fn new(vm: Arc<kvm::Vm>, count: usize) -> Result<Self, KvmError> {
        let mut this = Self { vm, gsis: Vec::new() };
        for _ in 0..count {
            this.gsis.push(this.vm.allocate_msi()?);
        }
        Ok(this)
    }

    /// Lets a write to each descriptor raise the vector with its index.
    pub(crate) fn bind<'a>(&self, irqfds: impl Iterator<Item = &'a EventFd>) -> Result<(), KvmError> {
        irqfds
            .zip(&self.gsis)
            .try_for_each(|(fd, gsi)| self.vm.register_irqfd(fd, *gsi))
    }
}

impl MsiRouter for MsiGsis {
    fn route(&self, vector: u16, message: MsiMessage) -> io::Result<()> {
        let gsi = self
            .gsis
            .get(usize::from(vector))
            .ok_or(io::ErrorKind::InvalidInput)?;
        self.vm.route_msi(*gsi, message).map_err(io::Error::other)
    }
}

impl Drop for MsiGsis {
    fn drop(&mut self) {
        self.gsis.iter().for_each(|gsi| self.vm.free_msi(*gsi));
    }
}
