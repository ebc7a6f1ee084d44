//! [`PciVirtio`]: the virtio PCI transport (virtio 1.2 §4.1), modern interface only.
//!
//! It is one PCI function: configuration accesses come through the segment, register accesses through the bus, both
//! on vCPU threads and under the function's own lock. Queue notifications and interrupts use neither: they are
//! eventfds that the VMM binds to [`PciVirtio::notify_port`] and to the vectors' GSIs.
//!
//! ```text
//! BAR 0, 32 KiB   0x0000 common configuration    0x4000 MSI-X table
//!                 0x1000 ISR status              0x6000 MSI-X pending bits
//!                 0x2000 device configuration
//! BAR 2, ports    notifications, 4 ports per queue
//! ```

mod common;
mod irq;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::slot::{SlotState, Transport, VirtioSlot};
use super::{DeviceInfo, InterruptMetrics, Irq, LaneHost, StateError, VirtioDevice};
use crate::SharedMemory;
use crate::bus::BusDevice;
use crate::interrupt_line::LevelLine;
use crate::pci::PciFunction;
use crate::pci::config_space::{self, ConfigSpace, Identity, command};
use crate::pci::msix::{self, MsiRouter, Msix};
use irq::PciIrq;

/// Bytes of the BAR; its address is a multiple of this.
pub const BAR_LEN: u64 = 0x8000;
/// Bytes between the notification addresses of two queues.
pub const NOTIFY_MULTIPLIER: u32 = 4;

const ISR_OFFSET: u64 = 0x1000;
const DEVICE_OFFSET: u64 = 0x2000;
const TABLE_OFFSET: u64 = 0x4000;
const PBA_OFFSET: u64 = 0x6000;
/// The BAR of the notification ports.
const NOTIFY_BAR: u8 = 2;
/// The table's room, less the configuration's vector.
const MAX_QUEUES: u64 = (PBA_OFFSET - TABLE_OFFSET) / msix::ENTRY_LEN - 1;

const VENDOR: u16 = 0x1af4;
/// Device ids are this and the virtio device id (virtio 1.2 §4.1.2).
const FIRST_DEVICE: u16 = 0x1040;
const VENDOR_CAPABILITY: u8 = 0x09;

/// Kinds of virtio capabilities (virtio 1.2 §4.1.4).
mod cap {
    pub(super) const COMMON: u8 = 1;
    pub(super) const NOTIFY: u8 = 2;
    pub(super) const ISR: u8 = 3;
    pub(super) const DEVICE: u8 = 4;
    pub(super) const PCI: u8 = 5;
}

/// What a function needs from the machine.
pub struct PciResources {
    /// Where its BAR is before the guest moves it: a multiple of [`BAR_LEN`].
    pub bar_address: u64,
    /// Where its notification ports are before the guest moves them: a multiple of [`PciVirtio::port_count`].
    pub notify_ports: u16,
    /// The interrupt line register: the GSI behind the pin, for guests that do not read ACPI.
    pub interrupt_line: u8,
    /// Routes MSI-X vectors.
    pub router: Arc<dyn MsiRouter>,
    /// Drives the INTA pin.
    pub intx: Arc<dyn LevelLine>,
}

/// The saved state of transport, slot and device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    config: config_space::State,
    msix: msix::State,
    interrupts: irq::State,
    slot: SlotState,
}

/// A virtio device as a PCI function.
pub struct PciVirtio {
    config: ConfigSpace,
    msix: Msix,
    irq: Arc<PciIrq>,
    slot: VirtioSlot,
    /// Offsets of the capabilities that have registers.
    msix_cap: u16,
    pci_cap: u16,
}

impl PciVirtio {
    /// How many MSI-X vectors a device has: one for its configuration and one per queue.
    pub fn vector_count(info: &DeviceInfo) -> usize {
        info.queue_sizes.len() + 1
    }

