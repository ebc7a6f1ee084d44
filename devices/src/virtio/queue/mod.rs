//! The split virtqueue (virtio 1.2 §2.7), device side.
//!
//! [`QueueConfig`] is what the driver writes through the transport's registers. At DRIVER_OK it becomes a [`Queue`],
//! which an io loop owns. To work on a queue a device opens it: [`Queue::open`] looks the three rings up in guest
//! memory once and gives a [`Ring`], whose operations are then plain bounds-checked loads and stores.
//!
//! ```text
//! let mut ring = queue.open(mem)?;
//! loop {
//!     while ring.pop(&mut chain)? { serve(&chain); ring.push(chain.head(), written); }
//!     ring.publish();                         // makes the answers visible
//!     if !ring.enable_notify()? { break }     // nothing came in the meantime
//! }
//! if ring.needs_interrupt() { irq.raise(..) }
//! ```

mod handover;

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, VolatileMemoryError, VolatileSlice,
};

use super::buffers::{Buffers, Storage};
use crate::GuestMemory;

/// The largest queue (virtio 1.2 §2.6).
pub const MAX_QUEUE_SIZE: u16 = 32768;
/// The most pieces a chain may have: what one vectored system call takes.
pub const MAX_CHAIN_PIECES: usize = 1024;

const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
const DESC_F_INDIRECT: u16 = 4;
const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;
const DESC_SIZE: usize = 16;

/// What a driver can get wrong. Any of these makes the device ask for a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The size is zero, not a power of two or above the maximum.
    #[error("queue size {size} is not a power of two of at most {max}")]
    Size {
        /// What the driver wrote.
        size: u16,
        /// What the device offers.
        max: u16,
    },
    /// A ring is misaligned or not in guest memory.
    #[error("the {ring} at {address:#x} is misaligned or outside guest memory")]
    Ring {
        /// Which ring.
        ring: &'static str,
        /// Where the driver put it.
        address: u64,
    },
    /// The available index ran ahead by more than the queue size.
    #[error("the available index {index} is more than the queue size ahead of {next}")]
    AvailableIndex {
        /// The driver's index.
        index: u16,
        /// The device's position.
        next: u16,
    },
    /// A descriptor index, flag or order is wrong, or the chain has a loop or too many pieces.
    #[error("the descriptor chain at {head} is malformed: {what}")]
    Chain {
        /// Head of the chain.
        head: u16,
        /// What is wrong.
        what: &'static str,
    },
    /// A descriptor names memory that the guest does not have.
    #[error("the descriptor chain at {head} names {len} bytes at {address:#x}, which is not guest memory")]
    Buffer {
        /// Head of the chain.
        head: u16,
        /// Start of the buffer.
        address: u64,
        /// Bytes.
        len: u32,
    },
}

/// A queue as the transport's registers describe it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueConfig {
    /// Largest size that the device offers.
    pub max_size: u16,
    /// Size that the driver chose.
    pub size: u16,
    /// True once the driver enabled the queue.
    pub ready: bool,
    /// Guest address of the descriptor table.
    pub desc_table: u64,
    /// Guest address of the available ring.
    pub avail_ring: u64,
    /// Guest address of the used ring.
    pub used_ring: u64,
}

impl QueueConfig {
    /// A queue as it is after reset.
    pub fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            ready: false,
            desc_table: 0,
            avail_ring: 0,
            used_ring: 0,
        }
    }
}

/// A running queue: its place in guest memory and the device's positions in it. This is also its saved state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queue {
    config: QueueConfig,
    event_idx: bool,
    next_avail: u16,
    next_used: u16,
    /// `next_used` when an interrupt was last considered.
    signalled: u16,
}

impl Queue {
    /// Checks what the driver set up and makes a queue at position zero. A queue that is not ready is kept as it is, and
    /// cannot be opened.
    pub fn new(config: QueueConfig, event_idx: bool, mem: &GuestMemory) -> Result<Self, QueueError> {
        let mut queue = Self {
            config,
            event_idx,
            next_avail: 0,
            next_used: 0,
            signalled: 0,
        };
        if config.ready {
            queue.open(mem)?;
        }
        Ok(queue)
    }

    /// The same queue as a lane has it that does not serve it.
    pub(super) fn not_ready(mut self) -> Self {
        self.config.ready = false;
        self
    }

    /// What the driver set up.
    pub fn config(&self) -> &QueueConfig {
        &self.config
    }

    /// How many chains were taken and answered, modulo 2^16, when nothing is in flight.
    pub fn position(&self) -> u16 {
        self.next_avail
    }

