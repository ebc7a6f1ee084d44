//! The host programs' sockets: the line that names a port, and what waits to be written.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use vm_memory::VolatileSlice;

use super::connection::BUF_ALLOC;
use crate::unix_socket;
use crate::virtio::Buffers;

/// The longest line that asks for a port, its end included.
const MAX_LINE: usize = 32;
/// Bytes of a [`Pending`]'s ring.
const RING: usize = BUF_ALLOC as usize;

/// What a host program says first.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Greeting {
    /// Not enough yet.
    Incomplete,
    /// It wants this port of the guest.
    Port(u32),
    /// It has left, or talks nonsense.
    Unusable,
}

/// Reads `CONNECT <port>\n`, when it is there, and not a byte more: what follows is the guest's.
pub(super) fn greeting(socket: &UnixStream) -> Greeting {
    let mut line = [0; MAX_LINE];
    let len = match unix_socket::receive(socket, &mut line, libc::MSG_PEEK) {
        Ok(0) => return Greeting::Unusable,
        Ok(len) => len,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Greeting::Incomplete,
        Err(_) => return Greeting::Unusable,
    };
    let Some(end) = line[..len].iter().position(|byte| *byte == b'\n') else {
        return if len < MAX_LINE {
            Greeting::Incomplete
        } else {
            Greeting::Unusable
        };
    };
    match parse_line(&line[..end]) {
        Some(port) if unix_socket::receive(socket, &mut line[..=end], 0).is_ok_and(|len| len == end + 1) => {
            Greeting::Port(port)
        }
        _ => Greeting::Unusable,
    }
}

/// The port of a line without its end.
fn parse_line(line: &[u8]) -> Option<u32> {
    let mut words = str::from_utf8(line).ok()?.split_ascii_whitespace();
    let is_connect = words.next()?.eq_ignore_ascii_case("connect");
    let port = words.next()?;
    let plain = port.bytes().all(|byte| byte.is_ascii_digit()) && words.next().is_none();
    (is_connect && plain).then(|| port.parse().ok())?
}

/// Whether the host has no memory for an operation at the moment. No event tells when it has.
pub(super) fn is_shortage(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOBUFS | libc::ENOMEM | libc::EINTR)
    )
}

/// Bytes of the guest that a socket has not taken: a ring of [`BUF_ALLOC`] bytes, which exists only while there are
/// some.
#[derive(Debug, Default)]
pub(super) struct Pending {
    ring: Box<[u8]>,
    start: usize,
    len: usize,
}

/// A ring that was used before: programs that read slowly need one again and again.
pub(super) type Spare = Option<Box<[u8]>>;

impl Pending {
    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Appends the bytes from `offset` on. The guest's credit keeps them within the ring.
    pub(super) fn push(&mut self, data: &Buffers<'_>, offset: usize, spare: &mut Spare) {
        if self.ring.is_empty() {
            self.ring = spare.take().unwrap_or_else(|| vec![0; RING].into());
        }
        let count = data.len() - offset;
        assert!(count <= RING - self.len, "credit was checked before");
        let end = (self.start + self.len) % RING;
        let first = count.min(RING - end);
        data.read(offset, &mut self.ring[end..end + first]);
        data.read(offset + first, &mut self.ring[..count - first]);
        self.len += count;
    }

    /// Writes what the socket takes; returns how much that was.
    pub(super) fn flush(&mut self, socket: &UnixStream, spare: &mut Spare) -> io::Result<usize> {
        let mut pieces = Buffers::new();
        let end = (self.start + self.len).min(RING);
        let wrapped = self.len - (end - self.start);
        let (head, tail) = self.ring.split_at_mut(self.start);
        pieces.push(&VolatileSlice::from(&mut tail[..end - self.start]));
        pieces.push(&VolatileSlice::from(&mut head[..wrapped]));
        let taken = pieces.send(socket.as_fd())?;
        self.start = (self.start + taken) % RING;
        self.len -= taken;
        if self.is_empty() {
            self.clear(spare);
        }
        Ok(taken)
    }