    /// Makes `device` a function that decodes nothing yet. Fails when the host has no descriptor left, the device
    /// has more queues than the BAR has room for, or the BAR is misaligned.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        resources: PciResources,
        memory: SharedMemory,
        host: Arc<dyn LaneHost>,
    ) -> io::Result<Self> {
        let info = device.info();
        let queues = u16::try_from(info.queue_sizes.len()).unwrap_or(u16::MAX);
        if u64::from(queues) > MAX_QUEUES || !resources.bar_address.is_multiple_of(BAR_LEN) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{queues} queues, or a BAR at {:#x}", resources.bar_address),
            ));
        }
        let mut config = ConfigSpace::new(&Identity {
            vendor: VENDOR,
            device: FIRST_DEVICE + info.kind.id(),
            revision: 1,
            class: info.kind.pci_class(),
            subsystem_vendor: VENDOR,
            subsystem: FIRST_DEVICE + info.kind.id(),
        });
        let irq = Arc::new(PciIrq::new(queues, resources.intx)?);
        let msix = Msix::new(Arc::clone(&irq.vectors), resources.router);
        config.add_bar(BAR_LEN, resources.bar_address);
        config.add_io_bar(Self::port_count(queues), resources.notify_ports);
        config.add_interrupt_pin(resources.interrupt_line);
        let (body, writable) = msix.capability(low(TABLE_OFFSET), low(PBA_OFFSET));
        let msix_cap = config.add_capability(msix::CAPABILITY, &body, &writable);
        let pci_cap = add_virtio_capabilities(&mut config, queues, device.config_space().len());
        Ok(Self {
            config,
            msix,
            slot: VirtioSlot::new(device, Arc::clone(&irq) as Arc<dyn Irq>, memory, host)?,
            irq,
            msix_cap,
            pci_cap,
        })
    }

    /// One descriptor per MSI-X vector, in order; they stay the same for ever.
    pub fn irqfds(&self) -> impl Iterator<Item = &EventFd> {
        self.irq.vectors.irqfds()
    }

    /// How many notification ports a device with that many queues has: a power of two.
    pub fn port_count(queues: u16) -> u16 {
        (queues * 4).next_power_of_two()
    }

    /// The port that notifies `queue`, with the I/O BAR at `ports`; any write does.
    ///
    /// Ports, because a port write is the cheapest exit on every processor: a write to memory that is not there has to
    /// be decoded first on AMD's.
    pub fn notify_port(ports: u16, queue: u16) -> u16 {
        ports + queue * 4
    }

    /// What a snapshot keeps. The machine is paused.
    pub fn save(&self) -> State {
        State {
            config: self.config.save(),
            msix: self.msix.save(),
            interrupts: self.irq.save(),
            slot: self.slot.save(),
        }
    }

    /// Takes a saved state into a new function with a device of the same config. The interrupt controllers have
    /// their state already, and the irqfds are registered: pending interrupts go out. A device that ran starts
    /// with the slot's `resume`. On failure the function must not be used.
    pub fn load(&mut self, state: State) -> Result<(), StateError> {
        self.config.load(&state.config)?;
        self.msix.load(state.msix)?;
        self.follow_config();
        self.irq.load(&state.interrupts)?;
        self.slot.load(state.slot)
    }

    /// Brings the interrupts in line with the command and message control registers.
    fn follow_config(&mut self) {
        let disabled = self.config.command() & command::INTX_DISABLE != 0;
        self.irq.intx.set_disabled(disabled);
        let control = self.config.u16(usize::from(self.msix_cap) + 2) & msix::control::ALL;
        if control == self.msix.control() {
            return;
        }
        // While the mode changes, vectors are masked and the pin is out of use: interrupts wait in the vectors.
        if control & msix::control::ENABLE != 0 {
            self.irq.intx.set_msix(true);
            self.msix.set_control(control);
        } else {
            self.msix.set_control(control);
            self.irq.leave_msix();
        }
    }

    /// In which BAR and where in it the PCI configuration access capability looks, and how many bytes wide.
    fn window(&self) -> Option<(u8, u64, usize)> {
        let capability = usize::from(self.pci_cap);
        let [bar, _] = self.config.u16(capability + 4).to_le_bytes();
        let bar_len = match bar {
            0 => BAR_LEN,
            NOTIFY_BAR => Self::port_count(self.slot.queue_count()).into(),
            _ => return None,
        };
        let offset = u64::from(self.config.u32(capability + 8));
        let len = self.config.u32(capability + 12);
        let inside = offset.is_multiple_of(u64::from(len.max(1))) && offset + u64::from(len) <= bar_len;
        (matches!(len, 1 | 2 | 4) && inside).then_some((bar, offset, usize::try_from(len).ok()?))
    }

    /// A write to a notification port that did not come as one.
    fn notify(&self, port: u64) {
        let queue = port / u64::from(NOTIFY_MULTIPLIER);
        self.slot
            .kick(u16::try_from(queue).expect("there are 2^16 ports"));
    }

    /// True when an access meets the data register of that capability.
    fn is_window(&self, offset: u16) -> bool {
        offset == self.pci_cap + 16
    }
}