    /// Goes on where somebody else has stopped, who has answered all that it took.
    pub fn set_position(&mut self, position: u16) {
        self.next_avail = position;
        self.next_used = position;
        self.signalled = position;
    }

    /// Looks the rings up and gives access to them. A queue that is not ready gives an error that names it so.
    pub fn open<'q, 'm>(&'q mut self, mem: &'m GuestMemory) -> Result<Ring<'q, 'm>, QueueError> {
        let QueueConfig {
            max_size,
            size,
            desc_table,
            avail_ring,
            used_ring,
            ready,
        } = self.config;
        if !ready || !size.is_power_of_two() || size > max_size || size > MAX_QUEUE_SIZE {
            return Err(QueueError::Size {
                size: if ready { size } else { 0 },
                max: max_size,
            });
        }
        let entries = usize::from(size);
        let missing = QueueError::Ring {
            ring: "descriptor table",
            address: desc_table,
        };
        let mut window = Window::around(mem, desc_table).ok_or(missing)?;
        let mut ring = |ring, address: u64, align, len| {
            let slice = window
                .get(mem, address, len)
                .filter(|_| address.is_multiple_of(align));
            slice.ok_or(QueueError::Ring { ring, address })
        };
        Ok(Ring {
            desc: ring("descriptor table", desc_table, 16, DESC_SIZE * entries)?,
            avail: ring("available ring", avail_ring, 2, 6 + 2 * entries)?,
            used: ring("used ring", used_ring, 4, 6 + 8 * entries)?,
            queue: self,
            mem,
            window,
        })
    }
}

/// One popped request: the driver's buffers, device-readable ones first (virtio 1.2 §2.7.4.2).
///
/// Reuse one value for a whole batch: its allocations stay.
#[derive(Default)]
pub struct Chain<'m> {
    head: u16,
    /// What the device reads.
    pub readable: Buffers<'m>,
    /// What the device writes.
    pub writable: Buffers<'m>,
}

/// The allocations of a chain, kept by a device between runs of its queue.
#[derive(Default)]
pub struct ChainStorage {
    readable: Storage,
    writable: Storage,
}

impl From<ChainStorage> for Chain<'_> {
    fn from(storage: ChainStorage) -> Self {
        Self {
            head: 0,
            readable: storage.readable.into(),
            writable: storage.writable.into(),
        }
    }
}

impl Chain<'_> {
    /// Ends the chain's use and keeps its allocations.
    pub fn into_storage(self) -> ChainStorage {
        ChainStorage {
            readable: self.readable.into_storage(),
            writable: self.writable.into_storage(),
        }
    }

    /// Gives up the proof that the memory is there, for a request that goes on when this call is over.
    ///
    /// # Safety
    ///
    /// The caller keeps the memory of the chain mapped as long as it uses it.
    pub unsafe fn detach(self) -> Chain<'static> {
        // SAFETY: needed to detach both sides; what is asked of the caller is the same.
        let (readable, writable) = unsafe { (self.readable.detach(), self.writable.detach()) };
        Chain {
            head: self.head,
            readable,
            writable,
        }
    }

    /// An empty chain to pop into.
    pub fn new() -> Self {
        Self::default()
    }

    /// Index of the first descriptor, to be given back by [`Ring::push`].
    pub fn head(&self) -> u16 {
        self.head
    }
}

/// The region of guest memory that was met last: the next address is nearly always there too, and then needs no
/// search.
struct Window<'m> {
    start: u64,
    slice: VolatileSlice<'m>,
}

impl<'m> Window<'m> {
    fn around(mem: &'m GuestMemory, address: u64) -> Option<Self> {
        let region = mem.find_region(GuestAddress(address))?;
        let slice = region.as_volatile_slice().ok()?;
        Some(Self {
            start: region.start_addr().0,
            slice,
        })
    }

