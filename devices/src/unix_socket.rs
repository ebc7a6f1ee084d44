//! Unix stream sockets that never wait.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Connects to the socket at `path`. Gives `WouldBlock` when it has as many waiting as it takes.
pub(crate) fn connect(path: &Path) -> io::Result<UnixStream> {
    // SAFETY: needed as an all-zero address is the one to start from; these bytes are valid for every field.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::sa_family_t::try_from(libc::AF_UNIX).expect("AF_UNIX is 1");
    let bytes = path.as_os_str().as_bytes();
    // One byte stays zero.
    if bytes.len() >= address.sun_path.len() {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    for (place, byte) in address.sun_path.iter_mut().zip(bytes) {
        *place = byte.cast_signed();
    }
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    let len = libc::socklen_t::try_from(size_of_val(&address)).expect("110 fits");
    // SAFETY: needed as std's way to connect waits for the other end. The address lives across the call and has the
    // given length; the descriptor is new, and owned from here on.
    unsafe {
        let fd = libc::socket(libc::AF_UNIX, kind, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = OwnedFd::from_raw_fd(fd);
        if libc::connect(fd, (&raw const address).cast(), len) < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(socket.into())
    }
}

/// Reads what is there, with more `flags` of recv. Gives `WouldBlock` when there is nothing, and 0 at the end.
pub(crate) fn receive(socket: &UnixStream, into: &mut [u8], flags: libc::c_int) -> io::Result<usize> {
    let flags = flags | libc::MSG_DONTWAIT;
    // SAFETY: needed as std cannot look at bytes without taking them. The buffer is borrowed for the call and has the
    // given length.
    let len = unsafe { libc::recv(socket.as_raw_fd(), into.as_mut_ptr().cast(), into.len(), flags) };
    usize::try_from(len).map_err(|_| io::Error::last_os_error())
}

/// Writes as much as the other end takes. Gives `WouldBlock` when that is nothing.
pub(crate) fn send(socket: &UnixStream, bytes: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: needed as std's write raises SIGPIPE when nobody reads. The bytes are borrowed for the call and have the
    // given length.
    let len = unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
    usize::try_from(len).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_when_nobody_listens_or_the_path_is_too_long() {
        let kind = |path: &str| connect(Path::new(path)).unwrap_err().kind();
        assert_eq!(kind("/nonexistent/socket"), io::ErrorKind::NotFound);
        assert_eq!(kind(&"x".repeat(108)), io::ErrorKind::InvalidFilename);
    }

    #[test]
    fn says_when_the_other_end_takes_no_more_or_has_gone() {
        let (near, far) = UnixStream::pair().unwrap();
        let full = std::iter::repeat_with(|| send(&near, &[0; 4096])).find_map(Result::err);
        assert_eq!(full.unwrap().kind(), io::ErrorKind::WouldBlock);
        assert!(receive(&far, &mut [0; 10], 0).is_ok_and(|len| len == 10));
        drop(near);
        let rest = std::iter::repeat_with(|| receive(&far, &mut [0; 65536], 0).unwrap());
        assert_eq!(rest.take_while(|len| *len > 0).sum::<usize>() % 4096, 4086);
        assert_eq!(send(&far, &[1]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