/// Adds the virtio capabilities (virtio 1.2 §4.1.4); returns the offset of the PCI configuration access one.
fn add_virtio_capabilities(config: &mut ConfigSpace, queues: u16, config_len: usize) -> u16 {
    let mut add = |kind, offset, len: u64, extra: &[u8], writable: &[u8]| {
        let [o0, o1, o2, o3] = low(offset).to_le_bytes();
        let [l0, l1, l2, l3] = low(len).to_le_bytes();
        let cap_len = 16 + u8::try_from(extra.len()).expect("four bytes at most");
        // Notifications go to ports, everything else to memory.
        let bar = if kind == cap::NOTIFY { NOTIFY_BAR } else { 0 };
        let head = [cap_len, kind, bar, 0, 0, 0, o0, o1, o2, o3, l0, l1, l2, l3];
        config.add_capability(VENDOR_CAPABILITY, &[&head, extra].concat(), writable)
    };
    let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
    let notify_len = u64::from(NOTIFY_MULTIPLIER) * u64::from(queues);
    add(cap::COMMON, 0, common::LEN as u64, &[], &[]);
    add(cap::NOTIFY, 0, notify_len, &multiplier, &[]);
    add(cap::ISR, ISR_OFFSET, 1, &[], &[]);
    if config_len > 0 {
        let len = (TABLE_OFFSET - DEVICE_OFFSET).min(config_len as u64);
        add(cap::DEVICE, DEVICE_OFFSET, len, &[], &[]);
    }
    // The guest chooses BAR, offset and length, and writes the data.
    let writable = [
        0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    ];
    add(cap::PCI, 0, 0, &[0; 4], &writable)
}

fn low(value: u64) -> u32 {
    u32::try_from(value).expect("offsets in the BAR are small")
}

impl Transport for PciVirtio {
    fn slot(&mut self) -> &mut VirtioSlot {
        &mut self.slot
    }

    fn interrupts(&self) -> InterruptMetrics {
        InterruptMetrics {
            triggers: self.irq.triggers.load(Ordering::Relaxed),
            config_updates: self.msix.routings(),
        }
    }
}

impl BusDevice for PciVirtio {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match offset {
            0..ISR_OFFSET => common::read(&self.slot, &self.irq, offset, data),
            ISR_OFFSET => {
                data.fill(0);
                if let Some(first) = data.first_mut() {
                    *first = self.irq.intx.take_isr();
                }
            }
            DEVICE_OFFSET..TABLE_OFFSET => self.slot.read_config(offset - DEVICE_OFFSET, data),
            TABLE_OFFSET..PBA_OFFSET => self.msix.read_table(offset - TABLE_OFFSET, data),
            PBA_OFFSET.. => self.msix.read_pba(offset - PBA_OFFSET, data),
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match offset {
            0..ISR_OFFSET => common::write(&mut self.slot, &self.irq, offset, data),
            DEVICE_OFFSET..TABLE_OFFSET => self.slot.write_config(offset - DEVICE_OFFSET, data),
            TABLE_OFFSET..PBA_OFFSET => self.msix.write_table(offset - TABLE_OFFSET, data),
            _ => {}
        }
    }
}

impl PciFunction for PciVirtio {
    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        self.config.set_interrupt_status(self.irq.intx.pending());
        self.config.read(offset, data);
        // There is nothing to be read at the ports.
        if let Some((0, at, len)) = self.window().filter(|_| self.is_window(offset))
            && let Some(data) = data.get_mut(..len)
        {
            self.read(at, data);
        }
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        let was_master = self.config.command() & command::BUS_MASTER != 0;
        self.config.write(offset, data);
        if was_master && self.config.command() & command::BUS_MASTER == 0 {
            // A kernel that starts another one takes the bus from devices whose memory the other will use.
            common::reset(&mut self.slot, &self.irq);
        }
        self.follow_config();
        if let Some((bar, at, len)) = self.window().filter(|_| self.is_window(offset))
            && let Some(data) = data.get(..len)
        {
            match bar {
                NOTIFY_BAR => self.notify(at),
                _ => self.write(at, data),
            }
        }
    }

    fn bar(&self) -> Option<u64> {
        self.config.bar()
    }

    fn io_bar(&self) -> Option<u16> {
        self.config.io_bar()
    }
}

#[cfg(test)]
mod tests;
