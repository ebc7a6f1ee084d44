//! [`Refcounts`]: which clusters hold refcounts, and what is safe to have on disk while they change.

use std::collections::BTreeSet;
use std::ops::Range;

use super::header::Header;

/// Where an image keeps its refcounts.
#[derive(Debug, Default)]
pub(super) struct Refcounts {
    /// The table of blocks: its offset and its bytes.
    table: (u64, u64),
    blocks: BTreeSet<u64>,
    order: u32,
}

impl Refcounts {
    /// Where they are in an image that was just opened.
    pub(super) fn new(header: &Header) -> Self {
        Self {
            table: header.refcount_table,
            blocks: header.refcount_blocks.clone(),
            order: header.refcount_order,
        }
    }

    /// True for the offset of a block.
    pub(super) fn is_block(&self, offset: u64) -> bool {
        self.blocks.contains(&offset)
    }

    /// True for the offset of the table, or of an entry in it.
    pub(super) fn is_in_table(&self, offset: u64) -> bool {
        offset >= self.table.0 && offset - self.table.0 < self.table.1
    }

    /// Takes note of a new entry of the table: a new block.
    pub(super) fn add(&mut self, entry: u64) {
        if entry != 0 {
            self.blocks.insert(entry);
        }
    }

    /// Takes note of a new table that has taken the place of the old; returns where that was.
    pub(super) fn replace(&mut self, offset: u64, table: &[u8]) -> Range<u64> {
        let (entries, _) = table.as_chunks();
        let old = self.table.0..self.table.0 + self.table.1;
        self.table = (offset, table.len() as u64);
        for entry in entries {
            self.add(u64::from_be_bytes(*entry));
        }
        old
    }

    /// Makes each refcount in `block` the larger of itself and the one in `old`. True when that changes any.
    ///
    /// A count that is too large loses a cluster, one that is too small destroys data. So while tables that refer to
    /// clusters are on their way to the disk, the counts there hold for what was before and for what comes.
    pub(super) fn keep_larger(&self, old: &[u8], block: &mut [u8]) -> bool {
        let mut changed = false;
        if self.order >= 3 {
            let bytes = 1 << (self.order - 3);
            for (new, old) in block.chunks_exact_mut(bytes).zip(old.chunks_exact(bytes)) {
                // Big-endian numbers of one length are ordered as their bytes are.
                if *old > *new {
                    new.copy_from_slice(old);
                    changed = true;
                }
            }
            return changed;
        }
        let bits = 1u32 << self.order;
        let mask = (1u8 << bits) - 1;
        for (new, old) in block.iter_mut().zip(old) {
            for shift in (0..8).step_by(bits as usize) {
                let (a, b) = (*new >> shift & mask, *old >> shift & mask);
                if b > a {
                    *new = *new & !(mask << shift) | b << shift;
                    changed = true;
                }
            }
        }
        changed
    }
}
