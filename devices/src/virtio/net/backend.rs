//! [`Backend`]: what a network device needs of the host's side, so that tests and fuzz targets can stand in for a tap.

use std::io;
use std::os::fd::AsFd;

use super::OpenError;

/// Bytes of the header before each frame, on the tap as in the queues (virtio 1.2 §5.1.6, `struct virtio_net_hdr`).
pub const HEADER_LEN: usize = 12;
/// The longest frame with its header: an IP packet of 64 KiB behind an Ethernet header with a VLAN tag.
pub const MAX_FRAME_LEN: usize = HEADER_LEN + 14 + 4 + 65536;

/// The host's end of a network interface.
///
/// Its non-blocking descriptor gives and takes one frame per `readv` and `writev`, each behind a header of
/// [`HEADER_LEN`] bytes in virtio's own format, so that frames pass unparsed.
pub trait Backend: AsFd + Send {
    /// The offload features (CSUM, GUEST_\*, HOST_\*) that it can serve. A new backend uses all of them.
    fn offloads(&self) -> u64;

    /// Gives frames that a driver with these features can take. Frames that wait already are as they are.
    fn set_offloads(&mut self, features: u64) -> io::Result<()>;

    /// The end of another interface of the host, called `name`, with all offloads in use; none when this is it already.
    fn open_other(&self, name: &str) -> Result<Option<Self>, OpenError>
    where
        Self: Sized;
}
