//! [`MemoryHost`]: how a device gives the guest memory beside its RAM, at guest physical addresses of its own.
//!
//! Devices own such memory as values: dropping one takes it away from the guest and gives the addresses back. The
//! machine implements these traits over KVM; `crate::testing` has an implementation that only keeps account. The
//! memory also is part of the [`SharedMemory`](crate::SharedMemory) of all devices, so that queues and buffers in it
//! work.

use std::fs::File;
use std::io;
use std::ops::Range;

/// Where memory for devices can be had. Addresses are chosen by the host: behind RAM, within what the CPU can
/// address.
pub trait MemoryHost {
    /// Maps a file.
    fn map_file(&self, mapping: &FileMapping<'_>) -> Result<Box<dyn MappedFile>, MemoryHostError>;
    /// Sets addresses aside for memory that comes and goes in slots of one size; none is there at first.
    fn reserve(&self, size: u64, slot_size: u64) -> Result<Box<dyn SlottedMemory>, MemoryHostError>;
}

/// A file to be mapped at a multiple of 2 MiB.
#[derive(Debug)]
pub struct FileMapping<'a> {
    /// The file, open for writing unless `read_only`.
    pub file: &'a File,
    /// Bytes of the file; they come first.
    pub file_size: u64,
    /// Bytes in all, a multiple of 2 MiB. Those behind the file's pages are zero, private, and lost at the end.
    pub size: u64,
    /// The guest's writes do not reach the file, and are not seen.
    pub read_only: bool,
}

/// A file that the guest has as memory, until this is dropped.
pub trait MappedFile: Send {
    /// The guest address of its first byte.
    fn start(&self) -> u64;
}

/// Addresses at which slots of memory come and go. All of it goes when this is dropped.
pub trait SlottedMemory: Send {
    /// The guest address of slot 0; the others follow without a gap. A multiple of 2 GiB, the largest piece in which
    /// Linux manages memory.
    fn start(&self) -> u64;
    /// Gives the guest the slot with this index, all zero. It is not there.
    fn connect(&mut self, slot: u32) -> io::Result<()>;
    /// Takes a slot that is there away from the guest and its content back to the host. An access of the guest finds no
    /// memory then.
    fn disconnect(&mut self, slot: u32);
    /// Gives the host back what is in whole pages of a slot that is there; they read as zero afterwards.
    fn discard(&mut self, slot: u32, range: Range<u64>) -> io::Result<()>;
}

/// Why the guest cannot be given memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryHostError {
    /// The addresses that the CPU has are taken.
    #[error(
        "{} MiB do not fit into the {} MiB of guest addresses that this CPU leaves free behind RAM: ask for less",
        size >> 20, free >> 20
    )]
    NoRoom {
        /// Bytes asked for.
        size: u64,
        /// Bytes in the largest free range.
        free: u64,
    },
    /// KVM has a limited number of slots.
    #[error("{wanted} slots are more than the {limit} that this host's KVM has: make slots larger")]
    NoSlots {
        /// How many could be in use at once.
        wanted: u64,
        /// How many there are.
        limit: u64,
    },
    /// The host refused.
    #[error("cannot {op}")]
    Host {
        /// What was tried.
        op: &'static str,
        /// Why not.
        source: io::Error,
    },
}
