//! Page numbers become runs that hold the same pages, and as few as can be.

use std::collections::BTreeSet;

use proptest::collection::vec;
use proptest::prelude::*;

use super::super::ranges::{MAX_PFNS, coalesce, read, whole_pages};
use super::PAGE;
use crate::virtio::Buffers;
use vm_memory::VolatileSlice;

/// Runs in units of pages.
fn runs(pfns: &[u32]) -> Vec<(u64, u64)> {
    let mut pfns = pfns.to_vec();
    let runs = coalesce(&mut pfns);
    runs.map(|run| (run.start / PAGE, run.end / PAGE)).collect()
}

/// What is read from a request of these bytes, and whether it was all.
fn read_from(mut bytes: Vec<u8>) -> (Vec<u32>, bool) {
    let mut request = Buffers::new();
    request.push(&VolatileSlice::from(&mut bytes[..]));
    let mut pfns = vec![7];
    let whole = read(&request, &mut pfns);
    (pfns, whole)
}

#[test]
fn neighbours_become_one_run_whatever_their_order() {
    assert_eq!(runs(&[]), []);
    assert_eq!(runs(&[5]), [(5, 6)]);
    assert_eq!(runs(&[7, 5, 6, 6, 9]), [(5, 8), (9, 10)]);
    assert_eq!(runs(&[u32::MAX, 0]), [(0, 1), (0xffff_ffff, 0x1_0000_0000)]);
}

#[test]
fn reads_whole_numbers_up_to_the_limit() {
    assert_eq!(read_from(vec![]), (vec![], false));
    assert_eq!(read_from(vec![1, 0, 0]), (vec![], false));
    assert_eq!(read_from(vec![1, 0, 0, 0, 2]), (vec![1], false));
    assert_eq!(read_from(vec![1, 0, 0, 0, 2, 1, 0, 0]), (vec![1, 0x102], true));
    let (pfns, whole) = read_from(vec![1; 4 * MAX_PFNS]);
    assert_eq!((pfns.len(), whole), (MAX_PFNS, true));
    let (pfns, whole) = read_from(vec![1; 4 * MAX_PFNS + 4]);
    assert_eq!((pfns.len(), whole), (MAX_PFNS, false));
}

#[test]
fn whole_pages_are_never_more_than_the_range() {
    assert_eq!(whole_pages(0..4096, 4096), 0..4096);
    assert_eq!(whole_pages(1..4096, 4096), 0..0);
    assert_eq!(whole_pages(1..8192, 4096), 4096..8192);
    assert_eq!(whole_pages(0..(2 << 20) + 4096, 2 << 20), 0..2 << 20);
    assert_eq!(whole_pages(4096..(4 << 20) - 1, 2 << 20), 0..0);
    assert!(whole_pages(usize::MAX - 1..usize::MAX, 4096).is_empty());
}

proptest! {
    #[test]
    fn runs_hold_the_pages_and_do_not_touch_each_other(
        pfns in vec(prop_oneof![8 => 0u32..64, 1 => any::<u32>()], 0..100),
    ) {
        let pages: BTreeSet<u64> = pfns.iter().map(|pfn| u64::from(*pfn)).collect();
        let runs = runs(&pfns);
        prop_assert!(runs.windows(2).all(|pair| pair[0].1 < pair[1].0));
        let covered: Vec<u64> = runs.iter().flat_map(|run| run.0..run.1).collect();
        prop_assert_eq!(covered, pages.into_iter().collect::<Vec<_>>());
    }

    #[test]
    fn whole_pages_lie_in_the_range_and_miss_less_than_a_page_at_each_end(
        start in 0usize..1 << 24,
        len in 0usize..1 << 24,
        size in prop_oneof![Just(4096usize), Just(2 << 20)],
    ) {
        let pages = whole_pages(start..start + len, size);
        prop_assert!(pages.start.is_multiple_of(size) && pages.end.is_multiple_of(size));
        if pages.is_empty() {
            prop_assert!(len < 2 * size);
        } else {
            prop_assert!(pages.start >= start && pages.end <= start + len);
            prop_assert!(pages.start - start < size && start + len - pages.end < size);
        }
    }
}
