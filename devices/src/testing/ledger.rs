//! [`Ledger`]: a [`MemoryHost`] without a machine. It keeps account of what devices ask for.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::memory_host::{FileMapping, MappedFile, MemoryHost, MemoryHostError, SlottedMemory};

/// Where it places everything.
pub const LEDGER_START: u64 = 4 << 30;

/// Gives out addresses, and no memory.
#[derive(Clone, Default)]
pub struct Ledger(Arc<Mutex<Account>>);

/// What devices have, and what they are to be refused.
#[derive(Debug, Default)]
pub struct Account {
    /// Size of each file that is mapped, in all and of the file, and whether it is read-only.
    pub mapped: Vec<(u64, u64, bool)>,
    /// Slots that are there.
    pub slots: BTreeSet<u32>,
    /// Pages that were given back: slot and range in it.
    pub discarded: Vec<(u32, Range<u64>)>,
    /// Refuse everything but addresses.
    pub refuse: bool,
    /// The slot that cannot be connected.
    pub bad_slot: Option<u32>,
}

impl Ledger {
    /// The account.
    pub fn account(&self) -> MutexGuard<'_, Account> {
        self.0.lock().unwrap()
    }
}

fn refused() -> io::Error {
    io::ErrorKind::OutOfMemory.into()
}

impl MemoryHost for Ledger {
    fn map_file(&self, mapping: &FileMapping<'_>) -> Result<Box<dyn MappedFile>, MemoryHostError> {
        let mut account = self.account();
        if account.refuse {
            return Err(MemoryHostError::Host {
                op: "map the file",
                source: refused(),
            });
        }
        let entry = (mapping.size, mapping.file_size, mapping.read_only);
        account.mapped.push(entry);
        Ok(Box::new(Mapped {
            ledger: self.clone(),
            entry,
        }))
    }

    fn reserve(&self, _size: u64, _slot_size: u64) -> Result<Box<dyn SlottedMemory>, MemoryHostError> {
        Ok(Box::new(self.clone()))
    }
}

struct Mapped {
    ledger: Ledger,
    entry: (u64, u64, bool),
}

impl MappedFile for Mapped {
    fn start(&self) -> u64 {
        LEDGER_START
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let mut account = self.ledger.account();
        let index = account.mapped.iter().position(|entry| *entry == self.entry);
        account.mapped.remove(index.unwrap());
    }
}

impl SlottedMemory for Ledger {
    fn start(&self) -> u64 {
        LEDGER_START
    }

    fn connect(&mut self, slot: u32) -> io::Result<()> {
        let mut account = self.account();
        if account.refuse || account.bad_slot == Some(slot) {
            return Err(refused());
        }
        assert!(account.slots.insert(slot), "slot {slot} is there already");
        Ok(())
    }

    fn disconnect(&mut self, slot: u32) {
        assert!(self.account().slots.remove(&slot), "slot {slot} is not there");
    }

    fn discard(&mut self, slot: u32, range: Range<u64>) -> io::Result<()> {
        let mut account = self.account();
        assert!(account.slots.contains(&slot), "slot {slot} is not there");
        if account.refuse {
            return Err(refused());
        }
        account.discarded.push((slot, range));
        Ok(())
    }
}
