//! [`Passt`]: a program of the host that is the guest's network, reached through a unix socket: passt, which turns frames
//! into the sockets of an ordinary user, or another that speaks QEMU's stream protocol.
//!
//! Each frame follows its length, 32 bits in network order. Where one ends is known only then, so several are read at
//! once into a buffer and copied on, and those to be sent are gathered and written at once: a copy costs less than a
//! system call for each. There is no virtio header on this wire, so there are no offloads. What the peer says is checked: a
//! length that no frame has ends the connection.
//!
//! When the peer goes, the guest loses its carrier; it is called again every [`RETRY`] until it is back.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::backend::{Backend, HEADER_LEN, MAX_FRAME_LEN};
use super::{ConfigError, OpenError};
use crate::timer::Timer;
use crate::unix_socket;
use crate::virtio::Buffers;

/// How long to wait before the peer is called again.
const RETRY: Duration = Duration::from_secs(1);

/// Bytes of a frame's length.
const LENGTH_LEN: usize = 4;
/// Where the first length is in the buffer, so that the virtio header fits before each frame.
const BASE: usize = HEADER_LEN - LENGTH_LEN;
/// An Ethernet header.
const SHORTEST: usize = 14;
const LONGEST: usize = MAX_FRAME_LEN - HEADER_LEN;
/// Bytes that are gathered before they are written.
const BATCH: usize = 64 << 10;
/// Bytes that are read at once; the longest frame fits.
const INPUT: usize = BASE + 2 * (LENGTH_LEN + LONGEST);

/// The events of the descriptor that the loop watches.
const SOCKET: u64 = 0;
const TIMER: u64 = 1;

/// A connection to the peer, and its renewal.
pub struct Passt {
    path: PathBuf,
    events: Epoll,
    timer: Timer,
    stream: Option<UnixStream>,
    input: Input,
    output: Output,
}

/// What was read and is not yet taken.
struct Input {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

/// What is to be written, from `sent` on.
#[derive(Default)]
struct Output {
    bytes: Vec<u8>,
    sent: usize,
}

impl Passt {
    /// Calls the peer that listens at `path`.
    pub fn connect(path: &Path) -> Result<Self, OpenError> {
        let host = |op| {
            move |source| OpenError::Passt {
                op,
                path: path.into(),
                source,
            }
        };
        let mut this = Self {
            path: path.into(),
            events: Epoll::new().map_err(host("make the events of"))?,
            timer: Timer::new().map_err(host("make the timer of"))?,
            stream: None,
            input: Input::new(),
            output: Output::default(),
        };
        let watched = this.watch(this.timer.as_raw_fd(), EventSet::IN, TIMER);
        watched.map_err(host("watch the timer of"))?;
        this.call().map_err(host("connect to"))?;
        Ok(this)
    }

    fn call(&mut self) -> io::Result<()> {
        let stream = unix_socket::connect(&self.path)?;
        self.watch(stream.as_raw_fd(), EventSet::IN | EventSet::OUT, SOCKET)?;
        self.stream = Some(stream);
        Ok(())
    }

    fn watch(&self, fd: i32, events: EventSet, token: u64) -> io::Result<()> {
        let event = EpollEvent::new(events | EventSet::EDGE_TRIGGERED, token);
        self.events.ctl(ControlOperation::Add, fd, event)
    }

    /// Ends the connection, with all that is on its way, and sets the time of the next call.
    fn lose(&mut self) {
        self.stream = None;
        self.input.clear();
        self.output.clear();
        self.wait();
    }

    fn wait(&mut self) {
        if let Err(error) = self.timer.set(RETRY) {
            let path = self.path.display();
            log::error!("the connection to '{path}' is lost for good, its timer cannot be set: {error}");
        }
    }

    fn retry(&mut self) {
        if self.stream.is_some() {
            return;
        }
        match self.call() {
            Ok(()) => log::info!("connected to '{}' again", self.path.display()),
            Err(error) => {
                log::debug!("cannot connect to '{}' yet: {error}", self.path.display());
                self.wait();
            }
        }
    }

