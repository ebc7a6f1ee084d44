//! The network device from the outside: a [`Guest`] with both queues in plain memory, and a socket pair for the tap.

mod config;
mod device;
mod inherited;
mod limits;
mod link;
mod mmds;
mod noise;
mod pairs;
mod passt;
mod rx;
mod tap;
mod tx;

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress};

use super::feature::{GUEST_CSUM, GUEST_TSO4, MRG_RXBUF};
use super::{Backend, Config, HEADER_LEN, Net, OpenError, RX, TX};
use crate::GuestMemory;
use crate::testing::{self, Driver, Recorder, memory, writable};
use crate::virtio::{DeviceError, DeviceKind, Queue, UpdateError, VirtioDevice};

/// Where the guest's buffers start; the rings lie below.
const BUFFERS: u64 = 0x10_0000;

/// A socket in place of a tap; its packets keep the bounds of frames.
struct FakeTap {
    socket: UnixDatagram,
    set: Arc<Mutex<Vec<u64>>>,
    /// The hosts' ends of the taps that were opened in place of this one.
    others: Arc<Mutex<Vec<UnixDatagram>>>,
}

thread_local! {
    /// What became attached (true) or not on this thread, by inode.
    static SWITCHED: RefCell<Vec<(u64, bool)>> = const { RefCell::new(Vec::new()) };
    /// The host refuses to attach anything.
    static REFUSES: RefCell<bool> = const { RefCell::new(false) };
}

/// What a descriptor and its duplicates are known by.
fn inode(fd: BorrowedFd<'_>) -> u64 {
    File::from(fd.try_clone_to_owned().unwrap())
        .metadata()
        .unwrap()
        .ino()
}

impl FakeTap {
    /// The fake and the host's end of its wire.
    fn new() -> (Self, UnixDatagram) {
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        let mut fds = [0; 2];
        // SAFETY: needed as std has no sockets of this kind, and its datagram sockets hold only ten packets. The
        // kernel writes two descriptors, which nobody else owns.
        let [socket, wire] = unsafe {
            assert_eq!(libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()), 0);
            fds.map(|fd| UnixDatagram::from(OwnedFd::from_raw_fd(fd)))
        };
        let (set, others) = Default::default();
        let tap = Self { socket, set, others };
        (tap, wire)
    }
}

impl AsFd for FakeTap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Backend for FakeTap {
    fn offloads(&self) -> u64 {
        GUEST_CSUM | GUEST_TSO4
    }

    fn set_offloads(&mut self, features: u64) -> std::io::Result<()> {
        self.set.lock().unwrap().push(features);
        Ok(())
    }

    /// There are others: an idle one, one to which a frame has come already, and one that somebody else has.
    fn open_other(&self, name: &str, queues: u16) -> Result<Vec<Self>, OpenError> {
        match name {
            "tap0" => Ok(Vec::new()),
            "tap1" | "busy" => {
                let other = |_| {
                    let (mut other, wire) = Self::new();
                    other.set = Arc::clone(&self.set);
                    if name == "busy" {
                        wire.send(&frame(3000, 9)).unwrap();
                    }
                    self.others.lock().unwrap().push(wire);
                    other
                };
                Ok((0..queues).map(other).collect())
            }
            _ => Err(OpenError::Busy {
                name: name.into(),
                source: std::io::Error::from_raw_os_error(libc::EBUSY),
            }),
        }
    }

    fn set_attached(queue: BorrowedFd<'_>, attached: bool) -> std::io::Result<()> {
        if attached && REFUSES.with_borrow(|refuses| *refuses) {
            return Err(std::io::ErrorKind::OutOfMemory.into());
        }
        SWITCHED.with_borrow_mut(|switched| switched.push((inode(queue), attached)));
        Ok(())
    }
}

