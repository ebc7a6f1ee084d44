//! The user's terminal while the guest's console is connected to it: raw, and restored on every way out.

use std::io::{self, IsTerminal};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;

/// The settings that the terminal had before.
static ORIGINAL: OnceLock<libc::termios> = OnceLock::new();

/// True when standard input is a terminal that this process may read. A background job must not touch it, or the
/// shell's terminal driver stops the job.
pub fn is_ours() -> bool {
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        return false;
    }
    // SAFETY: needed because the standard library knows no process groups; both calls take and give plain numbers.
    unsafe { libc::tcgetpgrp(stdin.as_raw_fd()) == libc::getpgrp() }
}

/// Makes the terminal raw, so that every key reaches the guest.
pub fn set_raw() -> io::Result<()> {
    let fd = io::stdin().as_raw_fd();
    let mut settings = MaybeUninit::<libc::termios>::uninit();
    // SAFETY: needed because the standard library cannot set terminal modes. The pointer is to room for one value.
    if unsafe { libc::tcgetattr(fd, settings.as_mut_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above succeeded and has written the whole value.
    let original = unsafe { settings.assume_init() };
    let mut raw = *ORIGINAL.get_or_init(|| original);
    // SAFETY: the pointer is to a valid value; the call only changes it.
    unsafe { libc::cfmakeraw(&mut raw) };
    // The output of the log keeps its line ends.
    raw.c_oflag |= libc::OPOST | libc::ONLCR;
    // SAFETY: the pointer is to a valid value.
    if unsafe { libc::tcsetattr(fd, libc::TCSANOW, &raw) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Gives the terminal its settings back. Safe to call at any time, also in a signal handler.
pub fn restore() {
    if let Some(original) = ORIGINAL.get() {
        // SAFETY: needed because the standard library cannot set terminal modes; the pointer is to a valid value, and
        // the call is async-signal-safe.
        unsafe { libc::tcsetattr(0, libc::TCSANOW, original) };
    }
}
