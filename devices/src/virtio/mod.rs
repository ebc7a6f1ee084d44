//! Virtio 1.2: what a device is ([`VirtioDevice`]), and the two halves of its state ([`VirtioSlot`], [`Lane`]).

pub mod balloon;
pub mod block;
pub mod buffers;
pub mod config_space;
#[cfg(test)]
mod echo;
mod health;
mod image_lock;
pub mod lane;
pub mod latency;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod pci;
pub mod pmem;
pub mod queue;
pub mod rng;
pub mod slot;
pub mod state;
pub mod throttle;
pub mod vhost_user;
pub mod vsock;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;
use vmm_sys_util::eventfd::EventFd;

pub use buffers::Buffers;
pub use config_space::ConfigSpace;
pub use health::{Health, Report};
pub use image_lock::LockError;
pub use lane::{Job, Lane, LaneHost, LaneId};
pub use latency::{Histogram, Latency};
pub use queue::{Chain, ChainStorage, Queue, QueueConfig, QueueError, Ring};
pub use slot::{SlotState, Transport, VirtioSlot};
pub use state::{Blob, StateError};
pub use throttle::Throttle;

use crate::GuestMemory;
use crate::timer::Clock;

/// Feature bits that belong to the transport and not to one device kind (virtio 1.2 §6).
pub mod feature {
    /// Indirect descriptor tables.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Notification suppression by index.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Virtio 1.0 or later.
    pub const VERSION_1: u64 = 1 << 32;
    /// What every device offers.
    pub const COMMON: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;
}

/// The kind of a device; the value is its virtio device id (virtio 1.2 §5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum DeviceKind {
    /// Network card.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Entropy source.
    Entropy = 4,
    /// Memory balloon.
    Balloon = 5,
    /// Memory that is plugged in and out.
    Mem = 24,
    /// Memory with a file behind it.
    Pmem = 27,
    /// Sockets between guest and host.
    Vsock = 19,
}

impl DeviceKind {
    /// The virtio device id.
    pub fn id(self) -> u16 {
        self as u16
    }

    /// The name in metrics and events.
    pub fn name(self) -> &'static str {
        match self {
            DeviceKind::Net => "net",
            DeviceKind::Block => "block",
            DeviceKind::Entropy => "entropy",
            DeviceKind::Vsock => "vsock",
            DeviceKind::Mem => "memory_hotplug",
            DeviceKind::Balloon => "balloon",
            DeviceKind::Pmem => "pmem",
        }
    }

    /// What distinguishes the devices of this kind; none for a kind of which a machine has one.
    pub fn label(self) -> Option<&'static str> {
        match self {
            DeviceKind::Net => Some("iface"),
            DeviceKind::Block => Some("drive"),
            DeviceKind::Entropy | DeviceKind::Balloon | DeviceKind::Vsock | DeviceKind::Mem => None,
            DeviceKind::Pmem => Some("pmem"),
        }
    }

    /// PCI class code (base class, sub-class) under which operating systems list the device.
    pub fn pci_class(self) -> (u8, u8) {
        match self {
            DeviceKind::Net => (0x02, 0x00),
            DeviceKind::Block => (0x01, 0x80),
            DeviceKind::Entropy => (0xff, 0x00),
            DeviceKind::Balloon | DeviceKind::Mem | DeviceKind::Pmem => (0x05, 0x80),
            DeviceKind::Vsock => (0x07, 0x80),
        }
    }
}

/// What a transport needs to know of a device; fixed for its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// What it is.
    pub kind: DeviceKind,
    /// The largest size of each queue.
    pub queue_sizes: Vec<u16>,
    /// Offered features, [`feature::COMMON`] included.
    pub features: u64,
}

/// What an interrupt is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vector {
    /// The configuration space or the status changed.
    Config,
    /// The queue with this index has used buffers.
    Queue(u16),
}

/// Interrupts towards the driver. Raising never blocks and takes no lock.
pub trait Irq: Send + Sync {
    /// Tells the driver.
    fn raise(&self, vector: Vector);
}

/// A device's interrupts, counted since its creation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct InterruptMetrics {
    /// Interrupts raised, those included that the driver has masked.
    pub triggers: u64,
    /// Changes of where an interrupt goes.
    pub config_updates: u64,
}

/// Registers a device's own file descriptors with the io loop that runs it.
pub trait Watch {
    /// Calls [`VirtioDevice::on_event`] with `token` on every new readiness of `fd` (edge-triggered: the device
    /// reads until it would block, or tries again by itself when its queue is kicked).
    fn add(&self, fd: RawFd, token: u32) -> io::Result<()>;
    /// Stops watching `fd`.
    fn remove(&self, fd: RawFd) -> io::Result<()>;
}

