//! [`Builder`]: images made by hand.

/// Makes an empty image.
#[derive(Debug, Clone)]
pub(in crate::virtio::block) struct Builder {
    pub(in crate::virtio::block) version: u32,
    pub(in crate::virtio::block) cluster_bits: u32,
    pub(in crate::virtio::block) refcount_order: u32,
    pub(in crate::virtio::block) size: u64,
    /// Name and format of the backing file.
    pub(in crate::virtio::block) backing: Option<(&'static str, Option<&'static str>)>,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            version: 3,
            cluster_bits: 12,
            refcount_order: 4,
            size: 1 << 20,
            backing: None,
        }
    }
}

impl Builder {
    fn cluster(&self) -> usize {
        1 << self.cluster_bits
    }

    fn l1_entries(&self) -> usize {
        let each = self.cluster() * self.cluster() / 8;
        usize::try_from(self.size).unwrap().div_ceil(each)
    }

    /// Header, refcount table, one refcount block, L1 table.
    pub(in crate::virtio::block) fn build(&self) -> Vec<u8> {
        let cluster = self.cluster();
        let l1_clusters = (self.l1_entries() * 8).div_ceil(cluster);
        let clusters = 3 + l1_clusters;
        let mut image = vec![0; clusters * cluster];
        image[..104].copy_from_slice(&self.header());
        let mut at = if self.version == 2 { 72 } else { 104 };
        if let Some((name, format)) = self.backing {
            if let Some(format) = format {
                image[at..at + 4].copy_from_slice(&0xe279_2acau32.to_be_bytes());
                image[at + 4..at + 8].copy_from_slice(&u32::try_from(format.len()).unwrap().to_be_bytes());
                image[at + 8..at + 8 + format.len()].copy_from_slice(format.as_bytes());
                at += 8 + format.len().next_multiple_of(8);
            }
            // The end of the extensions.
            at += 8;
            image[8..16].copy_from_slice(&(at as u64).to_be_bytes());
            image[16..20].copy_from_slice(&u32::try_from(name.len()).unwrap().to_be_bytes());
            image[at..at + name.len()].copy_from_slice(name.as_bytes());
        }
        image[cluster..cluster + 8].copy_from_slice(&(2 * cluster as u64).to_be_bytes());
        for index in 0..clusters {
            set_refcount(
                &mut image[2 * cluster..3 * cluster],
                self.refcount_order,
                index,
                1,
            );
        }
        image
    }

    fn header(&self) -> [u8; 104] {
        let cluster = self.cluster() as u64;
        let mut header = [0; 104];
        header[..4].copy_from_slice(b"QFI\xfb");
        let l1_entries = u32::try_from(self.l1_entries()).unwrap();
        for (at, value) in [
            (4, self.version),
            (20, self.cluster_bits),
            (36, l1_entries),
            (56, 1),
        ] {
            header[at..at + 4].copy_from_slice(&value.to_be_bytes());
        }
        for (at, value) in [(24, self.size), (40, 3 * cluster), (48, cluster)] {
            header[at..at + 8].copy_from_slice(&value.to_be_bytes());
        }
        if self.version == 3 {
            header[96..100].copy_from_slice(&self.refcount_order.to_be_bytes());
            header[100..104].copy_from_slice(&104u32.to_be_bytes());
        }
        header
    }
}

/// Sets a count in a block of counts of `1 << order` bits.
pub(super) fn set_refcount(block: &mut [u8], order: u32, index: usize, count: u64) {
    if order >= 3 {
        let bytes = 1 << (order - 3);
        block[index * bytes..(index + 1) * bytes].copy_from_slice(&count.to_be_bytes()[8 - bytes..]);
        return;
    }
    let bits = 1 << order;
    let (at, shift) = (index * bits / 8, index * bits % 8);
    let mask = ((1u32 << bits) - 1) << shift;
    let byte = u32::from(block[at]) & !mask | u32::try_from(count).unwrap() << shift;
    block[at] = u8::try_from(byte).unwrap();
}
