//! Giving pages of guest memory back to the host.
//!
//! What the guest finds in such a page later is up to the host (virtio 1.2 §5.5.6: inflated, hinted and reported pages
//! are uninitialized memory): zeros, or for a page of the kernel's image, which is mapped from its file, what the file
//! has. Both are the guest's own or nobody's. So the device never claims that pages are zero: it answers every request
//! with a used length of zero.

use std::io;
use std::ops::Range;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

use super::ranges::whole_pages;
use crate::GuestMemory;

type Region = GuestRegionMmap<()>;

const HOST_PAGE: usize = 4096;
/// A page of hugetlbfs. It comes and goes as a whole only.
const HUGE_PAGE: usize = 2 << 20;

/// What became of memory that was to be given back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Released {
    /// Bytes that the host has back.
    pub(super) bytes: u64,
    /// Something of it was no memory of the guest, or the host would not take it.
    pub(super) failed: bool,
}

impl Released {
    pub(super) const FAILED: Self = Self {
        bytes: 0,
        failed: true,
    };

    pub(super) fn add(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.failed |= other.failed;
    }
}

/// Gives back what of `addresses` is memory of the guest.
pub(super) fn release(mem: &GuestMemory, addresses: Range<u64>) -> Released {
    let mut released = Released::default();
    let mut covered = 0;
    for region in mem.iter() {
        let base = region.start_addr().0;
        let start = addresses.start.max(base);
        let end = addresses.end.min(base + region.len());
        if start < end {
            covered += end - start;
            released.add(release_from(region, start - base..end - base));
        }
    }
    released.failed |= covered != addresses.end - addresses.start;
    released
}

/// Gives back a piece of a chain: `len` bytes at the host address `base`, which lie in one region.
pub(super) fn release_piece(mem: &GuestMemory, base: usize, len: usize) -> Released {
    for region in mem.iter() {
        let start = region.as_ptr().addr();
        if (start..start + region.size()).contains(&base) {
            let offset = (base - start) as u64;
            return release_from(region, offset..offset + len as u64);
        }
    }
    Released::FAILED
}

/// Gives back the whole pages of a range of `region`.
fn release_from(region: &Region, range: Range<u64>) -> Released {
    let (Ok(start), Ok(end)) = (usize::try_from(range.start), usize::try_from(range.end)) else {
        return Released::FAILED;
    };
    let hugetlb = region.is_hugetlbfs() == Some(true) || region.flags() & libc::MAP_HUGETLB != 0;
    // Regions begin at whole pages of whatever backs them.
    let pages = whole_pages(start..end, if hugetlb { HUGE_PAGE } else { HOST_PAGE });
    if pages.is_empty() {
        return Released::default();
    }
    match discard(region, &pages) {
        Ok(()) => Released {
            bytes: pages.len() as u64,
            failed: false,
        },
        Err(error) => {
            log::warn!(
                "balloon: the host does not take {} bytes back: {error}",
                pages.len()
            );
            Released::FAILED
        }
    }
}

fn discard(region: &Region, pages: &Range<usize>) -> io::Result<()> {
    let place = MemoryRegionAddress(pages.start as u64);
    let slice = region.get_slice(place, pages.len()).map_err(io::Error::other)?;
    // Shared memory stays with its file, unless a hole is made there.
    let shared = region.flags() & libc::MAP_SHARED == libc::MAP_SHARED;
    let advice = if shared {
        libc::MADV_REMOVE
    } else {
        libc::MADV_DONTNEED
    };
    // SAFETY: needed to give memory back. The slice lies within one mapping, which the region owns; as guest memory it
    // is only ever accessed by address, volatile, so nothing of ours relies on its content.
    match unsafe { libc::madvise(slice.ptr_guard_mut().as_ptr().cast(), slice.len(), advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
