//! A network card without a tap.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;

use devices::virtio::net::{Backend, Config, Net, OpenError, feature};

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

    fn open_other(&self, _: &str) -> Result<Option<Self>, OpenError> {
        Ok(None)
    }
}

/// A card, and the far end of its wire.
pub fn card() -> (Net<Wire>, UnixDatagram) {
    let config = Config {
        iface_id: "eth0".into(),
        host_dev_name: Some("tap0".into()),
        guest_mac: None,
        mtu: Some(1500),
        rx_rate_limiter: None,
        tx_rate_limiter: None,
        link_state: None,
        host_fd: None,
    };
    let (near, far) = UnixDatagram::pair().expect("the host has descriptors left");
    for end in [&near, &far] {
        end.set_nonblocking(true).expect("a socket can be non-blocking");
    }
    (Net::new(&config, Wire(near)), far)
}
