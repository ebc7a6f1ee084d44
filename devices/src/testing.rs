//! The driver's side of virtio in plain memory, for unit tests and fuzz targets.
//!
//! [`Driver`] lays a split queue out in guest memory and offers chains to it; [`Recorder`] stands for interrupt, clock
//! and io loop; [`Inline`] is a [`LaneHost`] that runs everything on the caller's thread.

#![allow(clippy::unwrap_used, reason = "a test helper fails the test")]

mod block;
mod ledger;
mod random;

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, VolatileSlice};

pub use block::{BlockDriver, BlockRequest};
pub use ledger::{Account, LEDGER_START, Ledger};
pub use random::Random;

use crate::GuestMemory;
use crate::timer::Clock;
use crate::virtio::{
    Buffers, ConfigSpace, Io, Irq, Job, Lane, LaneHost, LaneId, Queue, QueueConfig, Vector, Watch,
};

/// Plain guest memory of `len` bytes from address zero.
pub fn memory(len: usize) -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), len)]).unwrap()
}

/// Buffers of these pieces.
pub fn buffers<'m>(pieces: &'m mut [&mut [u8]]) -> Buffers<'m> {
    let mut buffers = Buffers::new();
    for piece in pieces {
        buffers.push(&VolatileSlice::from(&mut **piece));
    }
    buffers
}

/// Counts interrupts, keeps watched descriptors, and tells a time that stands still by itself.
#[derive(Default)]
pub struct Recorder {
    /// Config interrupts.
    pub config: AtomicUsize,
    /// Queue interrupts, of all queues.
    pub queue: AtomicUsize,
    /// The configuration space that the driver sees.
    pub space: ConfigSpace,
    /// What the device watches.
    pub watched: Mutex<Vec<(RawFd, u32)>>,
    moment: Mutex<Option<Instant>>,
}

impl Recorder {
    /// Queue interrupts since the last call.
    pub fn take_interrupts(&self) -> usize {
        self.queue.swap(0, Ordering::Relaxed)
    }

    /// Lets time pass.
    pub fn pass(&self, time: Duration) {
        let later = self.now() + time;
        *self.moment.lock().unwrap() = Some(later);
    }

    /// Whether anybody has looked at the time.
    pub fn was_asked_for_time(&self) -> bool {
        self.moment.lock().unwrap().is_some()
    }
}

impl Clock for Recorder {
    fn now(&self) -> Instant {
        *self.moment.lock().unwrap().get_or_insert_with(Instant::now)
    }
}

impl Irq for Recorder {
    fn raise(&self, vector: Vector) {
        let count = match vector {
            Vector::Config => &self.config,
            Vector::Queue(_) => &self.queue,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }
}

impl Watch for Recorder {
    fn add(&self, fd: RawFd, token: u32) -> std::io::Result<()> {
        self.watched.lock().unwrap().push((fd, token));
        Ok(())
    }
    fn remove(&self, fd: RawFd) -> std::io::Result<()> {
        self.watched.lock().unwrap().retain(|(watched, _)| *watched != fd);
        Ok(())
    }
}

/// Runs lanes on the caller's thread; feed events with [`Inline::event`].
#[derive(Default)]
pub struct Inline {
    /// What the lanes watch.
    pub watch: Recorder,
    lanes: Mutex<BTreeMap<LaneId, Box<Lane>>>,
}

impl Inline {
    /// Delivers an event to every lane.
    pub fn event(&self, token: u32) {
        for lane in self.lanes.lock().unwrap().values_mut() {
            lane.on_event(token, &self.watch);
        }
    }

    /// How many lanes run.
    pub fn len(&self) -> usize {
        self.lanes.lock().unwrap().len()
    }

    /// True when no lane runs.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl LaneHost for Inline {
    fn attach(&self, mut lane: Box<Lane>) -> LaneId {
        lane.start(&self.watch);
        let mut lanes = self.lanes.lock().unwrap();
        let id = lanes.keys().next_back().map_or(0, |last| last + 1);
        lanes.insert(id, lane);
        id
    }
    fn detach(&self, id: LaneId) -> Box<Lane> {
        self.watch.watched.lock().unwrap().clear();
        let mut lane = self.lanes.lock().unwrap().remove(&id).unwrap();
        lane.reset();
        lane
    }
    fn run(&self, id: LaneId, job: Job) {
        job(self.lanes.lock().unwrap().get_mut(&id).unwrap(), &self.watch);
    }
}

/// One piece of a chain, as the driver describes it.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    /// Guest address.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// True when the device writes it.
    pub write: bool,
}

/// A piece that the device reads.
pub fn readable(address: u64, len: u32) -> Piece {
    Piece {
        address,
        len,
        write: false,
    }
}

/// A piece that the device writes.
pub fn writable(address: u64, len: u32) -> Piece {
    Piece {
        address,
        len,
        write: true,
    }
}

/// The driver of one queue, laid out in guest memory from `base`.
pub struct Driver<'m> {
    mem: &'m GuestMemory,
    config: QueueConfig,
    next_desc: u16,
    avail: u16,
    used: u16,
}

