//! [`MmioVirtio`]: the virtio MMIO transport (virtio 1.2 §4.2), version 2.
//!
//! vCPU threads access its registers under its own lock. The VMM binds the slot's kicks to [`QUEUE_NOTIFY`], with the
//! queue's index as 32-bit datamatch. Interrupts are pulses on an [`EdgeLine`].
//!
//! The interrupt status keeps the bit of used buffers from the first interrupt to the next reset, whatever the driver
//! acknowledges: drivers look into their queues anyway, and the line needs no lowering. Acknowledging this bit
//! ([`INTERRUPT_ACK`], [`ACK_QUEUES`]) thus changes nothing, and the VMM binds it to [`MmioVirtio::ignored`], which
//! saves an exit with each interrupt.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::queue::QueueConfig;
use super::slot::{SlotState, Transport, VirtioSlot};
use super::{InterruptMetrics, Irq, LaneHost, StateError, Vector, VirtioDevice};
use crate::SharedMemory;
use crate::bus::BusDevice;
use crate::interrupt_line::EdgeLine;

/// Bytes of the register range.
pub const RANGE_LEN: u64 = 0x1000;
/// Offset of the register that notifies a queue.
pub const QUEUE_NOTIFY: u64 = 0x50;
/// Offset of the register that acknowledges interrupts.
pub const INTERRUPT_ACK: u64 = 0x64;
/// What a driver writes to [`INTERRUPT_ACK`] when there are used buffers, and nothing else.
pub const ACK_QUEUES: u32 = interrupt::QUEUE;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
/// No vendor has claimed this device.
const VENDOR: u32 = 0;

/// Register offsets (virtio 1.2 §4.2.2).
mod register {
    pub(super) const MAGIC: u64 = 0x00;
    pub(super) const VERSION: u64 = 0x04;
    pub(super) const DEVICE_ID: u64 = 0x08;
    pub(super) const VENDOR_ID: u64 = 0x0c;
    pub(super) const DEVICE_FEATURES: u64 = 0x10;
    pub(super) const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub(super) const DRIVER_FEATURES: u64 = 0x20;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub(super) const QUEUE_SEL: u64 = 0x30;
    pub(super) const QUEUE_NUM_MAX: u64 = 0x34;
    pub(super) const QUEUE_NUM: u64 = 0x38;
    pub(super) const QUEUE_READY: u64 = 0x44;
    pub(super) const INTERRUPT_STATUS: u64 = 0x60;
    pub(super) const STATUS: u64 = 0x70;
    pub(super) const QUEUE_DESC_LOW: u64 = 0x80;
    pub(super) const QUEUE_DESC_HIGH: u64 = 0x84;
    pub(super) const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub(super) const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub(super) const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub(super) const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub(super) const SHM_LEN_LOW: u64 = 0xb0;
    pub(super) const SHM_BASE_HIGH: u64 = 0xbc;
    pub(super) const CONFIG_GENERATION: u64 = 0xfc;
    pub(super) const CONFIG: u64 = 0x100;
}

/// Interrupt status bits (virtio 1.2 §4.2.2).
mod interrupt {
    pub(super) const QUEUE: u32 = 1;
    pub(super) const CONFIG: u32 = 2;
}

/// The saved state of transport, slot and device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    interrupt_status: u32,
    slot: SlotState,
}

struct MmioIrq {
    status: AtomicU32,
    line: Arc<dyn EdgeLine>,
    /// Interrupts raised; loose order, as it is only counted.
    triggers: AtomicU64,
}

impl Irq for MmioIrq {
    fn raise(&self, vector: Vector) {
        self.triggers.fetch_add(1, Ordering::Relaxed);
        let bit = match vector {
            Vector::Config => interrupt::CONFIG,
            Vector::Queue(_) => interrupt::QUEUE,
        };
        self.status.fetch_or(bit, Ordering::SeqCst);
        self.line.pulse();
    }
}

/// A virtio device as a range of registers.
pub struct MmioVirtio {
    irq: Arc<MmioIrq>,
    ignored: EventFd,
    slot: VirtioSlot,
}

