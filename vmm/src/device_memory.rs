//! [`DeviceMemory`]: memory that devices give the guest beside its RAM, as KVM slots and as regions of the shared guest
//! memory.
//!
//! The control thread maps files with it while it attaches devices; the io threads connect and disconnect slots when
//! the guest asks. Every piece is a value that undoes itself when dropped, in this order: no device finds it any more,
//! the guest loses it, and it is unmapped when the last device that was using it has finished.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::SharedMemory;
use devices::memory_host::{FileMapping, MappedFile, MemoryHost, MemoryHostError, SlottedMemory};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryRegion};

use crate::kvm::{self, MemorySlot};
use crate::memory::{self, GuestRegion};

/// Start of mapped files. A section of Linux's memory model: no two kinds of memory share one.
const FILE_ALIGNMENT: u64 = 128 << 20;
/// Start of slotted memory: the largest block in which Linux adds memory.
const SLOTS_ALIGNMENT: u64 = 2 << 30;

/// The memory of devices of one machine.
#[derive(Clone)]
pub struct DeviceMemory(Arc<Shared>);

struct Shared {
    vm: Arc<kvm::Vm>,
    memory: SharedMemory,
    /// Guest addresses that devices may have.
    window: Range<u64>,
    /// Those that they have, in order.
    taken: Mutex<Vec<Range<u64>>>,
}

impl DeviceMemory {
    /// Memory for the devices of `vm` that comes to lie inside `window`, where `memory` has nothing.
    pub fn new(vm: Arc<kvm::Vm>, memory: SharedMemory, window: Range<u64>) -> Self {
        Self(Arc::new(Shared {
            vm,
            memory,
            window,
            taken: Mutex::default(),
        }))
    }

    /// Takes the lowest free addresses.
    fn place(&self, size: u64, alignment: u64) -> Result<Place, MemoryHostError> {
        let mut taken = self.0.lock();
        let window = &self.0.window;
        let found = first_fit(window, &taken, size, alignment);
        let start = found.map_err(|free| MemoryHostError::NoRoom { size, free })?;
        let range = start..start + size;
        let index = taken.partition_point(|other| other.start < start);
        taken.insert(index, range.clone());
        Ok(Place {
            shared: Arc::clone(&self.0),
            range,
        })
    }
}

impl MemoryHost for DeviceMemory {
    fn map_file(&self, mapping: &FileMapping<'_>) -> Result<Box<dyn MappedFile>, MemoryHostError> {
        let failed = |op| move |source| MemoryHostError::Host { op, source };
        let place = self.place(mapping.size, FILE_ALIGNMENT)?;
        let region = memory::anonymous(GuestAddress(place.range.start), mapping.size);
        let region = region.map_err(failed("set address space of the host aside"))?;
        // Devices of the guest may write to read-only memory too: they change this guest's copy then, not the file.
        memory::map_file_over(&region, mapping.file, mapping.file_size, !mapping.read_only)
            .map_err(failed("map the file"))?;
        let presence = self.0.connect(Arc::new(region), mapping.read_only);
        Ok(Box::new(File {
            _presence: presence.map_err(failed("give the guest memory"))?,
            place,
        }))
    }

    fn reserve(&self, size: u64, slot_size: u64) -> Result<Box<dyn SlottedMemory>, MemoryHostError> {
        let (wanted, limit) = (size / slot_size, u64::from(self.0.vm.memory_slot_limit()));
        if wanted > limit {
            return Err(MemoryHostError::NoSlots { wanted, limit });
        }
        Ok(Box::new(Slots {
            connected: BTreeMap::new(),
            slot_size,
            place: self.place(size, SLOTS_ALIGNMENT)?,
        }))
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Vec<Range<u64>>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives `region` to the guest, then to its devices.
    fn connect(self: &Arc<Self>, region: Arc<GuestRegion>, read_only: bool) -> io::Result<Presence> {
        let slot = self.vm.add_memory(Arc::clone(&region), read_only);
        let slot = slot.map_err(io::Error::other)?;
        let lock = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let with_region = self.memory.memory().insert_region(Arc::clone(&region));
        lock.replace(with_region.map_err(io::Error::other)?);
        Ok(Presence {
            shared: Arc::clone(self),
            region,
            _slot: slot,
        })
    }
}

/// Guest addresses that are taken until this is dropped.
struct Place {
    shared: Arc<Shared>,
    range: Range<u64>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.lock().retain(|range| *range != self.range);
    }
}

/// Memory that the guest and its devices have until this is dropped.
struct Presence {
    shared: Arc<Shared>,
    region: Arc<GuestRegion>,
    _slot: MemorySlot,
}

impl Drop for Presence {
    fn drop(&mut self) {
        let memory = &self.shared.memory;
        let lock = memory.lock().unwrap_or_else(PoisonError::into_inner);
        let without = memory
            .memory()
            .remove_region(self.region.start_addr(), self.region.len());
        lock.replace(without.expect("it was inserted and nobody else removes it").0);
    }
}

/// A mapped file. The memory goes before its addresses are free.
struct File {
    _presence: Presence,
    place: Place,
}

impl MappedFile for File {
    fn start(&self) -> u64 {
        self.place.range.start
    }
}

/// Slots at consecutive addresses. The memory goes before its addresses are free.
struct Slots {
    connected: BTreeMap<u32, Presence>,
    slot_size: u64,
    place: Place,
}

impl SlottedMemory for Slots {
    fn start(&self) -> u64 {
        self.place.range.start
    }

    fn connect(&mut self, slot: u32) -> io::Result<()> {
        let start = self.start() + u64::from(slot) * self.slot_size;
        let region = memory::anonymous(GuestAddress(start), self.slot_size)?;
        let presence = self.place.shared.connect(Arc::new(region), false)?;
        self.connected.insert(slot, presence);
        Ok(())
    }

    fn disconnect(&mut self, slot: u32) {
        self.connected.remove(&slot);
    }

    fn discard(&mut self, slot: u32, range: Range<u64>) -> io::Result<()> {
        let presence = self.connected.get(&slot).ok_or(io::ErrorKind::NotFound)?;
        memory::discard(&presence.region, range)
    }
}

/// The lowest multiple of `alignment` in `window` with `size` bytes that none of `taken` has, or the size of the
/// largest range that is free.
fn first_fit(window: &Range<u64>, taken: &[Range<u64>], size: u64, alignment: u64) -> Result<u64, u64> {
    let starts = std::iter::once(window.start).chain(taken.iter().map(|range| range.end));
    let ends = taken
        .iter()
        .map(|range| range.start)
        .chain(std::iter::once(window.end));
    let mut largest = 0;
    for (start, end) in starts.zip(ends) {
        let start = start.next_multiple_of(alignment);
        let free = end.saturating_sub(start);
        if size <= free {
            return Ok(start);
        }
        largest = largest.max(free);
    }
    Err(largest)
}

#[cfg(test)]
mod tests;