    /// The `len` bytes at `address`, all in one region.
    fn get(&mut self, mem: &'m GuestMemory, address: u64, len: usize) -> Option<VolatileSlice<'m>> {
        if let Some(slice) = self.inside(address, len) {
            return Some(slice);
        }
        *self = Self::around(mem, address)?;
        self.inside(address, len)
    }

    /// The bytes from `address` on that one region has, at most `len` and at least one.
    fn run(&mut self, mem: &'m GuestMemory, address: u64, len: usize) -> Option<VolatileSlice<'m>> {
        if let Some(slice) = self.inside(address, len) {
            return Some(slice);
        }
        *self = Self::around(mem, address)?;
        let offset = usize::try_from(address - self.start).ok()?;
        self.slice
            .subslice(offset, len.min(self.slice.len() - offset))
            .ok()
    }

    fn inside(&self, address: u64, len: usize) -> Option<VolatileSlice<'m>> {
        let offset = usize::try_from(address.checked_sub(self.start)?).ok()?;
        self.slice.subslice(offset, len).ok()
    }
}

/// A queue opened for work. Dropping it keeps the positions in the [`Queue`].
pub struct Ring<'q, 'm> {
    queue: &'q mut Queue,
    mem: &'m GuestMemory,
    window: Window<'m>,
    desc: VolatileSlice<'m>,
    avail: VolatileSlice<'m>,
    used: VolatileSlice<'m>,
}

#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl<'m> Ring<'_, 'm> {
    /// Takes the next available chain into `chain`; false when there is none.
    pub fn pop(&mut self, chain: &mut Chain<'m>) -> Result<bool, QueueError> {
        if self.pending()? == 0 {
            return Ok(false);
        }
        let slot = usize::from(self.queue.next_avail & (self.size() - 1));
        chain.head = load_u16(&self.avail, 4 + 2 * slot, Ordering::Relaxed);
        chain.readable.clear();
        chain.writable.clear();
        self.gather(chain)?;
        self.queue.next_avail = self.queue.next_avail.wrapping_add(1);
        Ok(true)
    }

    /// Puts the last `count` popped chains back: the next `pop`s give them again. None of them may have been pushed.
    pub fn unpop(&mut self, count: u16) {
        self.queue.next_avail = self.queue.next_avail.wrapping_sub(count);
    }

    /// How many chains the driver has made available that were not popped.
    pub fn pending(&self) -> Result<u16, QueueError> {
        let index = load_u16(&self.avail, 2, Ordering::Acquire);
        let pending = (Wrapping(index) - Wrapping(self.queue.next_avail)).0;
        if pending > self.size() {
            return Err(QueueError::AvailableIndex {
                index,
                next: self.queue.next_avail,
            });
        }
        Ok(pending)
    }

    /// Enters a chain into the used ring with the count of bytes written to it. The driver sees it after
    /// [`Ring::publish`].
    pub fn push(&mut self, head: u16, written: u32) {
        let slot = usize::from(self.queue.next_used & (self.size() - 1));
        store_u32(&self.used, 4 + 8 * slot, u32::from(head));
        store_u32(&self.used, 8 + 8 * slot, written);
        self.queue.next_used = self.queue.next_used.wrapping_add(1);
    }

    /// Makes all pushed chains visible to the driver.
    pub fn publish(&mut self) {
        store_u16(&self.used, 2, self.queue.next_used, Ordering::Release);
    }