    /// Forgets all bytes.
    pub(super) fn clear(&mut self, spare: &mut Spare) {
        let ring = std::mem::take(self).ring;
        if !ring.is_empty() {
            *spare = Some(ring);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn greet(pieces: &[&str]) -> Vec<Greeting> {
        let (mut program, socket) = UnixStream::pair().unwrap();
        let mut say = |piece: &&str| {
            program.write_all(piece.as_bytes()).unwrap();
            greeting(&socket)
        };
        pieces.iter().map(&mut say).collect()
    }

    #[test]
    fn understands_a_line_in_one_or_many_pieces() {
        assert_eq!(greet(&["CONNECT 52\n"]), [Greeting::Port(52)]);
        assert_eq!(greet(&["connect 4294967295\r\n"]), [Greeting::Port(u32::MAX)]);
        assert_eq!(
            greet(&["CONN", "ECT 5", "2\n"]),
            [Greeting::Incomplete, Greeting::Incomplete, Greeting::Port(52)]
        );
    }

    #[test]
    fn leaves_what_follows_the_line() {
        let (mut program, mut socket) = UnixStream::pair().unwrap();
        program.write_all(b"CONNECT 7\nCONNECT 8\n").unwrap();
        assert_eq!(greeting(&socket), Greeting::Port(7));
        let mut rest = [0; 10];
        socket.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"CONNECT 8\n");
    }

    #[test]
    fn refuses_any_other_line() {
        let lines = [
            "\n",
            "CONNECT\n",
            "CONNECT \n",
            "CONNECT x\n",
            "CONNECT -1\n",
            "CONNECT +1\n",
            "CONNECT 4294967296\n",
            "CONNECT 1 2\n",
            "GET / HTTP/1.1\n",
            "CONNECT é\n",
            "0123456789012345678901234567890123456789",
        ];
        for line in lines {
            assert_eq!(greet(&[line]), [Greeting::Unusable], "{line:?}");
        }
    }

    #[test]
    fn notices_a_program_that_leaves_early() {
        let (program, socket) = UnixStream::pair().unwrap();
        assert_eq!(greeting(&socket), Greeting::Incomplete);
        drop(program);
        assert_eq!(greeting(&socket), Greeting::Unusable);
    }

    #[test]
    fn tells_a_shortage_from_a_full_socket_and_a_broken_one() {
        let is = |code| is_shortage(&io::Error::from_raw_os_error(code));
        assert_eq!([libc::ENOBUFS, libc::ENOMEM, libc::EINTR].map(is), [true; 3]);
        assert_eq!([libc::EAGAIN, libc::EPIPE, libc::ECONNRESET].map(is), [false; 3]);
    }

    /// Pushes `count` bytes whose values go on from `next`.
    fn push(pending: &mut Pending, spare: &mut Spare, next: &mut u8, count: usize) {
        let mut bytes: Vec<u8> = Vec::new();
        bytes.resize_with(count, || {
            *next = next.wrapping_add(1);
            *next
        });
        let mut data = Buffers::new();
        data.push(&VolatileSlice::from(&mut bytes[..]));
        pending.push(&data, 0, spare);
    }

    #[test]
    fn keeps_the_order_of_bytes_around_the_end_of_the_ring() {
        let (mut program, socket) = UnixStream::pair().unwrap();
        let (mut pending, mut spare, mut next) = (Pending::default(), None, 0);
        let mut expected = 0u8;
        for _ in 0..20 {
            push(&mut pending, &mut spare, &mut next, 60_001);
            while !pending.is_empty() {
                let taken = pending.flush(&socket, &mut spare).unwrap();
                let mut out = vec![0; taken];
                program.read_exact(&mut out).unwrap();
                for byte in out {
                    expected = expected.wrapping_add(1);
                    assert_eq!(byte, expected);
                }
            }
        }
    }

    #[test]
    fn uses_a_ring_again_that_became_empty() {
        let (_program, socket) = UnixStream::pair().unwrap();
        let (mut pending, mut spare) = (Pending::default(), None);
        push(&mut pending, &mut spare, &mut 0, 10);
        assert_eq!(pending.flush(&socket, &mut spare).unwrap(), 10);
        let ring = spare.as_ref().unwrap().as_ptr();
        push(&mut pending, &mut spare, &mut 0, 10);
        assert!(spare.is_none());
        assert_eq!(pending.ring.as_ptr(), ring);
    }
}
