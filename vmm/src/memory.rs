//! Guest memory: how it is mapped into this process, and files over parts of it.
//!
//! Called by the control thread while it builds a machine, and by whoever plugs memory in. Everybody else only borrows the [`GuestMemory`] made here.
//! This is one of the two places of the monitor with `unsafe` memory mapping.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::{self, null_mut};

use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress, MmapRegion,
    VolatileMemory, VolatileSlice,
};

use crate::config::HugePages;
use crate::x86_64::layout;

pub use devices::GuestMemory;
/// A contiguous part of guest memory; it unmaps itself.
pub type GuestRegion = vm_memory::GuestRegionMmap<()>;

const MIB: u64 = 1 << 20;
/// What the host backs with one huge page, if address and length allow.
pub const HUGE_PAGE: usize = 2 << 20;
/// How often an aligned place is tried for, should other threads map memory at the same moment.
const ALIGN_ATTEMPTS: usize = 4;

/// Guest RAM cannot be had, or a file cannot be mapped over it.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// No RAM was asked for.
    #[error("a machine with 0 MiB of RAM cannot be built: set mem_size_mib to 1 or more")]
    Zero,
    /// More RAM than guest physical addresses reach.
    #[error(
        "{size_mib} MiB of RAM are more than this CPU can address in a guest: set mem_size_mib to {limit_mib} or less"
    )]
    TooLarge {
        /// What was asked for.
        size_mib: u64,
        /// What is possible.
        limit_mib: u64,
    },
    /// The host does not give the address space.
    #[error(
        "the host does not give {size_mib} MiB for guest RAM: lower mem_size_mib, or raise the host's limits \
         (ulimit -v, vm.overcommit_memory)"
    )]
    Map {
        /// What was asked for.
        size_mib: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The host has not enough huge pages set aside.
    #[error(
        "the host has not {pages} free huge pages for {size_mib} MiB of guest RAM: reserve more (their count goes to \
         /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages), or set huge_pages to Transparent or None"
    )]
    HugePages {
        /// What was asked for.
        size_mib: u64,
        /// In pages of 2 MiB.
        pages: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The range for a file is not inside RAM, or not made of whole pages.
    #[error("guest RAM has no whole pages at {start:#x} with {size:#x} bytes for a file mapping")]
    Range {
        /// Guest physical start.
        start: u64,
        /// Bytes.
        size: u64,
    },
    /// The file ends before the range does: touching the mapping there would be a bus error.
    #[error("the file has {file_size} bytes, and {end} are to be mapped")]
    PastEndOfFile {
        /// Bytes in the file.
        file_size: u64,
        /// End of the range in the file.
        end: u64,
    },
    /// The file cannot be mapped.
    #[error("cannot map {size:#x} bytes of the file to the guest address {start:#x}")]
    MapFile {
        /// Guest physical start.
        start: u64,
        /// Bytes.
        size: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Who sees guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// This process. The kernel's image can be mapped over it.
    Private,
    /// Also processes that are given its files: a part is a file without a name.
    Shared,
}

/// Maps `size_mib` MiB of zeroed private RAM of ordinary pages; see [`create_of`].
pub fn create(size_mib: u64) -> Result<GuestMemory, MemoryError> {
    create_of(HugePages::None, Sharing::Private, size_mib)
}

/// Maps `size_mib` MiB of zeroed RAM, in one part or in two around the hole below 4 GiB.
///
/// The host pages come with the first touch, so that more RAM than the host has free can be given to guests that do
/// not use it; only huge pages that the host has set aside are reserved here, all or none. Every part begins at a
/// multiple of 2 MiB in this process as it does in the guest, so that huge pages can back it.
pub fn create_of(pages: HugePages, sharing: Sharing, size_mib: u64) -> Result<GuestMemory, MemoryError> {
    let limit_mib = address_limit() / MIB - (layout::HOLE.end - layout::HOLE.start) / MIB;
    match size_mib {
        0 => return Err(MemoryError::Zero),
        _ if size_mib > limit_mib => return Err(MemoryError::TooLarge { size_mib, limit_mib }),
        _ => (),
    }
    let map_error = |source| match pages {
        HugePages::Hugetlbfs2M => MemoryError::HugePages {
            size_mib,
            pages: size_mib.div_ceil(HUGE_PAGE as u64 / MIB),
            source,
        },
        HugePages::None | HugePages::Transparent => MemoryError::Map { size_mib, source },
    };

    let regions = layout::ram_ranges(size_mib * MIB)
        .map(|range| region(pages, sharing, GuestAddress(range.start), range.end - range.start))
        .collect::<io::Result<Vec<_>>>()
        .map_err(map_error)?;
    GuestMemory::from_regions(regions).map_err(|error| map_error(io::Error::other(error)))
}

/// Private, zeroed memory for the guest address `start`, not yet seen by a guest. Its pages come with the first touch.
pub fn anonymous(start: GuestAddress, size: u64) -> io::Result<GuestRegion> {
    region(HugePages::None, Sharing::Private, start, size)
}

fn region(pages: HugePages, sharing: Sharing, start: GuestAddress, size: u64) -> io::Result<GuestRegion> {
    let length = usize::try_from(size).map_err(io::Error::other)?;
    let mapping = match sharing {
        Sharing::Private => map_ram(pages, length)?,
        Sharing::Shared => map_shared(pages, length)?,
    };
    GuestRegion::new(mapping, start).ok_or_else(|| io::Error::other("the guest address range overflows"))
}

/// Maps `file`, which has `file_size` bytes, over the first pages of `region`: shared, so that writes reach the file,
/// or else private to this guest.
///
/// Whoever shortens the file afterwards takes pages away from the guest, as with [`map_private_file`].
pub fn map_file_over(region: &GuestRegion, file: &File, file_size: u64, shared: bool) -> io::Result<()> {
    let length = file_size.next_multiple_of(layout::PAGE_SIZE);
    let length = usize::try_from(length).map_err(io::Error::other)?;
    let target = region.get_slice(MemoryRegionAddress(0), length);
    let sharing = if shared {
        libc::MAP_SHARED
    } else {
        libc::MAP_PRIVATE
    };
    map_fixed(&target.map_err(io::Error::other)?, file, 0, sharing)
}

/// Gives the pages of a range of `region`, which is private and anonymous, back to the host. They read as zero then.
pub fn discard(region: &GuestRegion, range: Range<u64>) -> io::Result<()> {
    let length = range.end.saturating_sub(range.start);
    let length = usize::try_from(length).map_err(io::Error::other)?;
    let pages = region.get_slice(MemoryRegionAddress(range.start), length);
    let pages = pages.map_err(io::Error::other)?;
    advise(&pages, libc::MADV_DONTNEED)
}

/// Maps `size` bytes of `file` at `offset` over the RAM at `start`, copy-on-write: reads come from the page cache that
/// all guests share, writes stay in this guest. All three numbers must be multiples of the page size.
///
/// Whoever shortens the file while the guest runs takes pages away from it; its vCPU then fails. Changing an image in
/// use (instead of replacing it by `rename`) is as wrong here as for a mapped program.
pub fn map_private_file(
    memory: &GuestMemory,
    start: GuestAddress,
    file: &File,
    offset: u64,
    size: u64,
) -> Result<(), MemoryError> {
    let range_error = || MemoryError::Range { start: start.0, size };
    let map_error = |source| MemoryError::MapFile {
        start: start.0,
        size,
        source,
    };

    let length = usize::try_from(size).map_err(|_| range_error())?;
    let whole_pages = [start.0, offset, size]
        .iter()
        .all(|number| number % layout::PAGE_SIZE == 0);
    if !whole_pages || length == 0 {
        return Err(range_error());
    }
    let end = offset.checked_add(size).ok_or_else(range_error)?;
    let file_size = file.metadata().map_err(map_error)?.len();
    if end > file_size {
        return Err(MemoryError::PastEndOfFile { file_size, end });
    }
    // One slice of one region: a range that crosses into the hole or out of RAM has none.
    let region = memory.find_region(start).ok_or_else(range_error)?;
    let place = region.to_region_addr(start).ok_or_else(range_error)?;
    let target = region.get_slice(place, length).map_err(|_| range_error())?;
    map_fixed(&target, file, offset, libc::MAP_PRIVATE).map_err(map_error)
}

/// Makes the guest's own copies of the pages of a file mapped by [`map_private_file`], before the guest writes them.
///
/// `start` and `size` must be multiples of the page size.
///
/// # Errors
/// Fails before Linux 5.14, without enough memory, and outside of RAM. The pages are then copied when they are written.
pub fn copy_file_pages(memory: &GuestMemory, start: GuestAddress, size: u64) -> io::Result<()> {
    let length = usize::try_from(size).map_err(io::Error::other)?;
    let pages = memory.get_slice(start, length).map_err(io::Error::other)?;
    advise(&pages, libc::MADV_POPULATE_WRITE)
}

/// Tells the kernel what guest memory is to be like.
fn advise(pages: &VolatileSlice<'_>, advice: libc::c_int) -> io::Result<()> {
    // SAFETY: needed as no wrapper gives advice. The pages lie inside a mapping that a region of guest memory owns, and
    // are only ever accessed by address, volatile: nothing relies on their content.
    match unsafe { libc::madvise(pages.ptr_guard_mut().as_ptr().cast(), pages.len(), advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Replaces whole pages of guest memory by those of `file` from `offset` on.
fn map_fixed(target: &VolatileSlice<'_>, file: &File, offset: u64, sharing: libc::c_int) -> io::Result<()> {
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: needed to map over what is mapped. MAP_FIXED replaces exactly the pages of `target`, which lie inside a
    // mapping that a region of guest memory owns and unmaps as a whole when dropped. There are no references into guest
    // memory that could see the change, only volatile accesses by address.
    let mapped = unsafe {
        libc::mmap(
            target.ptr_guard_mut().as_ptr().cast(),
            target.len(),
            libc::PROT_READ | libc::PROT_WRITE,
            sharing | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            offset,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The first address beyond what this CPU's physical addresses can name; a guest has the same.
pub fn address_limit() -> u64 {
    const MAX_LEAF: u32 = 0x8000_0000;
    const ADDRESS_SIZES: u32 = 0x8000_0008;
    const MIN_BITS: u32 = 36;

    let bits = if core::arch::x86_64::__cpuid(MAX_LEAF).eax >= ADDRESS_SIZES {
        core::arch::x86_64::__cpuid(ADDRESS_SIZES).eax & 0xff
    } else {
        MIN_BITS
    };
    1 << bits.clamp(MIN_BITS, 52)
}

fn map_ram(pages: HugePages, length: usize) -> io::Result<MmapRegion<()>> {
    match pages {
        HugePages::None => map_aligned(length),
        HugePages::Transparent => ask_for_huge_pages(map_aligned(length)?),
        HugePages::Hugetlbfs2M => {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
            let access = libc::PROT_READ | libc::PROT_WRITE;
            MmapRegion::build(None, length, access, flags).map_err(into_io_error)
        }
    }
}

fn ask_for_huge_pages(region: MmapRegion<()>) -> io::Result<MmapRegion<()>> {
    advise(&region.as_volatile_slice(), libc::MADV_HUGEPAGE)?;
    Ok(region)
}

/// Maps a file in memory that has no name and that other processes can be given.
fn map_shared(pages: HugePages, length: usize) -> io::Result<MmapRegion<()>> {
    let flags = match pages {
        HugePages::None | HugePages::Transparent => libc::MFD_CLOEXEC,
        HugePages::Hugetlbfs2M => libc::MFD_CLOEXEC | libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
    };
    // SAFETY: needed as no safe wrapper exists. The name is a constant that ends with NUL.
    let fd = unsafe { libc::memfd_create(c"guest-ram".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, and nobody else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(length as u64)?;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
    let region = MmapRegion::build(Some(FileOffset::new(file, 0)), length, access, flags);
    let region = region.map_err(into_io_error)?;
    match pages {
        HugePages::Transparent => ask_for_huge_pages(region),
        HugePages::None | HugePages::Hugetlbfs2M => Ok(region),
    }
}

/// An anonymous mapping that begins at a multiple of [`HUGE_PAGE`] wherever the kernel plays along. Recent kernels
/// align by themselves; for the others a hole of exactly the right place and size is prepared, which the kernel's
/// search from the top finds first. Nothing depends on the outcome but speed.
fn map_aligned(length: usize) -> io::Result<MmapRegion<()>> {
    for _ in 0..ALIGN_ATTEMPTS {
        let above_the_hole = Reservation::with_hole_below(length)?;
        let region = map_anonymous(length)?;
        drop(above_the_hole);
        if region.as_ptr().addr() % HUGE_PAGE == 0 {
            return Ok(region);
        }
    }
    map_anonymous(length)
}

fn map_anonymous(length: usize) -> io::Result<MmapRegion<()>> {
    MmapRegion::new(length).map_err(into_io_error)
}

fn into_io_error(error: MmapRegionError) -> io::Error {
    match error {
        MmapRegionError::Mmap(source) => source,
        other => io::Error::other(other),
    }
}

/// Address space that is held and never accessed.
struct Reservation {
    start: *mut u8,
    length: usize,
}

impl Reservation {
    /// Reserves so that a mapping of `length` bytes fits just below and is aligned there.
    fn with_hole_below(length: usize) -> io::Result<Reservation> {
        let mut all = Reservation::new(length.checked_add(HUGE_PAGE).ok_or(io::ErrorKind::OutOfMemory)?)?;
        let end = all.start.addr() + all.length;
        let aligned = (end - length) & !(HUGE_PAGE - 1);
        all.release_front(aligned + length - all.start.addr());
        Ok(all)
    }

    fn new(length: usize) -> io::Result<Reservation> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: the kernel chooses a free place, and nothing can be accessed there.
        let start = unsafe { libc::mmap(null_mut(), length, libc::PROT_NONE, flags, -1, 0) };
        if ptr::eq(start, libc::MAP_FAILED) {
            return Err(io::Error::last_os_error());
        }
        Ok(Reservation {
            start: start.cast(),
            length,
        })
    }

    /// Gives back the first `length` bytes.
    fn release_front(&mut self, length: usize) {
        let length = length.min(self.length);
        if length > 0 {
            // SAFETY: the range is part of this reservation, which nobody else knows of and nobody accesses.
            unsafe { libc::munmap(self.start.cast(), length) };
        }
        self.start = self.start.wrapping_add(length);
        self.length -= length;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.release_front(self.length);
    }
}

#[cfg(test)]
mod tests;
