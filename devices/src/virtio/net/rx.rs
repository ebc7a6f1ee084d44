//! From the host to the guest: frames go from the backend straight into the receive buffers.
//!
//! How long a frame is shows only when it has been read, and what does not fit would be lost. Gathering buffers for
//! the longest frame before each read is slow, as most frames are short, and fails on a small queue. So [`Rx`]
//! gathers what recent frames needed, and puts a buffer of its own, `spill`, behind: the rare frame that is longer
//! than expected ends there and is copied on. When the guest has no room for that, the frame is held in `spill`
//! until it has. There it also waits when the rate limiter does not let it pass, and nothing is read meanwhile. Frames of
//! the metadata service come in by `spill` too.

use std::collections::VecDeque;

use super::backend::{self, Backend, HEADER_LEN, MAX_FRAME_LEN};
use super::{Metrics, Progress, TURN, Wire};
use crate::virtio::{Buffers, Chain, QueueError, Ring, Throttle};

/// Offset of `num_buffers` in the header.
const NUM_BUFFERS: usize = 10;
/// The most pieces gathered: what one `readv` takes, less one for `spill`.
const MAX_PIECES: usize = 1023;
/// A frame of an ordinary Ethernet, with its header.
const ORDINARY_FRAME_LEN: usize = HEADER_LEN + 1514;

/// The receiving half of a device.
pub(super) struct Rx {
    /// Whether the driver takes a frame in several buffers.
    pub(super) mergeable: bool,
    /// Limits what is received.
    pub(super) throttle: Throttle,
    /// The last turn ended before all was received.
    pub(super) has_more: bool,
    /// How many bytes to gather before a read.
    expected: usize,
    /// Takes the end of a frame that is longer than expected.
    spill: Box<[u8]>,
    /// Length of the whole frame that waits in `spill`; zero when there is none.
    held: usize,
}

/// The queue, and what was popped from it and is still empty, for the time of one turn.
struct Room<'r, 'q, 'm> {
    ring: &'r mut Ring<'q, 'm>,
    buffers: Buffers<'m>,
    chains: VecDeque<Receiver>,
    scratch: Chain<'m>,
    /// No more pieces fit into one read.
    full: bool,
}

/// One chain of the room.
struct Receiver {
    head: u16,
    len: usize,
}

/// What came of an attempt to move one frame.
enum Step {
    /// A frame was delivered or dropped.
    Moved,
    /// The host has none.
    NoFrame,
    /// The guest has no buffers, or not enough.
    NoRoom,
    /// It is too early for the next frame.
    Held,
}

impl Rx {
    pub(super) fn new(throttle: Throttle) -> Self {
        Self {
            mergeable: false,
            throttle,
            has_more: false,
            expected: ORDINARY_FRAME_LEN,
            spill: vec![0; MAX_FRAME_LEN].into(),
            held: 0,
        }
    }

    /// Forgets the driver and the frame that waits.
    pub(super) fn reset(&mut self) {
        self.drop_held();
        self.has_more = false;
        self.throttle.reset();
    }

    /// Forgets the frame that waits.
    pub(super) fn drop_held(&mut self) {
        self.held = 0;
    }

    /// Throws away what waits in the backend: it was made for a driver that could take more, or came while the link was
    /// down.
    pub(super) fn discard(&mut self, backend: &mut dyn Backend) {
        backend::discard(backend, &mut self.spill);
    }

    /// Receives at most one turn of frames.
    pub(super) fn drain(
        &mut self,
        wire: &mut Wire<'_>,
        ring: &mut Ring<'_, '_>,
        metrics: &mut Metrics,
    ) -> Result<Progress, QueueError> {
        ring.disable_notify();
        let mut room = Room::new(ring);
        let progress = self.receive(wire, &mut room, metrics)?;
        let unused = room.count();
        ring.unpop(unused);
        ring.publish();
        Ok(progress)
    }

    fn receive(
        &mut self,
        wire: &mut Wire<'_>,
        room: &mut Room<'_, '_, '_>,
        metrics: &mut Metrics,
    ) -> Result<Progress, QueueError> {
        for _ in 0..TURN {
            match self.step(wire, room, metrics)? {
                Step::Moved => {}
                Step::NoFrame | Step::Held => return Ok(Progress::Done),
                Step::NoRoom => {
                    metrics.no_rx_avail_buffer += 1;
                    // What is in the room counts as taken, so the driver tells of buffers beyond that.
                    if !room.ring.enable_notify()? {
                        return Ok(Progress::Done);
                    }
                    room.ring.disable_notify();
                }
            }
        }
        Ok(Progress::More)
    }

