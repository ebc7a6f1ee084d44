//! A network card without a tap.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::OnceLock;

use devices::virtio::net::{Backend, Config, HEADER_LEN, MAX_FRAME_LEN, Net, OpenError, Passt, feature};

/// Stands for a tap: it keeps the borders between frames.
pub struct Wire(UnixDatagram);

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Backend for Wire {
    fn offloads(&self) -> u64 {
        feature::CSUM | feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::HOST_TSO4
    }

    fn set_offloads(&mut self, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn open_other(&self, _: &str, _: u16) -> Result<Vec<Self>, OpenError> {
        Ok(Vec::new())
    }
}

/// The far end of a card's wire.
pub enum Far {
    /// Of stand-ins for the queues of a tap; what comes, comes to all of them.
    Tap(Vec<UnixDatagram>),
    /// Of a connection to passt.
    Passt(UnixStream),
}

impl Far {
    /// Sends a frame with its header. A full socket drops it, as a network may.
    pub fn send(&mut self, frame: &[u8]) {
        match self {
            Self::Tap(_) => self.send_raw(frame),
            Self::Passt(_) => {
                let frame = &frame[HEADER_LEN..];
                let length = (frame.len() as u32).to_be_bytes();
                self.send_raw(&[&length, frame].concat());
            }
        }
    }

    /// Sends bytes as they are.
    pub fn send_raw(&mut self, bytes: &[u8]) {
        match self {
            Self::Tap(sockets) => sockets.iter().for_each(|socket| _ = socket.send(bytes)),
            Self::Passt(stream) => _ = stream.write(bytes),
        }
    }

    /// Takes what has left, and checks that it is made of frames.
    pub fn drain(&mut self) {
        let mut bytes = vec![0; 1 << 20];
        match self {
            Self::Tap(sockets) => sockets.iter().for_each(|socket| {
                while let Ok(length) = socket.recv(&mut bytes) {
                    let good = HEADER_LEN..=MAX_FRAME_LEN;
                    assert!(good.contains(&length), "a frame of {length} bytes left");
                }
            }),
            // Where a frame ends is known to who has read from the start, and the stream may end anywhere.
            Self::Passt(stream) => while stream.read(&mut bytes).is_ok_and(|length| length > 0) {},
        }
    }
}

/// A card on passt, and the far end.
pub fn passt_card() -> (Net<Passt>, Far) {
    static LISTENER: OnceLock<(UnixListener, PathBuf)> = OnceLock::new();
    let (listener, path) = LISTENER.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("mayfly-fuzz-{}", std::process::id()));
        let listener = UnixListener::bind(&path).expect("the folder for temporary files can be written to");
        (listener, path)
    });
    let passt = Passt::connect(path).expect("somebody listens");
    let (stream, _) = listener.accept().expect("somebody has called");
    stream.set_nonblocking(true).expect("a socket can be non-blocking");
    (Net::new(&config(), passt), Far::Passt(stream))
}

/// A card on a stand-in for a tap, and the far end.
pub fn card() -> (Net<Wire>, Far) {
    let (near, far) = wire();
    (Net::new(&config(), near), Far::Tap(vec![far]))
}

/// A card with two pairs of queues, and the far ends of both.
pub fn card_with_pairs() -> (Net<Wire>, Far) {
    let (near, far) = (0..2).map(|_| wire()).unzip();
    let card = Net::with_pairs(&config(), near).expect("the host has descriptors left");
    (card, Far::Tap(far))
}

fn wire() -> (Wire, UnixDatagram) {
    let (near, far) = UnixDatagram::pair().expect("the host has descriptors left");
    for end in [&near, &far] {
        end.set_nonblocking(true).expect("a socket can be non-blocking");
    }
    (Wire(near), far)
}

fn config() -> Config {
    Config {
        iface_id: "eth0".into(),
        host_dev_name: Some("tap0".into()),
        guest_mac: None,
        mtu: Some(1500),
        rx_rate_limiter: None,
        tx_rate_limiter: None,
        link_state: None,
        host_fd: None,
        backend: None,
        socket: None,
        vhost: None,
        queues: None,
    }
}
