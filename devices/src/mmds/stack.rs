//! [`Stack`]: the service's end of one network interface: Ethernet frames in, Ethernet frames out, with `smoltcp`'s TCP
//! in between.
//!
//! It lives on the io thread of the interface, and does something only when a frame comes or a time that it has named
//! is there. A connection gets a socket when a guest asks for it, so with no connection there is nothing to wait for.
//! Guests are answered at the Ethernet address that they have written from, so the stack never has to look for one.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use smoltcp::iface::{Config, Interface, PollResult, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr};

use super::Mmds;
use super::connection::{Connection, HTTP_PORT, RECEIVE_BUFFER, listener};
use super::metrics::{add, count};
use super::packet::{self, ETHERNET_LEN, Kind, inspect};
use super::wire::Wire;

/// The longest frame that is taken: what a guest may send in one go that segments by its device, and all headers.
pub const MAX_FRAME_LEN: usize = ETHERNET_LEN + 60 + 60 + RECEIVE_BUFFER;
/// The most connections; for one more, the one that has been quiet for longest is given up.
const MAX_CONNECTIONS: usize = 32;
/// The most frames that wait for the guest; until it takes some, nothing more is made.
pub(super) const MAX_FRAMES: usize = 32;
/// The most frames together with those that answer the guest's at once, which may come in a row.
pub(super) const MAX_ANSWERS: usize = 128;
/// The shortest time to wait, so that a stack in trouble cannot keep its thread busy.
const MIN_DELAY: Duration = Duration::from_millis(1);

/// What time it is.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// For the interface's connections: since any fixed moment, and without pauses, so that these cost no connection.
    pub interface: Duration,
    /// For tokens: [`Mmds::age`].
    pub tokens: Duration,
}

/// ARP, TCP and HTTP for the guest behind one interface.
pub struct Stack {
    mmds: Arc<Mmds>,
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
    /// Who has sent the last frame.
    sender: [u8; 6],
    /// Frames for the guest.
    outgoing: VecDeque<Vec<u8>>,
    /// Frames may be due that did not fit.
    starved: bool,
}

impl Stack {
    /// A stack that nobody has spoken to. `seed` makes its sequence numbers hard to guess; `now` is, here and in
    /// [`Stack::next_work`], [`Now::interface`].
    pub fn new(mmds: Arc<Mmds>, seed: u64, now: Duration) -> Self {
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut interface = Interface::new(config, &mut Wire::unplugged(&mut VecDeque::new()), instant(now));
        let address = IpAddress::Ipv4(mmds.address());
        // Every guest's address is on this link.
        interface.update_ip_addrs(|addresses| {
            let pushed = addresses.push(IpCidr::new(address, 0));
            pushed.expect("there is room for one address");
        });
        Self {
            mmds,
            interface,
            sockets: SocketSet::new(Vec::new()),
            connections: Vec::new(),
            sender: [0; 6],
            outgoing: VecDeque::new(),
            starved: false,
        }
    }

    /// The address that frames for it are sent to.
    pub fn address(&self) -> Ipv4Addr {
        self.mmds.address()
    }

    /// Takes a frame of the guest, whatever it is.
    pub fn receive(&mut self, frame: &[u8], now: Now) {
        let metrics = self.mmds.metrics();
        count(&metrics.rx_accepted);
        if frame.len() > MAX_FRAME_LEN {
            return count(&metrics.rx_bad_eth);
        }
        self.sender = packet::sender(frame);
        match inspect(self.mmds.address(), frame) {
            Kind::Malformed => return count(&metrics.rx_accepted_err),
            Kind::Unserved => return count(&metrics.rx_accepted_unusual),
            Kind::ArpRequest => self.answer_arp(frame),
            Kind::Tcp { peer, port, opens } => {
                if port == HTTP_PORT {
                    self.hear(peer, opens, now.interface);
                } else {
                    // The guest will be told that nobody listens there.
                    count(&metrics.rx_accepted_unusual);
                }
                self.receive_packet(&frame[ETHERNET_LEN..], now);
            }
        }
        count(&self.mmds.metrics().rx_count);
    }

    fn answer_arp(&mut self, request: &[u8]) {
        if self.outgoing.len() < MAX_ANSWERS {
            self.outgoing
                .push_back(packet::arp_reply(self.mmds.address(), request));
            count(&self.mmds.metrics().tx_count);
        } else {
            count(&self.mmds.metrics().tx_errors);
        }
    }