    /// Moves one frame.
    fn step(
        &mut self,
        wire: &mut Wire<'_>,
        room: &mut Room<'_, '_, '_>,
        metrics: &mut Metrics,
    ) -> Result<Step, QueueError> {
        room.gather(if self.mergeable { self.expected } else { 1 })?;
        if room.count() == 0 {
            return Ok(Step::NoRoom);
        }
        if self.held == 0
            && let Some(detour) = wire.detour
        {
            self.held = detour.give(&mut self.spill, wire.clock);
        }
        if self.held != 0 {
            return self.place(self.held, 0, room, metrics);
        }
        if wire.only_detour {
            return Ok(Step::NoFrame);
        }
        let direct = room.buffers.len();
        match wire.backend.receive(&mut room.buffers, &mut self.spill) {
            Ok(len) if len >= HEADER_LEN => {
                // Follows longer frames at once, and shorter ones slowly.
                self.expected = len.max(self.expected - self.expected / 4);
                self.place(len, direct.min(len), room, metrics)
            }
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(Step::NoFrame),
            result => {
                metrics.tap_read_fails += 1;
                wire.complain("reading a frame", metrics.tap_read_fails, &result);
                // The kernel has dropped a frame that it could not describe; anything else would come again.
                let dropped = matches!(&result, Err(e) if e.raw_os_error() == Some(libc::EINVAL));
                Ok(if dropped { Step::Moved } else { Step::NoFrame })
            }
        }
    }

    /// Gives a frame of `len` bytes to the driver: its first `direct` bytes are in the room, the others in `spill`.
    fn place(
        &mut self,
        len: usize,
        direct: usize,
        room: &mut Room<'_, '_, '_>,
        metrics: &mut Metrics,
    ) -> Result<Step, QueueError> {
        let wanted = len.min(MAX_FRAME_LEN);
        if self.mergeable {
            room.gather(wanted)?;
        }
        self.held = 0;
        let valid = len <= MAX_FRAME_LEN;
        if valid && len <= room.buffers.len() {
            if !self.throttle.take(len) {
                metrics.rx_rate_limiter_throttled += 1;
                self.hold(len, direct, room);
                return Ok(Step::Held);
            }
            room.buffers.write(direct, &self.spill[..len - direct]);
            room.finish(len);
            metrics.rx_bytes_count += len as u64;
            metrics.rx_packets_count += 1;
            metrics.rx_count += 1;
            return Ok(Step::Moved);
        }
        if valid && self.mergeable && !room.full && room.count() < room.ring.size() {
            self.hold(len, direct, room);
            return Ok(Step::NoRoom);
        }
        // No host should send such a frame, or not even all buffers that the driver can offer would do.
        metrics.rx_fails += 1;
        Ok(Step::Moved)
    }

    /// Puts the whole frame into `spill`.
    fn hold(&mut self, len: usize, direct: usize, room: &Room<'_, '_, '_>) {
        self.spill.copy_within(..len - direct, direct);
        room.buffers.read(0, &mut self.spill[..direct]);
        self.held = len;
    }
}

impl<'r, 'q, 'm> Room<'r, 'q, 'm> {
    fn new(ring: &'r mut Ring<'q, 'm>) -> Self {
        Self {
            ring,
            buffers: Buffers::new(),
            chains: VecDeque::new(),
            scratch: Chain::new(),
            full: false,
        }
    }

    /// Popped chains that no frame has used.
    fn count(&self) -> u16 {
        u16::try_from(self.chains.len()).expect("no more chains than MAX_PIECES")
    }

    /// Pops chains until there are `wanted` bytes, or no more chains.
    fn gather(&mut self, wanted: usize) -> Result<(), QueueError> {
        self.full = false;
        while self.buffers.len() < wanted && self.ring.pop(&mut self.scratch)? {
            let chain = &mut self.scratch;
            let malformed = |what| QueueError::Chain {
                head: chain.head(),
                what,
            };
            if chain.writable.len() < HEADER_LEN {
                return Err(malformed("a receive buffer smaller than the header"));
            }
            let pieces = chain.writable.iovecs().len();
            if pieces > MAX_PIECES {
                return Err(malformed("a receive buffer in more than 1023 pieces"));
            }
            if self.buffers.iovecs().len() + pieces > MAX_PIECES {
                self.ring.unpop(1);
                self.full = true;
                break;
            }
            self.chains.push_back(Receiver {
                head: chain.head(),
                len: chain.writable.len(),
            });
            self.buffers.append(&mut chain.writable);
        }
        Ok(())
    }

    /// Completes the chains that hold the first `len` bytes, and says in the header how many they are.
    fn finish(&mut self, len: usize) {
        let mut end = 0;
        let used = self.chains.iter().take_while(|chain| {
            let start = end;
            end += chain.len;
            start < len
        });
        let count = u16::try_from(used.count()).expect("no more chains than MAX_PIECES");
        self.buffers.write(NUM_BUFFERS, &count.to_le_bytes());
        let (mut left, mut total) = (len, 0);
        for chain in self.chains.drain(..usize::from(count)) {
            let written = chain.len.min(left);
            self.ring.push(
                chain.head,
                u32::try_from(written).expect("a frame is shorter than 4 GiB"),
            );
            left -= written;
            total += chain.len;
        }
        self.buffers.advance(total);
    }
}