impl<'m> Driver<'m> {
    /// Lays a queue of `size` entries out from `base` (aligned to 16; it takes less than 64 bytes an entry).
    pub fn new(mem: &'m GuestMemory, base: u64, size: u16) -> Self {
        let entries = u64::from(size);
        let config = QueueConfig {
            max_size: size,
            size,
            ready: true,
            desc_table: base,
            avail_ring: base + 16 * entries,
            used_ring: (base + 18 * entries + 6).next_multiple_of(4),
        };
        mem.write_slice(&vec![0; usize::from(size) * 32 + 32], GuestAddress(base))
            .unwrap();
        Self {
            mem,
            config,
            next_desc: 0,
            avail: 0,
            used: 0,
        }
    }

    /// Where the queue lies.
    pub fn config(&self) -> QueueConfig {
        self.config
    }

    /// The device's end of it.
    pub fn queue(&self, event_idx: bool) -> Queue {
        Queue::new(self.config, event_idx, self.mem).unwrap()
    }

    /// Writes a descriptor as it is.
    pub fn raw_descriptor(&self, table: u64, index: u16, piece: Piece, flags: u16, next: u16) {
        let at = GuestAddress(table + 16 * u64::from(index));
        let flags = flags | if piece.write { 2 } else { 0 };
        let rest = u64::from(piece.len) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.mem.write_obj(piece.address, at).unwrap();
        self.mem.write_obj(rest, GuestAddress(at.0 + 8)).unwrap();
    }

    /// Offers a chain; returns its head.
    pub fn offer(&mut self, pieces: &[Piece]) -> u16 {
        let head = self.next_desc;
        for (i, piece) in pieces.iter().enumerate() {
            let index = self.next_desc;
            self.next_desc = (self.next_desc + 1) % self.config.size;
            let last = i + 1 == pieces.len();
            self.raw_descriptor(
                self.config.desc_table,
                index,
                *piece,
                u16::from(!last),
                self.next_desc,
            );
        }
        self.offer_head(head);
        head
    }

    /// Offers a chain through an indirect table at `table`; returns its head.
    pub fn offer_indirect(&mut self, table: u64, pieces: &[Piece]) -> u16 {
        for (i, piece) in (0u16..).zip(pieces) {
            let last = usize::from(i) + 1 == pieces.len();
            self.raw_descriptor(table, i, *piece, u16::from(!last), i + 1);
        }
        let head = self.next_desc;
        self.next_desc = (self.next_desc + 1) % self.config.size;
        let len = 16 * u32::try_from(pieces.len()).unwrap();
        self.raw_descriptor(self.config.desc_table, head, readable(table, len), 4, 0);
        self.offer_head(head);
        head
    }

    /// Makes a head available as it is.
    pub fn offer_head(&mut self, head: u16) {
        let slot = u64::from(self.avail % self.config.size);
        self.mem
            .write_obj(head, GuestAddress(self.config.avail_ring + 4 + 2 * slot))
            .unwrap();
        self.avail = self.avail.wrapping_add(1);
        self.set_avail_index(self.avail);
    }

    /// Writes the available index as it is.
    pub fn set_avail_index(&self, index: u16) {
        self.mem
            .write_obj(index, GuestAddress(self.config.avail_ring + 2))
            .unwrap();
    }

    /// Writes the flags of the available ring.
    pub fn set_avail_flags(&self, flags: u16) {
        self.mem
            .write_obj(flags, GuestAddress(self.config.avail_ring))
            .unwrap();
    }

    /// Asks for an interrupt when the used index passes `index` (with EVENT_IDX).
    pub fn set_used_event(&self, index: u16) {
        let at = self.config.avail_ring + 4 + 2 * u64::from(self.config.size);
        self.mem.write_obj(index, GuestAddress(at)).unwrap();
    }

    /// The device's wish in the used ring: its flags, and its event index.
    pub fn notify_wish(&self) -> (u16, u16) {
        let event = self.config.used_ring + 4 + 8 * u64::from(self.config.size);
        let read = |at| self.mem.read_obj(GuestAddress(at)).unwrap();
        (read(self.config.used_ring), read(event))
    }

    /// The next answer: head and count of bytes written.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self
            .mem
            .read_obj(GuestAddress(self.config.used_ring + 2))
            .unwrap();
        if index == self.used {
            return None;
        }
        let slot = u64::from(self.used % self.config.size);
        let entry: u64 = self
            .mem
            .read_obj(GuestAddress(self.config.used_ring + 4 + 8 * slot))
            .unwrap();
        self.used = self.used.wrapping_add(1);
        Some((
            u16::try_from(entry & 0xffff).unwrap(),
            u32::try_from(entry >> 32).unwrap(),
        ))
    }
}

/// Lends `queues` to a device, with `recorder` as interrupt, clock and loop.
pub fn io<'a>(
    mem: &'a GuestMemory,
    queues: &'a mut [Queue],
    recorder: &'a Recorder,
    features: u64,
) -> Io<'a> {
    Io {
        mem,
        queues,
        kicks: &[],
        irq: recorder,
        watch: recorder,
        config: &recorder.space,
        clock: recorder,
        features,
        again: None,
    }
}

/// A shared recorder.
pub fn recorder() -> Arc<Recorder> {
    Arc::default()
}
