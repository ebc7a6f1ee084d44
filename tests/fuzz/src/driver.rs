//! The driver of a virtio device, which may do anything a guest can do to the queues.
//!
//! [`Machine`] holds a device in its slot, on a lane that runs on the caller's thread; [`Op`] is one thing that the
//! driver, or the control thread, does to it.

use std::sync::Arc;

use arbitrary::Arbitrary;
use devices::testing::{Driver, Inline, Piece, Recorder};
use devices::virtio::slot::status;
use devices::virtio::{UpdateError, VirtioDevice, VirtioSlot, feature};
use devices::{GuestMemory, SharedMemory};
use serde_json::{Value, json};
use vm_memory::{Bytes, GuestAddress};

use crate::MEMORY;

/// Entries of every queue: few, so that they wrap soon.
pub const QUEUE_SIZE: u16 = 16;
/// Where the rings of queue N lie: `RINGS + N * RINGS_STEP`.
const RINGS: u64 = 0;
const RINGS_STEP: u64 = 0x800;
/// Where indirect tables lie.
const TABLES: u64 = 0x4000;
/// Where request headers lie, [`HEADER_STEP`] bytes apart.
pub const HEADERS: u64 = 0x5000;
/// Bytes between two headers.
pub const HEADER_STEP: u64 = 32;
/// Where data lies.
pub const DATA: u64 = 0x6000;
/// The most pieces that an operation puts into a chain.
const MAX_PIECES: usize = 24;

/// A guest address: mostly one that makes sense.
#[derive(Arbitrary, Debug, Clone, Copy)]
pub enum Place {
    /// A header.
    Header(u8),
    /// Somewhere in the data.
    Data(u16),
    /// Around the end of memory.
    End(u8),
    /// Anywhere.
    Any(u64),
}

impl Place {
    fn address(self) -> u64 {
        match self {
            Place::Header(index) => HEADERS + HEADER_STEP * u64::from(index % 32),
            Place::Data(offset) => DATA + u64::from(offset),
            Place::End(offset) => MEMORY - 128 + u64::from(offset),
            Place::Any(address) => address,
        }
    }
}

/// A length in bytes: mostly one that makes sense.
#[derive(Arbitrary, Debug, Clone, Copy)]
pub enum Length {
    /// A header of 12 or 16 bytes.
    Header(bool),
    /// Whole sectors.
    Sectors(u8),
    /// A few bytes.
    Small(u8),
    /// Anything.
    Any(u32),
}

impl Length {
    fn bytes(self) -> u32 {
        match self {
            Length::Header(long) => {
                if long {
                    16
                } else {
                    12
                }
            }
            Length::Sectors(count) => 512 * u32::from(count % 16),
            Length::Small(bytes) => u32::from(bytes),
            Length::Any(bytes) => bytes,
        }
    }
}

/// One thing that happens to a running device.
#[derive(Arbitrary, Debug)]
pub enum Op {
    /// The driver offers a chain, in the table or through an indirect one.
    Offer {
        /// Which queue.
        queue: u8,
        /// Place, length, and whether the device writes it.
        pieces: Vec<(Place, Length, bool)>,
        /// Through an indirect table.
        indirect: bool,
    },
    /// The driver writes to its memory, rings included.
    Write(u16, [u8; 8]),
    /// The driver writes one field of a ring.
    Ring(u8, RingField, u16),
    /// The driver writes a descriptor.
    Descriptor(u8, u8, Place, Length, u16, u16),
    /// The driver kicks a queue.
    Kick(u8),
    /// The device's own descriptors are reported ready.
    Ready,
    /// The driver resets the device and sets it up anew, with these features and without these queues.
    Reset(u64, u8),
    /// The driver resets the device and leaves it.
    Leave,
    /// The control thread pauses, saves and resumes.
    Pause,
}

/// Fields of the rings that a driver writes.
#[derive(Arbitrary, Debug, Clone, Copy)]
pub enum RingField {
    /// `avail.idx`
    AvailIndex,
    /// `avail.flags`
    AvailFlags,
    /// `avail.used_event`
    UsedEvent,
    /// A new entry in the available ring.
    Head,
}

/// A device with its driver.
pub struct Machine<'m> {
    mem: &'m GuestMemory,
    drivers: Vec<Driver<'m>>,
    host: Arc<Inline>,
    slot: VirtioSlot,
}

impl<'m> Machine<'m> {
    /// Sets `device` up with those of `features` that it offers.
    pub fn new(mem: &'m GuestMemory, device: Box<dyn VirtioDevice>, features: u64) -> Self {
        let host = Arc::new(Inline::default());
        let slot = VirtioSlot::new(
            device,
            Arc::new(Recorder::default()),
            SharedMemory::new(mem.clone()),
            Arc::clone(&host) as _,
        )
        .expect("the host has descriptors left");
        let mut machine = Self {
            mem,
            drivers: Vec::new(),
            host,
            slot,
        };
        machine.set_up(features, 0);
        machine
    }