/// What is lent to a device for one call.
pub struct Io<'a> {
    /// The guest's memory.
    pub mem: &'a GuestMemory,
    /// The running queues; empty while the driver is not ready.
    pub queues: &'a mut [Queue],
    /// What the driver's notifications of each queue signal; the loop watches them for the queues that are ready. A
    /// device that has another listen to them may remove them from its loop.
    pub kicks: &'a [Arc<EventFd>],
    /// The way to interrupt the driver.
    pub irq: &'a dyn Irq,
    /// The io loop.
    pub watch: &'a dyn Watch,
    /// The configuration space as the driver sees it. A device that changes its own while it serves a queue sets it
    /// here, before its answer; whether the driver is interrupted for it is up to the device.
    pub config: &'a ConfigSpace,
    /// The time. It costs a look, so a device asks only when it must know.
    pub clock: &'a dyn Clock,
    /// The features that the driver accepted.
    pub features: u64,
    /// A queue to be called for again, after the loop has served its other events. A device that leaves work behind
    /// sets it, so that a driver that refills a queue without end cannot keep the loop for itself.
    pub again: Option<u16>,
}

/// A failure while a device works. The lane marks the device as needing a reset; the machine goes on.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver broke the protocol.
    #[error("the driver broke the virtqueue protocol")]
    Queue(#[from] QueueError),
    /// The host refused something that the device cannot do without.
    #[error("cannot {op}")]
    Host {
        /// What was tried.
        op: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// Why a change of a live device was refused; nothing changed.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    /// The body is not this device's patch.
    #[error("invalid patch")]
    Json(#[from] serde_json::Error),
    /// The device cannot take it.
    #[error("{0}")]
    Refused(String),
    /// The device's own reason.
    #[error(transparent)]
    Device(Box<dyn std::error::Error + Send + Sync>),
    /// The host refused.
    #[error("cannot {op}")]
    Host {
        /// What was tried, with the object.
        op: String,
        /// Why not.
        source: io::Error,
    },
}

/// A part of a device that serves queues of its own.
pub struct Sibling {
    /// The part.
    pub device: Box<dyn VirtioDevice>,
    /// Its queues. The others stay with the device that it was split off from.
    pub queues: Vec<u16>,
}

/// The behaviour of a virtio device.
///
/// It owns its backend and its counters; memory, queues and interrupt are lent per call. Between `activate` and
/// `reset` it lives on an io thread, otherwise in its slot.
pub trait VirtioDevice: Send {
    /// Plain facts, the same for the whole life.
    fn info(&self) -> &DeviceInfo;
    /// Splits off what serves some of the queues beside this device, each in a lane of its own and perhaps on another
    /// thread. Called once, by the slot. Siblings share behind an `Arc` of their own what they must; the first one, this
    /// device, has the configuration space, is changed, and saves and loads for all.
    fn split(&mut self) -> Vec<Sibling> {
        Vec::new()
    }
    /// The device that this one was split off from has changed, or was loaded: takes over what they share. Nothing of
    /// either is in flight.
    fn refresh(&mut self, _io: &mut Io<'_>) {}
    /// The device's configuration space; it is shown to the driver after creation, `reset`, `update` and
    /// `write_config`, and otherwise when the device sets [`Io::config`].
    fn config_space(&self) -> &[u8];
    /// The driver writes `data`, at most 8 bytes, at `offset` of the configuration space, inside of it. The device
    /// takes what the driver may change, in its own copy, which is then shown; all else has no effect.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}
    /// The driver is ready (also called once after a restore): watch own file descriptors.
    fn activate(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError>;
    /// The driver has kicked `queue`, which is ready. Also called without cause after a resume.
    fn on_queue(&mut self, queue: u16, io: &mut Io<'_>) -> Result<(), DeviceError>;
    /// A watched descriptor became ready. Also called without cause after a resume.
    fn on_event(&mut self, _token: u32, _io: &mut Io<'_>) -> Result<(), DeviceError> {
        Ok(())
    }
    /// The guest's memory has gained or lost a region. Called for devices that run, paused or not.
    fn memory_changed(&mut self, _io: &mut Io<'_>) -> Result<(), DeviceError> {
        Ok(())
    }
    /// Finishes what is in flight, before a pause.
    fn quiesce(&mut self, _io: &mut Io<'_>) -> Result<(), DeviceError> {
        Ok(())
    }
    /// The driver is gone, or the device is broken: waits for what could still touch the guest's memory. Called on the io
    /// thread.
    fn end(&mut self) {}
    /// Forgets what it knows of the driver; counters and backend stay. Called on the io thread when this device and its
    /// siblings have ended. The loop no longer watches anything.
    fn reset(&mut self) {}
    /// Changes the live device as its own `Patch` says, wholly or not at all.
    fn update(&mut self, patch: Value, io: &mut Io<'_>) -> Result<(), UpdateError>;
    /// What a snapshot must keep beyond config and queues.
    fn save(&self) -> Blob;
    /// Takes a saved state into a new device of the same config.
    fn load(&mut self, state: Blob) -> Result<(), StateError>;
    /// What users can ask for beyond the config, as one JSON object.
    fn status(&self) -> Value {
        Value::Null
    }
    /// The counters since creation, as one JSON object.
    fn metrics(&self) -> Value;
    /// How long what it did took, by name.
    fn histograms(&self) -> Vec<(&'static str, Histogram)> {
        Vec::new()
    }
}
