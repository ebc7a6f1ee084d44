//! The first instructions of the process, in place of those of the standard library.
//!
//! The standard library would install handlers for faults, which [`crate::signals`] replaces at once, read the process's
//! own memory map for them, and give every thread a second stack of two mappings. Left out, the process starts sooner
//! and is smaller by some pages for each thread.

use std::ffi::CStr;

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
