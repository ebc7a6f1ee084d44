//! [`Header`]: what an image says of itself, read and checked before anything else looks at the image.
//!
//! An image comes from anywhere, so what is refused here is all that would make later work unsafe or unbounded: features
//! that are not known, tables outside of the file or larger than any real one.

use std::collections::BTreeSet;

use super::Flaw;
use super::file::HostFile;
use crate::virtio::block::SECTOR;

const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes in a header of version 2, and the least in one of version 3.
const V2_LEN: usize = 72;
const V3_LEN: usize = 104;

/// Limits that QEMU has too: of the active table of tables, and of the table of refcount blocks.
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
const MAX_BACKING_NAME: u64 = 1023;

/// The bits of a table's entry that hold an offset.
const OFFSET_BITS: u64 = 0x00ff_ffff_ffff_fe00;

/// Incompatible features (bits of the header field).
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;

/// Header extensions.
const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
/// Bytes for each feature in the table of their names.
const FEATURE_NAME_LEN: u64 = 48;

/// A backing file as the image above it names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Backing {
    /// Its name, relative to the folder of the image.
    pub(super) name: String,
    /// Its format, if the header says so.
    pub(super) format: Option<String>,
}

/// The parts of a header that are of use here, and the places of the refcount blocks.
#[derive(Debug)]
pub(super) struct Header {
    /// Bytes of the disk.
    pub(super) size: u64,
    /// Bytes in a cluster.
    pub(super) cluster: u64,
    /// Bytes in the file when it was opened.
    pub(super) file_len: u64,
    /// The table of refcount blocks: its offset and its bytes.
    pub(super) refcount_table: (u64, u64),
    /// The logarithm of a refcount's bits.
    pub(super) refcount_order: u32,
    /// Where refcount blocks are.
    pub(super) refcount_blocks: BTreeSet<u64>,
    /// The backing file.
    pub(super) backing: Option<Backing>,
}

/// The header's first bytes, fields by offset.
struct Fields([u8; V3_LEN]);

impl Fields {
    fn u32(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.0[offset..offset + 4]);
        u32::from_be_bytes(bytes)
    }

    fn u64(&self, offset: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.0[offset..offset + 8]);
        u64::from_be_bytes(bytes)
    }
}

impl Header {
    /// Reads and checks the header and the two tables that it names. Writes nothing.
    pub(super) fn read(file: &HostFile, read_only: bool) -> Result<Self, Flaw> {
        let file_len = file.len();
        let mut fields = Fields([0; V3_LEN]);
        if file_len < V3_LEN as u64 {
            return Err(Flaw::NotQcow2);
        }
        file.read_bytes(0, &mut fields.0)?;
        if fields.0[..4] != MAGIC {
            return Err(Flaw::NotQcow2);
        }
        let version = fields.u32(4);
        if version != 2 && version != 3 {
            return Err(Flaw::Version { version });
        }
        if version == 2 {
            // Version 2 has no more fields; these are what a version 3 would say in their place.
            fields.0[V2_LEN..].fill(0);
            fields.0[96..100].copy_from_slice(&4u32.to_be_bytes());
        }
        check_features(&fields, read_only)?;
        let cluster_bits = fields.u32(20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(Flaw::Malformed {
                what: "the cluster size",
            });
        }
        let mut header = Self {
            size: fields.u64(24),
            cluster: 1 << cluster_bits,
            file_len,
            refcount_table: (0, 0),
            refcount_order: fields.u32(96),
            refcount_blocks: BTreeSet::new(),
            backing: None,
        };
        header.check_l1(file, &fields)?;
        header.read_refcount_table(file, &fields)?;
        header.read_backing(file, &fields, version)?;
        Ok(header)
    }

    /// Where a table is, when it lies in the file, begins at a cluster and is not too large.
    fn table(&self, offset: u64, len: u64, limit: u64, what: &'static str) -> Result<(u64, u64), Flaw> {
        let end = offset.checked_add(len);
        let inside = end.is_some_and(|end| end <= self.file_len.next_multiple_of(self.cluster));
        if len > limit || !inside || offset == 0 || !offset.is_multiple_of(self.cluster) {
            return Err(Flaw::Malformed { what });
        }
        Ok((offset, len))
    }

    /// Reads a table whose entries are offsets of clusters in the file, or zero.
    fn entries(
        &self,
        file: &HostFile,
        (offset, len): (u64, u64),
        what: &'static str,
    ) -> Result<Vec<u64>, Flaw> {
        let malformed = || Flaw::Malformed { what };
        let mut bytes = vec![0; usize::try_from(len).map_err(|_| malformed())?];
        file.read_bytes(offset, &mut bytes)?;
        let (entries, _) = bytes.as_chunks();
        entries
            .iter()
            .map(|entry| {
                let place = u64::from_be_bytes(*entry) & OFFSET_BITS;
                let inside = place < self.file_len && place.is_multiple_of(self.cluster);
                if inside { Ok(place) } else { Err(malformed()) }
            })
            .collect()
    }

