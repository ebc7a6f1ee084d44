//! [`Backend`]: what a network device needs of the host's side: a tap, a peer at a socket, or what tests put in their place.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use super::OpenError;
use crate::virtio::Buffers;

/// Bytes of the header before each frame, on the tap as in the queues (virtio 1.2 §5.1.6, `struct virtio_net_hdr`).
pub const HEADER_LEN: usize = 12;
/// The longest frame with its header: an IP packet of 64 KiB behind an Ethernet header with a VLAN tag.
pub const MAX_FRAME_LEN: usize = HEADER_LEN + 14 + 4 + 65536;
/// The most frames that a tap can hold, generously.
const MAX_STALE: usize = 4096;

/// The host's end of a network interface.
///
/// Frames pass behind a header of [`HEADER_LEN`] bytes in virtio's own format. Unless a backend does it in its own way,
/// its non-blocking descriptor gives and takes one frame per `readv` and `writev`, so that they pass unparsed.
pub trait Backend: AsFd + Send {
    /// The offload features (CSUM, GUEST_\*, HOST_\*) that it can serve. A new backend uses all of them.
    fn offloads(&self) -> u64;

    /// Gives frames that a driver with these features can take. Frames that wait already are as they are.
    fn set_offloads(&mut self, features: u64) -> io::Result<()>;

    /// The end of another interface of the host, called `name`, with all offloads in use: one for each of `queues`; none
    /// when this is it already.
    fn open_other(&self, name: &str, queues: u16) -> Result<Vec<Self>, OpenError>
    where
        Self: Sized;

    /// Of an interface with several queues, which share what comes: lets this one take part, or not. What waits in a
    /// queue that does not any more is lost.
    fn set_attached(_queue: BorrowedFd<'_>, _attached: bool) -> io::Result<()>
    where
        Self: Sized,
    {
        Ok(())
    }

    /// Takes note of what the descriptor tells, which is ready; frames are asked for after this.
    fn on_ready(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Whether frames can pass at all. It changes in the calls below and above only.
    fn is_connected(&self) -> bool {
        true
    }

    /// Puts the next frame into `room` and, behind it, into `rest`, which holds the longest one. Returns its length;
    /// `WouldBlock` when there is none until the descriptor is ready again.
    fn receive(&mut self, room: &mut Buffers<'_>, rest: &mut [u8]) -> io::Result<usize> {
        room.readv(self.as_fd(), rest)
    }

    /// Whether it takes a frame. When not, it does after the descriptor was ready.
    fn has_room(&self) -> bool {
        true
    }

    /// Takes a frame of at most [`MAX_FRAME_LEN`] bytes. Returns its length.
    fn send(&mut self, frame: &Buffers<'_>) -> io::Result<usize> {
        frame.writev(self.as_fd())
    }

    /// Sends what it has gathered; called when no frame follows for now.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Throws away what waits, by way of `scratch`, which holds the longest frame.
pub(super) fn discard(backend: &mut dyn Backend, scratch: &mut [u8]) {
    for _ in 0..MAX_STALE {
        if backend.receive(&mut Buffers::new(), scratch).is_err() {
            break;
        }
    }
}
