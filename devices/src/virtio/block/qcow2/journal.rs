//! [`Journal`]: the tables that changed and are not on disk yet, and the order in which they go there.
//!
//! imago writes tables when its caches are full, and entries that point to them at once. After a crash an entry could
//! then point to a cluster that is still free. So none of its writes goes to the file directly: they gather here, and
//! [`Journal::commit`] writes them in steps, each durable before the next begins:
//! 1. data (in their place already) and refcounts, each at least as large as before and as it is to be,
//! 2. entries that point to refcounts,
//! 3. tables that point to data,
//! 4. entries that point to those tables,
//! 5. refcounts as they are to be.
//!
//! Whatever part of a step a crash loses, no cluster in use counts as free: at worst some are lost.
//!
//! This holds if data go to a cluster that became free only after a commit. imago says by [`Journal::note_freed`] that
//! it frees clusters; who writes data to a new place commits then before that. What imago copies there also comes here,
//! and has to be taken out before that commit.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use super::file::HostFile;
use super::header::Header;
use super::refcounts::Refcounts;

/// More than this is not kept.
const MAX_BYTES: usize = 8 << 20;
/// All tables have at least this many bytes, and all single entries fewer.
pub(super) const SMALLEST_TABLE: usize = 512;
/// Where the header tells the offset of the refcount table.
const HEADER_REFCOUNT_TABLE: Range<usize> = 48..56;

/// What imago copies into a new data cluster, around what the guest writes there.
#[derive(Debug)]
enum Copied {
    Bytes(Vec<u8>),
    Zeros(u64),
}

/// All that imago copied for a mapping.
#[must_use = "the clusters have nothing else around what the guest writes"]
pub(super) struct Copies(Vec<(u64, Copied)>);

impl Copies {
    /// Writes them to the file.
    pub(super) fn write(self, file: &HostFile) -> io::Result<()> {
        for (offset, copied) in self.0 {
            match copied {
                Copied::Bytes(mut data) => file.write_bytes(offset, &mut data)?,
                Copied::Zeros(len) => file.write_zeros(offset..offset.saturating_add(len))?,
            }
        }
        Ok(())
    }
}

/// Writes that are held back. An image that is only read has none.
#[derive(Debug, Default)]
pub(super) struct Journal {
    cluster: u64,
    refcounts: Refcounts,
    /// Whole clusters, by offset.
    tables: BTreeMap<u64, Vec<u8>>,
    /// Single entries and the header, in order.
    entries: Vec<(u64, Vec<u8>)>,
    /// Data of the mapping that is being made.
    copies: Vec<(u64, Copied)>,
    /// In `tables` and `entries`.
    bytes: usize,
    freed: bool,
}

impl Journal {
    /// An empty one for an image that was just opened.
    pub(super) fn new(header: &Header) -> Self {
        Self {
            cluster: header.cluster,
            refcounts: Refcounts::new(header),
            ..Self::default()
        }
    }

    /// Takes a write by imago.
    pub(super) fn write(&mut self, offset: u64, data: Vec<u8>) {
        let len = data.len() as u64;
        if data.len() < SMALLEST_TABLE {
            self.note_entry(offset, &data);
            self.bytes += data.len();
            self.entries.push((offset, data));
        } else if (offset | len).is_multiple_of(self.cluster) {
            self.bytes += data.len();
            let old = self.tables.insert(offset, data);
            self.bytes -= old.map_or(0, |old| old.len());
        } else {
            self.copies.push((offset, Copied::Bytes(data)));
        }
    }

    /// Takes zeros that imago writes into a new data cluster.
    pub(super) fn write_zeros(&mut self, offset: u64, len: u64) {
        self.copies.push((offset, Copied::Zeros(len)));
    }

    /// Keeps track of where refcounts are.
    fn note_entry(&mut self, offset: u64, data: &[u8]) {
        if let Ok(entry) = data.try_into()
            && self.refcounts.is_in_table(offset)
        {
            self.refcounts.add(u64::from_be_bytes(entry));
        }
        if offset == 0
            && let Some(Ok(place)) = data.get(HEADER_REFCOUNT_TABLE).map(TryInto::try_into)
        {
            let place = u64::from_be_bytes(place);
            if let Some(table) = self.tables.get(&place)
                && !self.refcounts.is_in_table(place)
            {
                // The new table has what the old was still to get, and the place of the old becomes free.
                let old = self.refcounts.replace(place, table);
                self.entries.retain(|(offset, _)| !old.contains(offset));
            }
        }
    }

