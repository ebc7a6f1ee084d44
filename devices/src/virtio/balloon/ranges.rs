//! Page numbers from the driver, turned into runs of pages.
//!
//! A driver names pages one by one, and mostly gives neighbours away together. One system call for a run costs little
//! more than one for a page.

use std::ops::Range;

use super::PAGE_SIZE;
use crate::virtio::Buffers;

/// The most page numbers that one request may hold: 256 MiB. Linux sends 256 numbers at a time.
pub(super) const MAX_PFNS: usize = 1 << 16;

/// Reads the page numbers of a request into `pfns`; false when a part of the request is not one, or is too much.
pub(super) fn read(request: &Buffers<'_>, pfns: &mut Vec<u32>) -> bool {
    pfns.clear();
    let mut portion = [0; 1024];
    let end = request.len().min(4 * MAX_PFNS);
    for offset in (0..end).step_by(portion.len()) {
        let wanted = portion.len().min(end - offset);
        let count = request.read(offset, &mut portion[..wanted]);
        let numbers = portion[..count].chunks_exact(4);
        pfns.extend(numbers.map(|bytes| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])));
    }
    4 * pfns.len() == request.len() && !pfns.is_empty()
}

/// The guest addresses of the pages, in order, each page once, neighbours together.
pub(super) fn coalesce(pfns: &mut Vec<u32>) -> impl Iterator<Item = Range<u64>> {
    pfns.sort_unstable();
    pfns.dedup();
    pfns.chunk_by(|page, next| next - page == 1).map(|run| {
        let first = u64::from(run[0]);
        let count = u64::try_from(run.len()).expect("a usize fits");
        first * PAGE_SIZE..(first + count) * PAGE_SIZE
    })
}

/// The part of `range` that consists of whole pages of `size` bytes, a power of two; empty when there is none.
pub(super) fn whole_pages(range: Range<usize>, size: usize) -> Range<usize> {
    let start = range.start.checked_next_multiple_of(size);
    let end = range.end & !(size - 1);
    match start {
        Some(start) if start < end => start..end,
        _ => 0..0,
    }
}
