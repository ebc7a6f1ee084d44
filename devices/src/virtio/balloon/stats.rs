//! What the guest tells about its memory (virtio 1.2 §5.5.6.3).

use serde::{Deserialize, Serialize};

use crate::virtio::Buffers;

/// Bytes of an entry: a tag and a value.
const ENTRY: usize = 10;
/// The most entries looked at. There are 16 tags so far, and unknown ones are allowed.
const MAX_ENTRIES: usize = 64;

/// The last value of each statistic that the guest has told; amounts of memory are bytes.
///
/// The names and their order are part of the wire format.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Stats {
    #[serde(skip_serializing_if = "Option::is_none")]
    swap_in: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    swap_out: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    major_faults: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    minor_faults: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    free_memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    total_memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    available_memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disk_caches: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hugetlb_allocations: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hugetlb_failures: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    oom_kill: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    alloc_stall: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    async_scan: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    direct_scan: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    async_reclaim: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    direct_reclaim: Option<u64>,
}

/// What users see: the sizes, and what the guest has told. The order of the fields is part of the wire format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatisticsStatus {
    pub(super) target_pages: u32,
    pub(super) actual_pages: u32,
    pub(super) target_mib: u32,
    pub(super) actual_mib: u32,
    #[serde(flatten)]
    pub(super) told: Stats,
}

impl Stats {
    /// Takes the entries of a buffer in; false when there is none. What the buffer leaves out stays.
    pub(super) fn read(&mut self, buffer: &Buffers<'_>) -> bool {
        let count = (buffer.len() / ENTRY).min(MAX_ENTRIES);
        for at in (0..count).map(|index| index * ENTRY) {
            let (Some(tag), Some(value)) = (buffer.read_obj::<u16>(at), buffer.read_obj::<u64>(at + 2))
            else {
                return false;
            };
            if let Some(statistic) = self.tagged(u16::from_le(tag)) {
                *statistic = Some(u64::from_le(value));
            }
        }
        count > 0
    }

    fn tagged(&mut self, tag: u16) -> Option<&mut Option<u64>> {
        Some(match tag {
            0 => &mut self.swap_in,
            1 => &mut self.swap_out,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free_memory,
            5 => &mut self.total_memory,
            6 => &mut self.available_memory,
            7 => &mut self.disk_caches,
            8 => &mut self.hugetlb_allocations,
            9 => &mut self.hugetlb_failures,
            10 => &mut self.oom_kill,
            11 => &mut self.alloc_stall,
            12 => &mut self.async_scan,
            13 => &mut self.direct_scan,
            14 => &mut self.async_reclaim,
            15 => &mut self.direct_reclaim,
            _ => return None,
        })
    }
}
