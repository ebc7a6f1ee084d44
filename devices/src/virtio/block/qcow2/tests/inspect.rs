//! [`Report`]: whether an image is whole, found out without the code under test.

use std::collections::BTreeMap;

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// What is wrong with an image.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::virtio::block) struct Report {
    /// Clusters in use that count as free or as used by fewer, and wrong marks of clusters that have one user.
    pub(in crate::virtio::block) errors: Vec<String>,
    /// Clusters that count as used, and nobody uses them.
    pub(in crate::virtio::block) leaks: usize,
}

/// An image that is looked at.
struct Image<'a> {
    bytes: &'a [u8],
    cluster: u64,
    order: u32,
    references: BTreeMap<u64, u64>,
    errors: Vec<String>,
    /// Entries that lead to a cluster: whether they say that it has one user.
    marks: Vec<(u64, bool)>,
}

impl Image<'_> {
    fn u32(&self, at: u64) -> u64 {
        let at = usize::try_from(at).unwrap();
        let bytes = self
            .bytes
            .get(at..at + 4)
            .map_or([0; 4], |b| b.try_into().unwrap());
        u32::from_be_bytes(bytes).into()
    }

    fn u64(&self, at: u64) -> u64 {
        self.u32(at) << 32 | self.u32(at + 4)
    }

    fn refer(&mut self, offset: u64, len: u64, what: &str) {
        if offset >= self.bytes.len() as u64 {
            self.errors
                .push(format!("{what} at {offset:#x} is behind the end"));
        }
        for index in offset / self.cluster..(offset + len).div_ceil(self.cluster) {
            *self.references.entry(index).or_default() += 1;
        }
    }

    fn refcount(&self, index: u64) -> u64 {
        let each = (self.cluster * 8) >> self.order;
        let (table, clusters) = (self.u64(48), self.u32(56));
        if index / each >= clusters * self.cluster / 8 {
            return 0;
        }
        let block = self.u64(table + index / each * 8);
        if block == 0 {
            return 0;
        }
        let bit = (index % each) << self.order;
        let value = self.u64(block + bit / 64 * 8);
        match self.order {
            3.. => value << (bit % 64) >> (64 - (1 << self.order)),
            small => {
                let byte = value >> (56 - bit % 64 / 8 * 8) & 0xff;
                byte >> (bit % 8) & ((1 << (1 << small)) - 1)
            }
        }
    }

    fn walk_l1(&mut self, l1: u64, entries: u64, active: bool) {
        for index in 0..entries {
            let entry = self.u64(l1 + index * 8);
            let l2 = entry & OFFSET;
            if l2 == 0 {
                continue;
            }
            self.refer(l2, self.cluster, "an L2 table");
            if active {
                self.marks.push((l2, entry & COPIED != 0));
            }
            for index in 0..self.cluster / 8 {
                self.walk_entry(self.u64(l2 + index * 8), active);
            }
        }
    }

    fn walk_entry(&mut self, entry: u64, active: bool) {
        if entry & COMPRESSED != 0 {
            let bits = 62 - (self.cluster.trailing_zeros() - 8);
            let offset = entry & ((1 << bits) - 1);
            let sectors = (entry & !COMPRESSED) >> bits;
            let len = (sectors + 1) * 512 - offset % 512;
            self.refer(offset, len, "compressed data");
        } else if entry & OFFSET != 0 {
            self.refer(entry & OFFSET, self.cluster, "data");
            if active {
                self.marks.push((entry & OFFSET, entry & COPIED != 0));
            }
        }
    }

    fn walk(&mut self) {
        self.refer(0, self.cluster, "the header");
        let (table, clusters) = (self.u64(48), self.u32(56));
        self.refer(table, clusters * self.cluster, "the refcount table");
        for index in 0..clusters * self.cluster / 8 {
            let block = self.u64(table + index * 8);
            if block != 0 {
                self.refer(block, self.cluster, "a refcount block");
            }
        }
        let (l1, entries) = (self.u64(40), self.u32(36));
        self.refer(l1, entries * 8, "the L1 table");
        self.walk_l1(l1, entries, true);
        // The only snapshot that these tests make.
        if self.u32(60) == 1 {
            let snapshots = self.u64(64);
            self.refer(snapshots, 64, "the table of snapshots");
            let (l1, entries) = (self.u64(snapshots), self.u32(snapshots + 8));
            self.refer(l1, entries * 8, "the L1 table of a snapshot");
            self.walk_l1(l1, entries, false);
        }
    }
}

impl Report {
    pub(in crate::virtio::block) fn of(bytes: &[u8]) -> Self {
        let mut image = Image {
            bytes,
            cluster: 0,
            order: 4,
            references: BTreeMap::new(),
            errors: Vec::new(),
            marks: Vec::new(),
        };
        image.cluster = 1 << image.u32(20);
        if image.u32(4) == 3 {
            image.order = u32::try_from(image.u32(96)).unwrap();
        }
        image.walk();
        let mut report = Self::default();
        for index in 0..(bytes.len() as u64).div_ceil(image.cluster) {
            let references = image.references.get(&index).copied().unwrap_or_default();
            let count = image.refcount(index);
            if count < references {
                let error = format!("cluster {index} has {references} users and the refcount {count}");
                image.errors.push(error);
            }
            report.leaks += usize::from(count > references);
        }
        for (offset, copied) in std::mem::take(&mut image.marks) {
            let count = image.refcount(offset / image.cluster);
            if copied != (count == 1) {
                let error = format!("data at {offset:#x} is marked {copied} and has the refcount {count}");
                image.errors.push(error);
            }
        }
        report.errors = image.errors;
        report
    }
}