impl MmioVirtio {
    /// Puts `device` behind registers, with `line` for its interrupts. Fails when the host has no descriptor left.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        line: Arc<dyn EdgeLine>,
        memory: SharedMemory,
        host: Arc<dyn LaneHost>,
    ) -> io::Result<Self> {
        let irq = Arc::new(MmioIrq {
            status: AtomicU32::new(0),
            line,
            triggers: AtomicU64::new(0),
        });
        Ok(Self {
            slot: VirtioSlot::new(device, Arc::clone(&irq) as Arc<dyn Irq>, memory, host)?,
            irq,
            ignored: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    /// Takes register writes without an effect; nobody reads it.
    pub fn ignored(&self) -> &EventFd {
        &self.ignored
    }

    /// What a snapshot keeps. The machine is paused.
    pub fn save(&self) -> State {
        State {
            interrupt_status: self.irq.status.load(Ordering::SeqCst),
            slot: self.slot.save(),
        }
    }

    /// Takes a saved state into a new transport with a device of the same config. A device that ran starts with
    /// the slot's `resume`. On failure the transport must not be used.
    pub fn load(&mut self, state: State) -> Result<(), StateError> {
        if state.interrupt_status & !(interrupt::QUEUE | interrupt::CONFIG) != 0 {
            return Err(StateError::Inconsistent {
                kind: "virtio-mmio",
                what: format!("there is no interrupt status {:#x}", state.interrupt_status),
            });
        }
        self.irq.status.store(state.interrupt_status, Ordering::SeqCst);
        self.slot.load(state.slot)
    }

    /// A control register; none when the driver can only write it, or it does not exist.
    fn register(&self, offset: u64) -> Option<u32> {
        let queue = self.slot.queue();
        Some(match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => u32::from(self.slot.info().kind.id()),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => self.slot.device_features(),
            register::QUEUE_NUM_MAX => queue.map_or(0, |q| u32::from(q.max_size)),
            register::QUEUE_READY => queue.map_or(0, |q| u32::from(q.ready)),
            register::INTERRUPT_STATUS => self.irq.status.load(Ordering::SeqCst),
            register::STATUS => u32::from(self.slot.status()),
            // No device has shared memory: every region has the length -1.
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            register::CONFIG_GENERATION => u32::from(self.slot.config_generation()),
            _ => return None,
        })
    }

    fn set_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SEL => self.slot.driver.device_features_select = value,
            register::DRIVER_FEATURES => self.slot.set_driver_features(value),
            register::DRIVER_FEATURES_SEL => self.slot.driver.driver_features_select = value,
            register::QUEUE_SEL => self.slot.driver.queue_select = saturate(value),
            QUEUE_NOTIFY => self.slot.kick(saturate(value)),
            INTERRUPT_ACK => {
                self.irq
                    .status
                    .fetch_and(!(value & interrupt::CONFIG), Ordering::SeqCst);
            }
            register::STATUS => self.set_status(value),
            _ => {
                if let Some(queue) = self.slot.queue_mut() {
                    set_queue_register(queue, offset, value);
                }
            }
        }
    }

    fn set_status(&mut self, value: u32) {
        let Ok(value) = u8::try_from(value) else {
            return;
        };
        self.slot.set_status(value);
        if value == 0 {
            // The lane is back, so nothing raises any more.
            self.irq.status.store(0, Ordering::SeqCst);
        }
    }
}

fn set_queue_register(queue: &mut QueueConfig, offset: u64, value: u32) {
    match offset {
        register::QUEUE_NUM => queue.size = saturate(value),
        register::QUEUE_READY => queue.ready = value == 1,
        register::QUEUE_DESC_LOW => set_half(&mut queue.desc_table, 0, value),
        register::QUEUE_DESC_HIGH => set_half(&mut queue.desc_table, 1, value),
        register::QUEUE_DRIVER_LOW => set_half(&mut queue.avail_ring, 0, value),
        register::QUEUE_DRIVER_HIGH => set_half(&mut queue.avail_ring, 1, value),
        register::QUEUE_DEVICE_LOW => set_half(&mut queue.used_ring, 0, value),
        register::QUEUE_DEVICE_HIGH => set_half(&mut queue.used_ring, 1, value),
        _ => {}
    }
}

fn set_half(address: &mut u64, half: u32, value: u32) {
    let shift = 32 * half;
    *address = *address & !(0xffff_ffff << shift) | u64::from(value) << shift;
}

/// Indexes and sizes are 16 bits wide; what does not fit is as invalid as the largest of them.
fn saturate(value: u32) -> u16 {
    u16::try_from(value).unwrap_or(u16::MAX)
}

impl Transport for MmioVirtio {
    fn slot(&mut self) -> &mut VirtioSlot {
        &mut self.slot
    }

    fn interrupts(&self) -> InterruptMetrics {
        InterruptMetrics {
            triggers: self.irq.triggers.load(Ordering::Relaxed),
            config_updates: 0,
        }
    }
}

impl BusDevice for MmioVirtio {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            return self.slot.read_config(offset, data);
        }
        // Control registers are read and written whole (virtio 1.2 §4.2.2.2).
        if let (4, Some(value)) = (data.len(), self.register(offset)) {
            data.copy_from_slice(&value.to_le_bytes());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            return self.slot.write_config(offset, data);
        }
        if let &[a, b, c, d] = data {
            self.set_register(offset, u32::from_le_bytes([a, b, c, d]));
        }
    }
}

#[cfg(test)]
mod tests;
