//! The link as the guest and the network see it: its state in the configuration space, a pulled cable, and the move to
//! another interface of the host. All of it happens in the device's `update`, wholly or not at all.

use std::ops::Range;
use std::os::fd::AsRawFd;

use super::backend::{self, Backend, HEADER_LEN, MAX_FRAME_LEN};
use super::pairs::HostQueues;
use super::{BACKEND_TOKEN, LinkState, MacAddr, Net, Patch, feature};
use crate::virtio::{Buffers, Io, UpdateError, Vector};

/// `status` in the configuration space (virtio 1.2 §5.1.4): the link is up.
const LINK_UP: u16 = 1;
/// Where `status` is.
pub(super) const STATUS: Range<usize> = 6..8;
/// The shortest Ethernet frame without its checksum.
const MIN_ETHERNET: usize = 60;

/// The configuration space's `status`.
pub(super) fn status(is_up: bool) -> [u8; 2] {
    if is_up { LINK_UP } else { 0 }.to_le_bytes()
}

impl<B: Backend> Net<B> {
    /// Makes the changes that the user asks for. What can fail comes first.
    pub(super) fn change(&mut self, patch: &Patch, io: &Io<'_>) -> Result<(), UpdateError> {
        let (rx, tx) = (patch.rx_rate_limiter.as_ref(), patch.tx_rate_limiter.as_ref());
        self.rx.throttle.prepare(rx, io)?;
        self.tx.throttle.prepare(tx, io)?;
        let (others, queues) = match &patch.host_dev_name {
            Some(name) => self.open_other(name, io)?,
            None => Default::default(),
        };
        self.rx.throttle.patch(rx);
        self.tx.throttle.patch(tx);
        let mut others = others.into_iter();
        let other = others.next();
        let moved = other.is_some();
        if let Some(other) = other {
            // A descriptor that the loop does not know has nothing to be removed.
            let _ = io.watch.remove(self.backend.as_fd().as_raw_fd());
            self.backend = other;
        }
        let came = self.set_link(patch.link_state.unwrap_or(self.link));
        if let Some(pairs) = &self.pairs {
            pairs.set_link(self.link);
            if moved {
                pairs.adopt(queues, others);
            }
        }
        self.show_link(io);
        if self.is_up() && (moved || came) {
            announce(&mut self.backend, self.tx.guest_mac, &self.iface_id);
        }
        Ok(())
    }

    /// Whether frames pass.
    pub(super) fn is_up(&self) -> bool {
        self.link == LinkState::Up && self.backend.is_connected()
    }

    /// Tells the driver when frames do not pass any more, or pass again.
    pub(super) fn show_link(&mut self, io: &Io<'_>) {
        if self.note_link() {
            io.config.set(&self.config_space);
            io.irq.raise(Vector::Config);
        }
    }

    /// Takes note of whether frames pass; true when that is news.
    pub(super) fn note_link(&mut self) -> bool {
        let status = status(self.is_up());
        let is_news = self.config_space[STATUS] != status;
        if is_news {
            self.config_space[STATUS].copy_from_slice(&status);
            self.rx.drop_held();
        }
        is_news
    }

    /// Opens the interface to move to, once for each pair of queues, and watches the first.
    fn open_other(&self, name: &str, io: &Io<'_>) -> Result<(Vec<B>, HostQueues), UpdateError> {
        let host = |what: &str| {
            let op = format!("{what} the tap '{name}'");
            move |source| UpdateError::Host { op, source }
        };
        let count = self.pairs.as_ref().map_or(1, |pairs| pairs.count());
        let others = open_other(&self.backend, name, count, self.offloads)?;
        let queues = match &self.pairs {
            Some(pairs) => pairs.prepare(&others, !io.queues.is_empty()),
            None => Ok(Vec::new()),
        };
        let queues = queues.map_err(host("set up the queues of"))?;
        if let Some(other) = others.first() {
            let watched = io.watch.add(other.as_fd().as_raw_fd(), BACKEND_TOKEN);
            watched.map_err(host("watch"))?;
        }
        Ok((others, queues))
    }

    /// Plugs the cable in or pulls it; true when it was out before. What is on its way then is lost, as on a wire.
    pub(super) fn set_link(&mut self, state: LinkState) -> bool {
        let before = std::mem::replace(&mut self.link, state);
        match (before, state) {
            (LinkState::Down, LinkState::Up) => self.rx.discard(&mut self.backend),
            (LinkState::Up, LinkState::Down) => {
                if let Some(detour) = &self.detour {
                    detour.reset();
                }
            }
            _ => {}
        }
        before == LinkState::Down && state == LinkState::Up
    }
}

/// Opens the interface called `name`, with so many queues, in place of `backend`, with the offloads that are in use; none
/// when this is it already.
pub(super) fn open_other<B: Backend>(
    backend: &B,
    name: &str,
    queues: u16,
    offloads: u64,
) -> Result<Vec<B>, UpdateError> {
    let opened = backend.open_other(name, queues);
    let mut others = opened.map_err(|error| UpdateError::Device(error.into()))?;
    for other in &mut others {
        let set = other.set_offloads(offloads);
        set.map_err(|source| UpdateError::Host {
            op: format!("set the offloads of the tap '{name}'"),
            source,
        })?;
        // Frames that came before may be more than the driver can take.
        if other.offloads() & feature::GUEST_OFFLOADS & !offloads != 0 {
            backend::discard(other, &mut vec![0; MAX_FRAME_LEN]);
        }
    }
    Ok(others)
}

/// Tells switches where the guest is now, in its name: a reverse ARP request (RFC 903), which nobody answers. Of a guest
/// that has made up its own address they learn with the next frame that it sends.
pub(super) fn announce(backend: &mut dyn Backend, mac: Option<MacAddr>, iface_id: &str) {
    let Some(mac) = mac else { return };
    let mut frame = announcement(mac);
    let mut buffers = Buffers::new();
    buffers.push(&frame.as_mut_slice().into());
    let sent = backend.send(&buffers);
    if let Err(error) = sent.and_then(|_| backend.flush()) {
        log::info!("net {iface_id}: the network was not told where the guest is: {error}");
    }
}

/// A frame that asks everybody for the address of `mac`.
fn announcement(mac: MacAddr) -> [u8; HEADER_LEN + MIN_ETHERNET] {
    let mut frame = [0; HEADER_LEN + MIN_ETHERNET];
    let ethernet = &mut frame[HEADER_LEN..];
    ethernet[..6].fill(0xff);
    ethernet[6..12].copy_from_slice(&mac.bytes());
    ethernet[12..14].copy_from_slice(&[0x80, 0x35]);
    // Ethernet and IPv4, the lengths of their addresses, "request reverse".
    ethernet[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 3]);
    // The sender and who is asked for.
    ethernet[22..28].copy_from_slice(&mac.bytes());
    ethernet[32..38].copy_from_slice(&mac.bytes());
    frame
}
