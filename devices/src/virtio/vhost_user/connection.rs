//! [`Connection`]: requests to a backend and its answers, none of which is waited for beyond a deadline.
//!
//! A message is a header of three numbers (request, flags, size of the body), the body, and file descriptors beside. Our
//! own code and not the `vhost` crate, which waits without end for a backend that says nothing.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::unix_socket;

/// How long a backend has for all that is asked of it at once.
pub(super) const PATIENCE: Duration = Duration::from_secs(3);
/// Bytes in a header.
pub(super) const HEADER: usize = 12;
/// The longest body of an answer that is taken.
const MAX_BODY: usize = 4096;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
pub(super) const NEED_REPLY: u32 = 1 << 3;

/// What is asked of a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Request {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    SetMemTable = 5,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
    SetBackendReqFd = 21,
    GetConfig = 24,
    GetInflightFd = 31,
    SetInflightFd = 32,
}

/// A backend at the other end of a socket. After an error it must not be used again.
pub(super) struct Connection {
    socket: UnixStream,
    /// The backend says of each request whether it was carried out.
    acknowledges: bool,
    deadline: Instant,
}

impl Connection {
    /// Connects to the socket at `path`.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let socket = unix_socket::connect(path)?;
        socket.set_nonblocking(false)?;
        Ok(Self {
            socket,
            acknowledges: false,
            deadline: Instant::now() + PATIENCE,
        })
    }

    /// Begins what the backend has [`PATIENCE`] for.
    pub(super) fn begin(&mut self) {
        self.deadline = Instant::now() + PATIENCE;
    }

    /// From now on the backend says of each request whether it was carried out.
    pub(super) fn expect_acknowledgements(&mut self) {
        self.acknowledges = true;
    }

    /// Sends a request that has no answer of its own.
    pub(super) fn set(&mut self, request: Request, body: &[u8], fds: &[RawFd]) -> io::Result<()> {
        if !self.acknowledges {
            return self.send(request, VERSION, body, fds);
        }
        self.send(request, VERSION | NEED_REPLY, body, fds)?;
        let (answer, _) = self.receive(request)?;
        match number(&answer)? {
            0 => Ok(()),
            code => Err(io::Error::other(format!(
                "it refused {request:?} with code {code}"
            ))),
        }
    }

    /// Sends a request, and gives the body of its answer.
    pub(super) fn get(&mut self, request: Request, body: &[u8]) -> io::Result<Vec<u8>> {
        self.get_with_file(request, body).map(|(answer, _)| answer)
    }

    /// The same for an answer that has a file beside.
    pub(super) fn get_with_file(
        &mut self,
        request: Request,
        body: &[u8],
    ) -> io::Result<(Vec<u8>, Option<File>)> {
        self.send(request, VERSION, body, &[])?;
        self.receive(request)
    }

    /// The same for an answer that is a number.
    pub(super) fn get_number(&mut self, request: Request) -> io::Result<u64> {
        number(&self.get(request, &[])?)
    }

    /// Whether the backend has closed its end, or says what nobody has asked for.
    pub(super) fn is_broken(&self) -> bool {
        let peeked = unix_socket::receive(&self.socket, &mut [0], libc::MSG_PEEK);
        !peeked.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }

    fn send(&mut self, request: Request, flags: u32, body: &[u8], fds: &[RawFd]) -> io::Result<()> {
        let size = u32::try_from(body.len()).map_err(io::Error::other)?;
        let mut message = Vec::with_capacity(HEADER + body.len());
        for field in [request as u32, flags, size] {
            message.extend_from_slice(&field.to_ne_bytes());
        }
        message.extend_from_slice(body);
        let sent = uninterrupted(|| {
            self.socket.set_write_timeout(Some(self.left()?))?;
            let sent = self.socket.send_with_fds(&[&message[..]], fds);
            sent.map_err(|error| io::Error::from_raw_os_error(error.errno()))
        })?;
        // The kernel takes a short message whole or not at all.
        if sent == message.len() {
            Ok(())
        } else {
            Err(io::ErrorKind::WriteZero.into())
        }
    }

    fn receive(&mut self, request: Request) -> io::Result<(Vec<u8>, Option<File>)> {
        let mut header = [0; HEADER];
        let (len, file) = uninterrupted(|| {
            self.socket.set_read_timeout(Some(self.left()?))?;
            let received = self.socket.recv_with_fd(&mut header);
            received.map_err(|error| io::Error::from_raw_os_error(error.errno()))
        })?;
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.fill(&mut header[len..])?;
        let (answered, flags, size) = parse_header(&header);
        let wanted = flags & VERSION_MASK == VERSION && flags & REPLY != 0;
        if answered != request as u32 || !wanted || size > MAX_BODY {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "request {answered} with flags {flags:#x} and {size} bytes is no answer to {request:?}"
                ),
            ));
        }
        let mut body = vec![0; size];
        self.fill(&mut body)?;
        Ok((body, file))
    }

    fn fill(&self, mut rest: &mut [u8]) -> io::Result<()> {
        while !rest.is_empty() {
            let len = uninterrupted(|| {
                self.socket.set_read_timeout(Some(self.left()?))?;
                (&self.socket).read(rest)
            })?;
            if len == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            rest = &mut rest[len..];
        }
        Ok(())
    }

    /// What is left until the deadline.
    fn left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(left)
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// Calls again what was interrupted: by a signal, or by an io_uring of this thread that has something done.
fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

/// Request, flags and size of the body.
pub(super) fn parse_header(header: &[u8; HEADER]) -> (u32, u32, usize) {
    let [r0, r1, r2, r3, f0, f1, f2, f3, s0, s1, s2, s3] = *header;
    let size = u32::from_ne_bytes([s0, s1, s2, s3]);
    (
        u32::from_ne_bytes([r0, r1, r2, r3]),
        u32::from_ne_bytes([f0, f1, f2, f3]),
        usize::try_from(size).expect("a u32 fits"),
    )
}

/// An answer to `request` that is a number.
pub(super) fn reply(request: u32, value: u64) -> [u8; HEADER + 8] {
    let mut message = [0; HEADER + 8];
    message[..4].copy_from_slice(&request.to_ne_bytes());
    message[4..8].copy_from_slice(&(VERSION | REPLY).to_ne_bytes());
    message[8..12].copy_from_slice(&8u32.to_ne_bytes());
    message[HEADER..].copy_from_slice(&value.to_ne_bytes());
    message
}

fn number(body: &[u8]) -> io::Result<u64> {
    let bytes = <[u8; 8]>::try_from(body);
    let bytes = bytes.map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "an answer is no number"))?;
    Ok(u64::from_ne_bytes(bytes))
}