    fn check_l1(&self, file: &HostFile, fields: &Fields) -> Result<(), Flaw> {
        let what = "the L1 table";
        let entries = u64::from(fields.u32(36));
        let table = self.table(fields.u64(40), entries * 8, MAX_L1_BYTES, what)?;
        let each = self.cluster * (self.cluster / 8);
        let most = entries.saturating_mul(each);
        if self.size > most || self.size > i64::MAX as u64 {
            return Err(Flaw::Malformed {
                what: "the disk's size",
            });
        }
        if self.size < SECTOR {
            return Err(Flaw::Empty);
        }
        self.entries(file, table, what).map(drop)
    }

    fn read_refcount_table(&mut self, file: &HostFile, fields: &Fields) -> Result<(), Flaw> {
        let what = "the refcount table";
        if self.refcount_order > 6 {
            return Err(Flaw::Malformed {
                what: "the width of refcounts",
            });
        }
        let len = u64::from(fields.u32(56)) * self.cluster;
        self.refcount_table = self.table(fields.u64(48), len, MAX_REFCOUNT_TABLE_BYTES, what)?;
        let blocks = self.entries(file, self.refcount_table, what)?;
        // A search for free clusters goes through all blocks. So there are none but for what the file has.
        let each = (self.cluster * 8) >> self.refcount_order;
        let useful = self
            .file_len
            .div_ceil(self.cluster)
            .div_ceil(each)
            .saturating_add(1);
        // imago counts on the first cluster to be in use, as it is: the header is in it.
        let first = *blocks.first().unwrap_or(&0);
        let mut counts = [0; 8];
        file.read_bytes(first, &mut counts)?;
        let count = match self.refcount_order {
            order @ 3..=6 => counts.iter().take(1 << (order - 3)).any(|byte| *byte != 0),
            order => counts[0] & ((1u8 << (1u32 << order)) - 1) != 0,
        };
        if first == 0 || !count {
            return Err(Flaw::Malformed { what });
        }
        for (index, block) in (0..).zip(blocks) {
            if block != 0 && (index >= useful || !self.refcount_blocks.insert(block)) {
                return Err(Flaw::Malformed { what });
            }
        }
        Ok(())
    }

    fn read_backing(&mut self, file: &HostFile, fields: &Fields, version: u32) -> Result<(), Flaw> {
        let what = "the header";
        let malformed = || Flaw::Malformed { what };
        // All of it lies in the first cluster.
        let len = usize::try_from(self.cluster.min(self.file_len)).map_err(|_| malformed())?;
        let mut first = vec![0; len];
        file.read_bytes(0, &mut first)?;
        let header_len = match version {
            2 => V2_LEN as u64,
            _ => u64::from(fields.u32(100)),
        };
        let mut format = None;
        if version == 3 {
            if header_len < V3_LEN as u64 || header_len % 8 != 0 {
                return Err(malformed());
            }
            format = backing_format(&first, header_len).ok_or_else(malformed)??;
        }
        let (offset, len) = (fields.u64(8), u64::from(fields.u32(16)));
        if offset == 0 {
            return Ok(());
        }
        let name = part(&first, offset, len).ok_or_else(malformed)?;
        if len == 0 || len > MAX_BACKING_NAME {
            return Err(malformed());
        }
        self.backing = Some(Backing {
            name: text(name)?,
            format,
        });
        Ok(())
    }
}

fn check_features(fields: &Fields, read_only: bool) -> Result<(), Flaw> {
    let (incompatible, autoclear) = (fields.u64(72), fields.u64(88));
    if fields.u32(32) != 0 {
        return Err(Flaw::Encrypted);
    }
    if incompatible & CORRUPT != 0 {
        return Err(Flaw::Corrupt);
    }
    if incompatible & DIRTY != 0 {
        return Err(Flaw::Dirty);
    }
    if incompatible & EXTERNAL_DATA != 0 {
        return Err(Flaw::ExternalData);
    }
    if incompatible != 0 {
        return Err(Flaw::Features { bits: incompatible });
    }
    if autoclear != 0 && !read_only {
        return Err(Flaw::Autoclear { bits: autoclear });
    }
    Ok(())
}

/// Walks the header extensions for the format of the backing file; nothing when they do not fit into the cluster.
fn backing_format(first: &[u8], mut at: u64) -> Option<Result<Option<String>, Flaw>> {
    let mut format = None;
    loop {
        let head: [u8; 8] = part(first, at, 8)?.try_into().ok()?;
        let [k0, k1, k2, k3, l0, l1, l2, l3] = head;
        let len = u64::from(u32::from_be_bytes([l0, l1, l2, l3]));
        let data = part(first, at + 8, len)?;
        match u32::from_be_bytes([k0, k1, k2, k3]) {
            END => return Some(Ok(format)),
            BACKING_FORMAT if format.is_some() => return None,
            BACKING_FORMAT => match text(data) {
                Ok(name) => format = Some(name),
                Err(flaw) => return Some(Err(flaw)),
            },
            FEATURE_NAMES if len % FEATURE_NAME_LEN != 0 => return None,
            _ => {}
        }
        at += 8 + len.next_multiple_of(8);
    }
}

fn part(bytes: &[u8], offset: u64, len: u64) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    let end = start.checked_add(usize::try_from(len).ok()?)?;
    bytes.get(start..end)
}

fn text(bytes: &[u8]) -> Result<String, Flaw> {
    String::from_utf8(bytes.to_vec()).map_err(|_| Flaw::Malformed {
        what: "a name in the header",
    })
}
