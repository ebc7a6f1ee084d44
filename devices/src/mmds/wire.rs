//! [`Wire`]: the link as `smoltcp` wants it, which sees IP packets only.

use std::collections::VecDeque;

use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

use super::connection::Connection;
use super::packet;
use super::stack::{MAX_ANSWERS, MAX_FRAMES};

/// The longest packet that is sent: an ordinary Ethernet's. A guest that takes less says so when it connects.
const MTU: usize = 1500;

/// The link for the time of one call.
pub(super) struct Wire<'a> {
    /// What the guest has sent.
    pub(super) incoming: Option<&'a [u8]>,
    /// Frames for the guest.
    pub(super) outgoing: &'a mut VecDeque<Vec<u8>>,
    pub(super) connections: &'a [Connection],
    /// Who has sent the last frame.
    pub(super) sender: [u8; 6],
}

impl<'a> Wire<'a> {
    /// A link that nothing comes from.
    pub(super) fn unplugged(outgoing: &'a mut VecDeque<Vec<u8>>) -> Self {
        Self {
            incoming: None,
            outgoing,
            connections: &[],
            sender: [0; 6],
        }
    }

    fn outgoing(&mut self) -> Outgoing<'_> {
        Outgoing {
            queue: self.outgoing,
            connections: self.connections,
            sender: self.sender,
        }
    }
}

/// A packet of the guest.
pub(super) struct Incoming<'a>(&'a [u8]);

/// Room for a packet to the guest.
pub(super) struct Outgoing<'a> {
    queue: &'a mut VecDeque<Vec<u8>>,
    connections: &'a [Connection],
    sender: [u8; 6],
}

impl RxToken for Incoming<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, work: F) -> R {
        work(self.0)
    }
}

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, work: F) -> R {
        let mut packet = vec![0; len];
        let result = work(&mut packet);
        let to = packet::destination(&packet);
        let known = self
            .connections
            .iter()
            .find(|connection| Some(connection.peer.0) == to);
        // Whoever has no connection is told so at once.
        let mac = known.map_or(self.sender, |connection| connection.mac);
        self.queue.push_back(packet::ipv4_frame(mac, &packet));
        result
    }
}

impl Device for Wire<'_> {
    type RxToken<'t>
        = Incoming<'t>
    where
        Self: 't;
    type TxToken<'t>
        = Outgoing<'t>
    where
        Self: 't;

    fn receive(&mut self, _now: Instant) -> Option<(Incoming<'_>, Outgoing<'_>)> {
        if self.outgoing.len() >= MAX_ANSWERS {
            return None;
        }
        let packet = self.incoming.take()?;
        Some((Incoming(packet), self.outgoing()))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Outgoing<'_>> {
        (self.outgoing.len() < MAX_FRAMES).then(|| self.outgoing())
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        // A guest leaves checksums to its device, and no wire is between it and us.
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}
