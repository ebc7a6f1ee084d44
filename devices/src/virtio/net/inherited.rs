//! An open tap that this process inherited: an orchestrator opened it, and passed it on when it started Mayfly.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

use super::tap::{check, flags_of};

/// A descriptor of our own for the inherited `fd`, non-blocking, when that is a tap as Mayfly uses them; else what is
/// wrong.
pub(super) fn duplicate(fd: RawFd) -> Result<File, &'static str> {
    // SAFETY: needed as no safe wrapper exists for a descriptor that may not be open. This asks for its flags only.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    if flags < 0 {
        return Err("is not open: have the program that starts Mayfly pass an open tap under this number");
    }
    // What Mayfly opens itself is never inherited, as it closes on exec: no number of that may be named.
    if flags & libc::FD_CLOEXEC != 0 {
        return Err("was not inherited: it is one of Mayfly's own descriptors");
    }
    // SAFETY: needed as above. The call makes a new descriptor of one that is open, as was just seen.
    let own = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
    if own < 0 {
        return Err("cannot be duplicated: this process has no descriptor left");
    }
    // SAFETY: needed to own the descriptor; it is new, and nobody else has it.
    let own = unsafe { File::from_raw_fd(own) };
    let flags = flags_of(&own).map_err(|error| match error.raw_os_error() {
        Some(libc::EBADFD) => "is not bound to a tap: bind it with TUNSETIFF first",
        _ => "is no tap",
    })?;
    check_flags(flags)?;
    set_nonblocking(&own).map_err(|_| "cannot be made non-blocking")?;
    Ok(own)
}

/// Whether Mayfly can use a tap with these flags of TUNGETIFF; else what is wrong.
///
/// The bit of IFF_NO_PI also means IFF_NOFILTER there, so its absence shows only on a tap that has a packet filter.
pub(super) fn check_flags(flags: libc::c_int) -> Result<(), &'static str> {
    if flags & libc::IFF_TAP == 0 {
        return Err("is a tun, without Ethernet headers: open it with IFF_TAP");
    }
    if flags & libc::IFF_NO_PI == 0 {
        return Err("puts protocol information before frames: open the tap with IFF_NO_PI");
    }
    if flags & libc::IFF_VNET_HDR == 0 {
        return Err("has no virtio header before frames: open the tap with IFF_VNET_HDR");
    }
    Ok(())
}

fn set_nonblocking(file: &File) -> io::Result<()> {
    // SAFETY: needed as std does this for sockets only. The calls read and write the flags of an open file.
    unsafe {
        let flags = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
        check(flags)?;
        check(libc::fcntl(
            file.as_raw_fd(),
            libc::F_SETFL,
            flags | libc::O_NONBLOCK,
        ))
    }
}