fn config(rest: &str) -> Config {
    serde_json::from_str(&format!(r#"{{"iface_id":"eth0","host_dev_name":"tap0"{rest}}}"#)).unwrap()
}

/// A driver with its device, and the host behind.
struct Guest<'m> {
    mem: &'m GuestMemory,
    rx: Driver<'m>,
    tx: Driver<'m>,
    queues: [Queue; 2],
    recorder: Arc<Recorder>,
    net: Net<FakeTap>,
    wire: UnixDatagram,
    /// The hosts' ends of other taps that the device has opened.
    others: Arc<Mutex<Vec<UnixDatagram>>>,
    features: u64,
    /// What the device asked for in its last call.
    again: Option<u16>,
}

impl<'m> Guest<'m> {
    /// A guest with mergeable buffers and queues of `size` entries.
    fn new(mem: &'m GuestMemory, size: u16) -> Self {
        Self::with(mem, size, MRG_RXBUF | GUEST_CSUM | GUEST_TSO4)
    }

    fn with(mem: &'m GuestMemory, size: u16, features: u64) -> Self {
        Self::of(mem, size, features, |net| net)
    }

    /// A guest of a device that was changed before it was activated.
    fn of(
        mem: &'m GuestMemory,
        size: u16,
        features: u64,
        change: impl FnOnce(Net<FakeTap>) -> Net<FakeTap>,
    ) -> Self {
        let (tap, wire) = FakeTap::new();
        let others = Arc::clone(&tap.others);
        let (rx, tx) = (Driver::new(mem, 0x1000, size), Driver::new(mem, 0x8_0000, size));
        let queues = [rx.queue(false), tx.queue(false)];
        let net = change(Net::new(&config(r#","guest_mac":"02:00:00:00:00:01""#), tap));
        let mut guest = Self {
            mem,
            rx,
            tx,
            queues,
            recorder: testing::recorder(),
            net,
            wire,
            others,
            features,
            again: None,
        };
        let mut io = testing::io(mem, &mut guest.queues, &guest.recorder, features);
        guest.net.activate(&mut io).unwrap();
        guest
    }

    fn call(
        &mut self,
        work: impl FnOnce(&mut Net<FakeTap>, &mut crate::virtio::Io<'_>) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let mut io = testing::io(self.mem, &mut self.queues, &self.recorder, self.features);
        let result = work(&mut self.net, &mut io);
        self.again = io.again;
        result
    }

    fn update(&mut self, patch: &str) -> Result<(), UpdateError> {
        let patch = serde_json::from_str(patch).unwrap();
        let mut io = testing::io(self.mem, &mut self.queues, &self.recorder, self.features);
        self.net.update(patch, &mut io)
    }

    fn kick_rx(&mut self) {
        self.call(|net, io| net.on_queue(RX, io)).unwrap();
    }

    fn kick_tx(&mut self) {
        self.call(|net, io| net.on_queue(TX, io)).unwrap();
    }

    fn tap_event(&mut self) {
        self.call(|net, io| net.on_event(0, io)).unwrap();
    }

    /// Offers `count` receive buffers of `len` bytes, side by side from the `first`th place on; returns their heads.
    fn offer_rx(&mut self, first: u64, count: u64, len: u32) -> Vec<u16> {
        let mut offer = |i| self.rx.offer(&[writable(BUFFERS + i * u64::from(len), len)]);
        (first..first + count).map(&mut offer).collect()
    }

    /// Guest memory from the `BUFFERS + offset`.
    fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem
            .read_slice(&mut bytes, GuestAddress(BUFFERS + offset))
            .unwrap();
        bytes
    }

    /// All answers in the receive queue.
    fn received(&mut self) -> Vec<(u16, u32)> {
        std::iter::from_fn(|| self.rx.used()).collect()
    }

    fn counter(&self, name: &str) -> u64 {
        self.net.metrics()[name].as_u64().unwrap()
    }
}

/// A frame with its header, `len` bytes together, recognisable by `seed`.
fn frame(len: usize, seed: u8) -> Vec<u8> {
    let pattern = (0u8..=250).cycle().map(|b| b.wrapping_add(seed));
    let mut frame = vec![0; HEADER_LEN];
    frame.extend(pattern.take(len - HEADER_LEN));
    frame
}

/// The frame as the guest sees it: the header says how many buffers it took.
fn merged(mut frame: Vec<u8>, buffers: u16) -> Vec<u8> {
    frame[10..12].copy_from_slice(&buffers.to_le_bytes());
    frame
}

/// Memory for rings and buffers.
fn ram() -> GuestMemory {
    memory(4 << 20)
}