    fn receive_packet(&mut self, packet: &[u8], now: Now) {
        let before = self.outgoing.len();
        let (interface, mut wire, sockets) = self.parts();
        wire.incoming = Some(packet);
        interface.poll_ingress_single(instant(now.interface), &mut wire, sockets);
        if wire.incoming.is_some() {
            // There is no room for an answer; it comes again, as after any loss.
            count(&self.mmds.metrics().tx_errors);
        }
        self.advance(now, before);
    }

    /// Does what is due.
    pub fn work(&mut self, now: Now) {
        self.advance(now, self.outgoing.len());
    }

    /// Brings everything as far as it goes. There were `before` frames when this turn began.
    fn advance(&mut self, now: Now, before: usize) {
        // Each round makes a frame or is the last.
        for _ in 0..=MAX_FRAMES {
            for connection in &mut self.connections {
                let socket = self.sockets.get_mut(connection.socket);
                connection.serve(socket, &self.mmds, now.tokens);
            }
            let (interface, mut wire, sockets) = self.parts();
            let made = interface.poll_egress(instant(now.interface), &mut wire, sockets);
            if made == PollResult::None {
                break;
            }
        }
        if self.outgoing.len() > before {
            count(&self.mmds.metrics().tx_count);
        }
        self.starved = self.outgoing.len() >= MAX_FRAMES;
        if !self.starved {
            self.forget_ended();
        }
    }

    /// How long until [`Stack::work`] is due; none when only the guest can make it so.
    pub fn next_work(&mut self, now: Duration) -> Option<Duration> {
        if self.connections.is_empty() || self.starved {
            return None;
        }
        let delay = self.interface.poll_delay(instant(now), &self.sockets)?;
        Some(MIN_DELAY.max(delay.into()))
    }

    /// Whether a frame waits for the guest.
    pub fn has_frame(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// The next frame for the guest.
    pub fn take_frame(&mut self, now: Now) -> Option<Vec<u8>> {
        let frame = self.outgoing.pop_front()?;
        let metrics = self.mmds.metrics();
        count(&metrics.tx_frames);
        add(&metrics.tx_bytes, frame.len());
        if self.outgoing.is_empty() && self.starved {
            self.work(now);
        }
        Some(frame)
    }

    /// The parts that `smoltcp` works with.
    fn parts(&mut self) -> (&mut Interface, Wire<'_>, &mut SocketSet<'static>) {
        let wire = Wire {
            incoming: None,
            outgoing: &mut self.outgoing,
            connections: &self.connections,
            sender: self.sender,
        };
        (&mut self.interface, wire, &mut self.sockets)
    }

    /// Forgets every connection, and frames on their way.
    pub fn reset(&mut self) {
        self.outgoing.clear();
        self.starved = false;
        for connection in std::mem::take(&mut self.connections) {
            self.forget(&connection);
        }
    }

    /// Notes that a peer is there, and gets ready for a new one.
    fn hear(&mut self, peer: (Ipv4Addr, u16), opens: bool, now: Duration) {
        let known = self
            .connections
            .iter_mut()
            .find(|connection| connection.peer == peer);
        if let Some(connection) = known {
            connection.last_heard = now;
            connection.mac = self.sender;
        } else if opens {
            if self.connections.len() >= MAX_CONNECTIONS {
                self.give_up_quietest();
            }
            let socket = self.sockets.add(listener(self.mmds.address()));
            self.connections
                .push(Connection::new(socket, peer, self.sender, now));
            count(&self.mmds.metrics().connections_created);
        }
    }

    fn give_up_quietest(&mut self) {
        let connections = self.connections.iter().enumerate();
        let quietest = connections.min_by_key(|(_, connection)| connection.last_heard);
        if let Some((index, _)) = quietest {
            // When it speaks again the answer is that nobody knows it.
            let connection = self.connections.swap_remove(index);
            self.forget(&connection);
        }
    }

    fn forget_ended(&mut self) {
        let mut index = 0;
        while let Some(connection) = self.connections.get(index) {
            let socket: &tcp::Socket = self.sockets.get(connection.socket);
            // The last frame of an end was sent; should it be lost, that is not worth a socket and a timer. A listener
            // is one whose guest has taken its request back.
            let ended = matches!(
                socket.state(),
                tcp::State::Closed | tcp::State::TimeWait | tcp::State::Listen
            );
            if ended {
                let connection = self.connections.swap_remove(index);
                self.forget(&connection);
            } else {
                index += 1;
            }
        }
    }

    fn forget(&mut self, connection: &Connection) {
        self.sockets.remove(connection.socket);
        count(&self.mmds.metrics().connections_destroyed);
    }
}

fn instant(now: Duration) -> Instant {
    Instant::from_micros(i64::try_from(now.as_micros()).unwrap_or(i64::MAX))
}
