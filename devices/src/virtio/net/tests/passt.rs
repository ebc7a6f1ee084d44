//! A device whose network is a program at a socket.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::Ordering;

use vmm_sys_util::tempdir::TempDir;

use super::super::Passt;
use super::*;
use crate::testing::readable;

struct OnPasst<'m> {
    mem: &'m GuestMemory,
    rx: Driver<'m>,
    tx: Driver<'m>,
    queues: [Queue; 2],
    recorder: Arc<Recorder>,
    net: Net<Passt>,
    peer: UnixStream,
    listener: UnixListener,
    _folder: TempDir,
}

impl<'m> OnPasst<'m> {
    fn new(mem: &'m GuestMemory) -> Self {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let net = Net::new(&config(""), Passt::connect(&path).unwrap());
        let (peer, _) = listener.accept().unwrap();
        let (rx, tx) = (Driver::new(mem, 0x1000, 64), Driver::new(mem, 0x8_0000, 64));
        let mut this = Self {
            mem,
            queues: [rx.queue(false), tx.queue(false)],
            rx,
            tx,
            recorder: testing::recorder(),
            net,
            peer,
            listener,
            _folder: folder,
        };
        this.call(|net, io| net.activate(io)).unwrap();
        this
    }

    fn call<R>(&mut self, work: impl FnOnce(&mut Net<Passt>, &mut crate::virtio::Io<'_>) -> R) -> R {
        let mut io = testing::io(self.mem, &mut self.queues, &self.recorder, MRG_RXBUF);
        work(&mut self.net, &mut io)
    }

    fn ready(&mut self) {
        self.call(|net, io| net.on_event(0, io)).unwrap();
    }

    /// Waits until the backend's descriptor is ready, and tells the device.
    fn await_ready(&mut self) {
        let mut fd = libc::pollfd {
            fd: self.net.backend.as_fd().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: needed as std has no poll. One valid entry is passed, and the count is one.
        assert_eq!(unsafe { libc::poll(&mut fd, 1, 30_000) }, 1);
        self.ready();
    }

    fn send_frames(&mut self, count: usize, len: u32) {
        for _ in 0..count {
            self.tx.offer(&[readable(BUFFERS, len)]);
        }
        self.call(|net, io| net.on_queue(TX, io)).unwrap();
    }

    fn offer_rx(&mut self, count: usize) {
        for _ in 0..count {
            self.rx.offer(&[writable(BUFFERS + 0x1_0000, 1536)]);
        }
    }

    fn carrier(&self) -> u8 {
        self.net.config_space()[6]
    }

    fn config_interrupts(&self) -> usize {
        self.recorder.config.load(Ordering::Relaxed)
    }
}

fn wired(frame: &[u8]) -> Vec<u8> {
    let frame = &frame[HEADER_LEN..];
    [&u32::try_from(frame.len()).unwrap().to_be_bytes()[..], frame].concat()
}

#[test]
fn offers_no_offloads() {
    let mem = ram();
    let guest = OnPasst::new(&mem);
    let features = guest.net.info().features;
    assert_eq!(features & crate::virtio::net::feature::GUEST_OFFLOADS, 0);
    assert_eq!(features & 1, 0, "no checksum is left to be filled in");
}

#[test]
fn moves_frames_both_ways() {
    let mem = ram();
    let mut guest = OnPasst::new(&mem);
    for i in 0..4 {
        guest.rx.offer(&[writable(BUFFERS + 0x1_0000 + i * 1536, 1536)]);
    }
    let received = frame(3000, 1);
    guest.peer.write_all(&wired(&received)).unwrap();
    guest.ready();
    assert_eq!(
        (guest.rx.used().unwrap().1, guest.rx.used().unwrap().1),
        (1536, 1464)
    );
    let mut bytes = vec![0; 3000];
    mem.read_slice(&mut bytes, GuestAddress(BUFFERS + 0x1_0000))
        .unwrap();
    assert_eq!(bytes, merged(received, 2));

    let sent = frame(100, 2);
    mem.write_slice(&sent, GuestAddress(BUFFERS)).unwrap();
    guest.send_frames(3, 100);
    let mut bytes = vec![0; 3 * 92];
    guest.peer.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, wired(&sent).repeat(3));
}

#[test]
fn leaves_frames_in_the_queue_while_the_peer_does_not_read() {
    let mem = ram();
    let mut guest = OnPasst::new(&mem);
    for _ in 0..8 {
        guest.send_frames(8, 40_000);
    }
    let taken = std::iter::from_fn(|| guest.tx.used()).count();
    assert!((1..64).contains(&taken), "{taken}");

    let mut peer = guest.peer.try_clone().unwrap();
    let total = 64 * (40_000 - HEADER_LEN + 4);
    let reader = std::thread::spawn(move || {
        let mut bytes = vec![0; total];
        peer.read_exact(&mut bytes).unwrap();
    });
    let mut taken = taken;
    while taken < 64 {
        guest.await_ready();
        taken += std::iter::from_fn(|| guest.tx.used()).count();
    }
    while !reader.is_finished() {
        guest.ready();
    }
    reader.join().unwrap();
    assert_eq!(guest.net.metrics()["tx_fails"], 0);
}

#[test]
fn both_queues_go_on_when_both_have_more_than_one_turn() {
    let mem = ram();
    let mut guest = OnPasst::new(&mem);
    // One frame waits in the queue, and 63 come behind it.
    loop {
        guest.send_frames(1, 65_000);
        if guest.tx.used().is_none() {
            break;
        }
    }
    for _ in 0..63 {
        guest.tx.offer(&[readable(BUFFERS, 100)]);
    }
    guest.peer.set_nonblocking(true).unwrap();
    let mut bytes = vec![0; 1 << 20];
    while guest.peer.read(&mut bytes).is_ok() {}
    guest.peer.write_all(&wired(&frame(100, 1)).repeat(70)).unwrap();

    let (mut received, mut again) = (0, None);
    guest.offer_rx(64);
    guest.call(|net, io| {
        net.on_event(0, io).unwrap();
        again = io.again;
    });
    while let Some(queue) = again {
        let count = std::iter::from_fn(|| guest.rx.used()).count();
        guest.offer_rx(count);
        received += count;
        guest.call(|net, io| {
            net.on_queue(queue, io).unwrap();
            again = io.again;
        });
    }
    received += std::iter::from_fn(|| guest.rx.used()).count();
    assert_eq!(received, 70);
}

#[test]
fn frames_that_wait_for_a_peer_that_goes_are_lost_with_it() {
    let mem = ram();
    let mut guest = OnPasst::new(&mem);
    for _ in 0..8 {
        guest.send_frames(8, 40_000);
    }
    let taken = std::iter::from_fn(|| guest.tx.used()).count();
    assert!(taken < 64, "{taken}");
    guest.peer.shutdown(std::net::Shutdown::Both).unwrap();
    guest.ready();
    let lost = std::iter::from_fn(|| guest.tx.used()).count();
    assert_eq!((taken + lost, guest.carrier()), (64, 0));
}

#[test]
fn the_guest_loses_its_carrier_with_the_peer_and_gets_it_back() {
    let mem = ram();
    let mut guest = OnPasst::new(&mem);
    assert_eq!((guest.carrier(), guest.config_interrupts()), (1, 0));
    for i in 0..4 {
        guest.rx.offer(&[writable(BUFFERS + 0x1_0000 + i * 1536, 1536)]);
    }
    guest.peer.shutdown(std::net::Shutdown::Both).unwrap();
    guest.ready();
    assert_eq!((guest.carrier(), guest.config_interrupts()), (0, 1));
    guest.send_frames(1, 100);
    assert!(guest.tx.used().is_some());
    assert_eq!(
        (
            guest.net.metrics()["tx_fails"].as_u64(),
            guest.config_interrupts()
        ),
        (Some(1), 1)
    );

    guest.await_ready();
    assert_eq!((guest.carrier(), guest.config_interrupts()), (1, 2));
    let (mut peer, _) = guest.listener.accept().unwrap();
    peer.write_all(&wired(&frame(100, 1))).unwrap();
    guest.ready();
    assert_eq!(guest.rx.used().map(|(_, len)| len), Some(100));
}

#[test]
fn a_link_that_the_user_has_pulled_stays_down_whatever_the_peer_does() {
    let mem = ram();
    let mut guest = OnPasst::new(&mem);
    let patch = |state: &str| serde_json::json!({"iface_id": "eth0", "link_state": state});
    guest.call(|net, io| net.update(patch("down"), io)).unwrap();
    guest.peer.shutdown(std::net::Shutdown::Both).unwrap();
    guest.call(|net, io| net.update(patch("up"), io)).unwrap();
    // What waits is thrown away when the link comes up, and then the end shows.
    assert_eq!((guest.carrier(), guest.config_interrupts()), (0, 1));
}
