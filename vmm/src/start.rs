//! The first instructions of the process, in place of those of the standard library, and what is left of them at the end
//! of the start.
//!
//! The standard library would install handlers for faults, which [`crate::signals`] replaces at once, read the process's
//! own memory map for them, and give every thread a second stack of two mappings. Left out, the process starts sooner
//! and is smaller by some pages for each thread.

use std::ffi::{CStr, c_int, c_void};

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
    // SAFETY: needed to learn where the program lies. `let_go_of_program` is what the C library expects, and uses no
    // data of ours.
    unsafe { libc::dl_iterate_phdr(Some(let_go_of_program), std::ptr::null_mut()) };
}

/// Called for each object that is loaded; ends after the first, which is the program.
///
/// # Safety
///
/// `object` is valid, as the C library gives it to callbacks of `dl_iterate_phdr`.
unsafe extern "C" fn let_go_of_program(
    object: *mut libc::dl_phdr_info,
    _size: usize,
    _data: *mut c_void,
) -> c_int {
    // SAFETY: the caller guarantees that `object` is valid; its headers are part of the loaded program.
    let (base, headers) = unsafe {
        let object = &*object;
        let headers = std::slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into());
        (object.dlpi_addr, headers)
    };
    let read_only =
        |header: &&libc::Elf64_Phdr| header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0;
    for header in headers.iter().filter(read_only) {
        let start = (base + header.p_vaddr).next_multiple_of(PAGE_SIZE);
        let end = (base + header.p_vaddr + header.p_memsz) / PAGE_SIZE * PAGE_SIZE;
        let length = usize::try_from(end.saturating_sub(start)).expect("addresses have 64 bits");
        // SAFETY: needed because std has no madvise. The pages are mapped from the program's file and never written, so
        // each of them reads the same when it is touched again.
        unsafe { libc::madvise(start as *mut c_void, length, libc::MADV_DONTNEED) };
    }
    1
}