    /// Whether the driver wants an interrupt for what was published since the last call (virtio 1.2 §2.7.7.2).
    pub fn needs_interrupt(&mut self) -> bool {
        let (new, old) = (Wrapping(self.queue.next_used), Wrapping(self.queue.signalled));
        if new == old {
            return false;
        }
        self.queue.signalled = new.0;
        // The used index must be visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        if self.queue.event_idx {
            let event = Wrapping(load_u16(
                &self.avail,
                4 + 2 * usize::from(self.size()),
                Ordering::Relaxed,
            ));
            return new - event - Wrapping(1) < new - old;
        }
        load_u16(&self.avail, 0, Ordering::Relaxed) & AVAIL_F_NO_INTERRUPT == 0
    }

    /// Asks the driver to notify again, and tells whether chains came in the meantime: then go on working.
    pub fn enable_notify(&mut self) -> Result<bool, QueueError> {
        self.set_notify(true);
        // The wish must be visible before the index is read again, or a chain could wait for ever.
        fence(Ordering::SeqCst);
        Ok(self.pending()? != 0)
    }

    /// Tells the driver that notifications are not needed while the device works.
    pub fn disable_notify(&mut self) {
        self.set_notify(false);
    }

    fn set_notify(&mut self, wanted: bool) {
        match (self.queue.event_idx, wanted) {
            // An event index in the past asks for nothing, so there is nothing to turn off.
            (true, false) => {}
            (true, true) => {
                let offset = 4 + 8 * usize::from(self.size());
                store_u16(&self.used, offset, self.queue.next_avail, Ordering::Relaxed);
            }
            (false, true) => store_u16(&self.used, 0, 0, Ordering::Relaxed),
            (false, false) => store_u16(&self.used, 0, USED_F_NO_NOTIFY, Ordering::Relaxed),
        }
    }

    /// Entries of the queue.
    pub fn size(&self) -> u16 {
        self.queue.config.size
    }

    fn gather(&mut self, chain: &mut Chain<'m>) -> Result<(), QueueError> {
        let head = chain.head;
        let table = self.desc;
        let first = descriptor(&table, head, head)?;
        if first.flags & DESC_F_INDIRECT == 0 {
            return self.walk(&table, first, chain);
        }
        let Descriptor { address, len, .. } = first;
        let size = usize::try_from(len).expect("a u32 fits");
        if first.flags & DESC_F_NEXT != 0 || size == 0 || !size.is_multiple_of(DESC_SIZE) {
            let what = "the indirect descriptor has a next flag or a bad length";
            return Err(QueueError::Chain { head, what });
        }
        let table = self.window.get(self.mem, address, size);
        let table = table.ok_or(QueueError::Buffer { head, address, len })?;
        self.walk(&table, descriptor(&table, 0, head)?, chain)
    }

    fn walk(
        &mut self,
        table: &VolatileSlice<'m>,
        first: Descriptor,
        chain: &mut Chain<'m>,
    ) -> Result<(), QueueError> {
        let head = chain.head;
        let malformed = |what| QueueError::Chain { head, what };
        let mut total = 0u32;
        let mut desc = first;
        for _ in 0..MAX_CHAIN_PIECES {
            if desc.flags & DESC_F_INDIRECT != 0 {
                return Err(malformed("an indirect table inside a chain"));
            }
            total = total
                .checked_add(desc.len)
                .ok_or_else(|| malformed("more than 4 GiB"))?;
            self.add_piece(desc, chain)?;
            if desc.flags & DESC_F_NEXT == 0 {
                return Ok(());
            }
            desc = descriptor(table, desc.next, head)?;
        }
        Err(malformed("a loop or more than 1024 descriptors"))
    }

    fn add_piece(&mut self, desc: Descriptor, chain: &mut Chain<'m>) -> Result<(), QueueError> {
        let (head, Descriptor { address, len, .. }) = (chain.head, desc);
        let side = match desc.flags & DESC_F_WRITE != 0 {
            true => &mut chain.writable,
            false if chain.writable.is_empty() => &mut chain.readable,
            false => {
                let what = "a readable descriptor behind a writable one";
                return Err(QueueError::Chain { head, what });
            }
        };
        let missing = QueueError::Buffer { head, address, len };
        let mut left = usize::try_from(len).expect("a u32 fits");
        let mut at = address;
        // More than one turn only where regions of memory touch: the guest does not know of their border.
        while left > 0 {
            let piece = self.window.run(self.mem, at, left).ok_or(missing)?;
            side.push(&piece);
            left -= piece.len();
            at = at.wrapping_add(u64::try_from(piece.len()).expect("a u64 has room"));
        }
        Ok(())
    }
}

fn descriptor(table: &VolatileSlice<'_>, index: u16, head: u16) -> Result<Descriptor, QueueError> {
    let offset = DESC_SIZE * usize::from(index);
    // Each half is read once: the guest may change the table while it is looked at.
    match (half(table, offset), half(table, offset + 8)) {
        (Ok(address), Ok(rest)) => {
            let [l0, l1, l2, l3, f0, f1, n0, n1] = u64::from_le(rest).to_le_bytes();
            Ok(Descriptor {
                address: u64::from_le(address),
                len: u32::from_le_bytes([l0, l1, l2, l3]),
                flags: u16::from_le_bytes([f0, f1]),
                next: u16::from_le_bytes([n0, n1]),
            })
        }
        _ => Err(QueueError::Chain {
            head,
            what: "a descriptor index behind the end of its table",
        }),
    }
}

/// Half a descriptor. Tables of indirect descriptors need not be aligned, but are.
fn half(table: &VolatileSlice<'_>, offset: usize) -> Result<u64, VolatileMemoryError> {
    table
        .load(offset, Ordering::Relaxed)
        .or_else(|_| table.read_obj(offset))
}

fn load_u16(slice: &VolatileSlice<'_>, offset: usize, order: Ordering) -> u16 {
    slice
        .load::<u16>(offset, order)
        .map(u16::from_le)
        .expect("`open` checked the ring's size and alignment")
}

fn load_u32(slice: &VolatileSlice<'_>, offset: usize) -> u32 {
    slice
        .load::<u32>(offset, Ordering::Relaxed)
        .map(u32::from_le)
        .expect("`open` checked the ring's size and alignment")
}

fn store_u32(slice: &VolatileSlice<'_>, offset: usize, value: u32) {
    let stored = slice.store(value.to_le(), offset, Ordering::Relaxed);
    stored.expect("`open` checked the ring's size and alignment");
}

fn store_u16(slice: &VolatileSlice<'_>, offset: usize, value: u16, order: Ordering) {
    slice
        .store(value.to_le(), offset, order)
        .expect("`open` checked the ring's size and alignment");
}

#[cfg(test)]
mod tests;