    /// Writes as much as the peer takes now.
    fn write(&mut self) -> io::Result<()> {
        let stream = self.stream.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        while !self.output.is_empty() {
            match unix_socket::send(stream, self.output.unsent()) {
                Ok(count) => self.output.advance(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The next frame with room for its header before it; reads on when there is none.
    fn next(&mut self) -> io::Result<&mut [u8]> {
        let stream = self.stream.as_ref().ok_or(io::ErrorKind::WouldBlock)?;
        while !self.input.has_frame()? {
            self.input.fill(stream)?;
        }
        Ok(self.input.take())
    }
}

impl AsFd for Passt {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: needed as `Epoll` has no `AsFd`. Its descriptor is open as long as it lives, and so is the borrow.
        unsafe { BorrowedFd::borrow_raw(self.events.as_raw_fd()) }
    }
}

impl Backend for Passt {
    fn offloads(&self) -> u64 {
        0
    }

    fn set_offloads(&mut self, _features: u64) -> io::Result<()> {
        Ok(())
    }

    fn open_other(&self, _name: &str, _queues: u16) -> Result<Vec<Self>, OpenError> {
        Err(ConfigError::NoTap.into())
    }

    fn receive(&mut self, room: &mut Buffers<'_>, rest: &mut [u8]) -> io::Result<usize> {
        match self.next() {
            Ok(frame) => {
                frame[..HEADER_LEN].fill(0);
                let direct = room.write(0, frame);
                let beyond = &frame[direct..];
                rest[..beyond.len()].copy_from_slice(beyond);
                Ok(frame.len())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(error),
            Err(error) => {
                self.lose();
                Err(error)
            }
        }
    }

    fn send(&mut self, frame: &Buffers<'_>) -> io::Result<usize> {
        if self.stream.is_none() {
            return Err(io::ErrorKind::NotConnected.into());
        }
        self.output.push(frame);
        if self.output.is_full() {
            self.flush()?;
        }
        Ok(frame.len())
    }

    fn has_room(&self) -> bool {
        !self.output.is_full()
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.output.is_empty() {
            return Ok(());
        }
        self.write().inspect_err(|_| self.lose())
    }

    fn is_connected(&self) -> bool {
        self.stream.is_some()
    }

    fn on_ready(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 2];
        let count = self.events.wait(0, &mut events)?;
        for event in &events[..count] {
            match event.data() {
                TIMER => self.retry(),
                // What there is to read is read by `receive`.
                _ => self.flush()?,
            }
        }
        Ok(())
    }
}

impl Input {
    fn new() -> Self {
        Self {
            bytes: vec![0; INPUT].into(),
            start: BASE,
            end: BASE,
        }
    }

    fn clear(&mut self) {
        (self.start, self.end) = (BASE, BASE);
    }

    /// The length of the next frame, when that much is there. One that no frame has is an error.
    fn length(&self) -> io::Result<Option<usize>> {
        let Some(length) = self.bytes[self.start..self.end].first_chunk::<LENGTH_LEN>() else {
            return Ok(None);
        };
        let length = usize::try_from(u32::from_be_bytes(*length)).expect("a usize has 64 bits");
        if !(SHORTEST..=LONGEST).contains(&length) {
            let what = format!("the peer announces a frame of {length} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        Ok(Some(length))
    }

    /// Whether a whole frame is there.
    fn has_frame(&self) -> io::Result<bool> {
        let there = self.end - self.start;
        Ok(self.length()?.is_some_and(|length| LENGTH_LEN + length <= there))
    }

    /// Takes the frame that is there, with room for a header before it: its length, and what was taken before.
    fn take(&mut self) -> &mut [u8] {
        let length = self.length().ok().flatten().expect("a whole frame was seen");
        let first = self.start - BASE;
        self.start += LENGTH_LEN + length;
        &mut self.bytes[first..self.start]
    }

    /// Reads what there is; at least one byte.
    fn fill(&mut self, stream: &UnixStream) -> io::Result<()> {
        // Less than a frame is left, so there is room for the rest of it.
        self.bytes.copy_within(self.start..self.end, BASE);
        self.end = BASE + self.end - self.start;
        self.start = BASE;
        match unix_socket::receive(stream, &mut self.bytes[self.end..], 0)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            count => {
                self.end += count;
                Ok(())
            }
        }
    }
}

impl Output {
    fn clear(&mut self) {
        self.bytes.clear();
        self.sent = 0;
    }

    fn is_empty(&self) -> bool {
        self.unsent().is_empty()
    }

    fn is_full(&self) -> bool {
        self.unsent().len() >= BATCH
    }

    fn unsent(&self) -> &[u8] {
        &self.bytes[self.sent..]
    }

    fn advance(&mut self, count: usize) {
        self.sent += count;
        if self.sent >= BATCH || self.is_empty() {
            self.bytes.drain(..self.sent);
            self.sent = 0;
        }
    }

    /// Appends a frame without its virtio header; one is checked to be no longer than any.
    fn push(&mut self, frame: &Buffers<'_>) {
        let length = frame.len() - HEADER_LEN;
        let prefix = u32::try_from(length).expect("a frame is shorter than 4 GiB");
        self.bytes.extend_from_slice(&prefix.to_be_bytes());
        let start = self.bytes.len();
        self.bytes.resize(start + length, 0);
        frame.read(HEADER_LEN, &mut self.bytes[start..]);
    }
}

#[cfg(test)]
mod tests;
