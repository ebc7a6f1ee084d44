//! The first instructions of the process, in place of those of the standard library, and what is left of them at the end
//! of the start.
//!
//! The standard library would install handlers for faults, which [`crate::signals`] replaces at once, read the process's
//! own memory map for them, and give every thread a second stack of two mappings. Left out, the process starts sooner
//! and is smaller by some pages for each thread.

use std::ffi::{CStr, c_void};
use std::ops::Range;

use crate::x86_64::layout::PAGE_SIZE;

/// Prepares the process. Called once, before anything is opened and before the first thread starts.
pub fn prepare() {
    share_one_heap();
    hold_standard_descriptors();
}

/// Lets all threads allocate from one heap. The C library would make one per thread, each with its own reserve of
/// addresses and its own dirty pages; here no data path allocates, so threads do not wait for each other.
fn share_one_heap() {
    // SAFETY: needed because std has no way to say it. The call sets a number in the allocator, under its own lock.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Opens `/dev/null` for each standard descriptor that the process was started without. Else the next file opened
/// would get its number, and what is printed would end up there.
fn hold_standard_descriptors() {
    const NULL: &CStr = c"/dev/null";
    let mut standard = [0, 1, 2].map(|fd| libc::pollfd {
        fd,
        events: 0,
        revents: 0,
    });
    // SAFETY: needed as std has no poll. The three entries are valid, and a time-out of zero never waits.
    unsafe { libc::poll(standard.as_mut_ptr(), 3, 0) };
    for _ in standard
        .iter()
        .filter(|entry| entry.revents & libc::POLLNVAL != 0)
    {
        // SAFETY: needed because the descriptor must stay open and belong to nobody. The path ends with zero. The
        // lowest free number is taken, which is one of the three.
        unsafe { libc::open(NULL.as_ptr(), libc::O_RDWR) };
    }
}

/// Gives back the memory that only the start has used: free pages of the heap, and the pages of the program, most of
/// which holds code that runs once. What is still needed is found again in the page cache when it is touched. (So are
/// the instructions that a debugger's breakpoints had replaced.)
pub fn let_go() {
    // SAFETY: needed because std has no way to say it. The allocator takes its own lock.
    unsafe { libc::malloc_trim(0) };
    for part in read_only_parts() {
        // SAFETY: needed because std has no madvise. The pages are mapped from the program's file and never written, so
        // each of them reads the same when it is touched again.
        unsafe { libc::madvise(part.start as *mut c_void, part.len(), libc::MADV_DONTNEED) };
    }
}

/// Where the whole pages of the program lie that are mapped from its file and never written. Collected, as the table
/// that tells it lies in one of them.
fn read_only_parts() -> Vec<Range<usize>> {
    // SAFETY: needed because std does not tell where the program lies. The kernel gives every process the address of its
    // program headers and their number, and they stay where they are.
    let (table, headers) = unsafe {
        let table = libc::getauxval(libc::AT_PHDR);
        let count = libc::getauxval(libc::AT_PHNUM);
        let headers = table as *const libc::Elf64_Phdr;
        let count = usize::try_from(count).expect("numbers have 64 bits");
        (table, std::slice::from_raw_parts(headers, count))
    };
    let Some(itself) = headers.iter().find(|header| header.p_type == libc::PT_PHDR) else {
        return Vec::new();
    };
    let place = |header: &libc::Elf64_Phdr| {
        let first = table - itself.p_vaddr + header.p_vaddr;
        let start = first.next_multiple_of(PAGE_SIZE);
        let end = (first + header.p_memsz) / PAGE_SIZE * PAGE_SIZE;
        let address = |number| usize::try_from(number).expect("addresses have 64 bits");
        address(start)..address(end.max(start))
    };
    let read_only =
        |header: &&libc::Elf64_Phdr| header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0;
    headers.iter().filter(read_only).map(place).collect()
}