    /// The table at `offset`, if it is here.
    pub(super) fn table(&self, offset: u64, len: usize) -> Option<&[u8]> {
        self.tables
            .get(&offset)
            .filter(|table| table.len() == len)
            .map(Vec::as_slice)
    }

    /// Takes note that clusters become free.
    pub(super) fn note_freed(&mut self) {
        self.freed = true;
    }

    /// True when clusters became free since the last commit.
    pub(super) fn has_freed(&self) -> bool {
        self.freed
    }

    /// True when it is time to commit.
    pub(super) fn is_full(&self) -> bool {
        self.bytes > MAX_BYTES
    }

    /// Takes out what imago copied into the data clusters that `range` touches, which no commit may write.
    pub(super) fn take_copies(&mut self, range: Range<u64>) -> Copies {
        let mut copies = Vec::new();
        // A copy of a whole cluster looked like a table.
        let first = range.start / self.cluster * self.cluster;
        while let Some((&offset, _)) = self.tables.range(first..range.end).next() {
            if let Some(data) = self.tables.remove(&offset) {
                self.bytes -= data.len();
                copies.push((offset, Copied::Bytes(data)));
            }
        }
        copies.append(&mut self.copies);
        Copies(copies)
    }

    /// Forgets what was copied for a mapping that came to nothing.
    pub(super) fn forget_copies(&mut self) {
        self.copies.clear();
    }

    /// Writes everything to the file, and makes it and all data durable if that is asked for. After an error all is
    /// still here.
    pub(super) fn commit(&mut self, file: &HostFile, durable: bool) -> io::Result<()> {
        let mut steps = Steps {
            file,
            durable,
            // Data.
            open: true,
        };
        let too_large = self.write_counts(&mut steps)?;
        if !self.entries.is_empty() || !self.tables.is_empty() {
            steps.finish()?;
        }
        self.write_entries(&mut steps, true)?;
        for (offset, table) in &mut self.tables {
            if !self.refcounts.is_block(*offset) && !self.refcounts.is_in_table(*offset) {
                steps.write(*offset, table)?;
            }
        }
        self.write_entries(&mut steps, false)?;
        steps.finish()?;
        for offset in too_large {
            if let Some(block) = self.tables.get_mut(&offset) {
                steps.write(offset, block)?;
            }
        }
        self.tables.clear();
        self.entries.clear();
        (self.bytes, self.freed) = (0, false);
        Ok(())
    }

    /// Writes the refcount blocks, with counts that hold for before and after, and new tables of blocks, to which
    /// nothing points yet. Returns the blocks whose counts are then too large.
    fn write_counts(&mut self, steps: &mut Steps<'_>) -> io::Result<Vec<u64>> {
        let mut too_large = Vec::new();
        for (offset, table) in &mut self.tables {
            if self.refcounts.is_block(*offset) {
                let (mut old, mut block) = (vec![0; table.len()], table.clone());
                steps.file.read_bytes(*offset, &mut old)?;
                if self.refcounts.keep_larger(&old, &mut block) {
                    too_large.push(*offset);
                }
                steps.write(*offset, &mut block)?;
            } else if self.refcounts.is_in_table(*offset) {
                steps.write(*offset, table)?;
            }
        }
        Ok(too_large)
    }

    /// Writes the entries that lead to refcounts, as a step of their own, or all others, after what they lead to.
    fn write_entries(&mut self, steps: &mut Steps<'_>, to_counts: bool) -> io::Result<()> {
        let mut first = true;
        for (offset, entry) in &mut self.entries {
            // The header says where the refcount table is.
            let leads_to_counts = *offset == 0 || self.refcounts.is_in_table(*offset);
            if leads_to_counts == to_counts {
                if std::mem::take(&mut first) {
                    steps.finish()?;
                }
                steps.write(*offset, entry)?;
            }
        }
        if to_counts { steps.finish() } else { Ok(()) }
    }
}

/// Writes to a file in steps.
struct Steps<'a> {
    file: &'a HostFile,
    durable: bool,
    /// True when something was written in this step.
    open: bool,
}

impl Steps<'_> {
    fn write(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.open = true;
        self.file.write_bytes(offset, data)
    }

    /// Ends the step: nothing of the next is on disk before all of this.
    fn finish(&mut self) -> io::Result<()> {
        if self.durable && self.open {
            self.file.sync()?;
        }
        self.open = false;
        Ok(())
    }
}