    fn set_up(&mut self, features: u64, left_out: u8) {
        let features = features & self.slot.info().features | feature::VERSION_1;
        self.slot.set_status(0);
        self.slot.set_status(status::ACKNOWLEDGE | status::DRIVER);
        for half in 0..2 {
            self.slot.driver.driver_features_select = half;
            self.slot.set_driver_features((features >> (32 * half)) as u32);
        }
        let negotiated = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.slot.set_status(negotiated);
        self.drivers.clear();
        for index in 0..self.slot.queue_count() {
            let driver = Driver::new(self.mem, RINGS + RINGS_STEP * u64::from(index), QUEUE_SIZE);
            self.slot.driver.queue_select = index;
            let queue = self
                .slot
                .queue_mut()
                .expect("the features are accepted and the driver is not ready");
            *queue = devices::virtio::QueueConfig {
                max_size: queue.max_size,
                ready: left_out >> (index % 8) & 1 == 0,
                ..driver.config()
            };
            self.drivers.push(driver);
        }
        self.slot.set_status(negotiated | status::DRIVER_OK);
    }

    /// Carries one operation out.
    pub fn run(&mut self, op: &Op) {
        match *op {
            Op::Offer {
                queue,
                ref pieces,
                indirect,
            } => {
                let pieces = pieces
                    .iter()
                    .map(|&(place, length, write)| piece(place.address(), length.bytes(), write));
                self.offer(queue, &pieces.take(MAX_PIECES).collect::<Vec<_>>(), indirect);
            }
            Op::Write(address, ref bytes) => self.write(u64::from(address), bytes),
            Op::Ring(queue, field, value) => {
                let driver = self.driver(queue);
                match field {
                    RingField::AvailIndex => driver.set_avail_index(value),
                    RingField::AvailFlags => driver.set_avail_flags(value),
                    RingField::UsedEvent => driver.set_used_event(value),
                    RingField::Head => driver.offer_head(value),
                }
            }
            Op::Descriptor(queue, index, place, length, flags, next) => {
                let driver = self.driver(queue);
                let piece = piece(place.address(), length.bytes(), flags & 2 != 0);
                driver.raw_descriptor(
                    driver.config().desc_table,
                    u16::from(index) % QUEUE_SIZE,
                    piece,
                    flags,
                    next,
                );
            }
            Op::Kick(queue) => self.kick(queue),
            Op::Ready => self.ready(),
            Op::Reset(features, left_out) => self.set_up(features, left_out),
            Op::Leave => self.slot.set_status(0),
            Op::Pause => {
                self.slot.pause();
                self.slot.save();
                self.slot.resume();
            }
        }
    }

    /// The slot with the device, as the control thread and the transport reach it.
    pub fn slot(&mut self) -> &mut VirtioSlot {
        &mut self.slot
    }

    /// Reports every descriptor that the device watches.
    pub fn ready(&self) {
        crate::ready(&self.host);
    }

    /// Offers a chain, in the table or through an indirect one.
    pub fn offer(&mut self, queue: u8, pieces: &[Piece], indirect: bool) {
        let driver = self.driver(queue);
        if indirect {
            driver.offer_indirect(TABLES + 0x200 * u64::from(queue % 8), pieces);
        } else {
            driver.offer(pieces);
        }
    }

    /// Kicks a queue.
    pub fn kick(&self, queue: u8) {
        self.host.event(u32::from(queue) % self.drivers.len() as u32);
    }

    /// Changes the device as the control thread does.
    pub fn update(&mut self, patch: Value) {
        self.slot.update(patch).expect("the patch is valid");
    }

    /// The driver writes to the configuration space.
    pub fn write_config(&mut self, offset: u64, bytes: &[u8]) {
        self.slot.write_config(offset, bytes);
    }

    /// A field of the configuration space.
    pub fn config(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.slot.read_config(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Changes the device as the control thread does, if the device takes it.
    pub fn try_update(&mut self, patch: Value) -> Result<(), UpdateError> {
        self.slot.update(patch)
    }

    /// The device's counters.
    pub fn metrics(&self) -> Value {
        self.slot.metrics()
    }

    /// Writes to guest memory.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.mem
            .write_slice(bytes, GuestAddress(address))
            .expect("16 bits of address lie in memory");
    }

    fn driver(&mut self, queue: u8) -> &mut Driver<'m> {
        let count = self.drivers.len();
        &mut self.drivers[usize::from(queue) % count]
    }
}

/// Limits that hold requests back for about a millisecond, or none.
pub fn limits(ops: u8, bytes: u16) -> Value {
    let bucket = |size: u64| json!({"size": size, "refill_time": 1});
    json!({"ops": bucket(ops.into()), "bandwidth": bucket(bytes.into())})
}

/// A piece of a chain.
pub fn piece(address: u64, len: u32, write: bool) -> Piece {
    Piece { address, len, write }
}
