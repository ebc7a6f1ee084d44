//! [`Muxer`]: all connections of the device, with the sockets of the host programs at their other ends.
//!
//! It has three inputs: packets of the guest ([`from_guest`]), readiness of sockets ([`from_host`]) and room in the
//! guest's receive queue ([`to_guest`]). Sockets are watched by an epoll of its own, which the io loop watches; so
//! one call serves whatever became ready, with one interrupt at its end.
//!
//! What the guest can make it hold is bounded: [`MAX_CONNECTIONS`] entries, a ring of
//! [`BUF_ALLOC`](super::connection::BUF_ALLOC) bytes for each at most, and [`MAX_RESETS`] answers for packets that
//! belong to no connection. When those are used up, the guest's packets wait in their queue.

mod from_guest;
mod from_host;
mod to_guest;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::{Connection, Phase};
use super::host::{Pending, Spare};
use super::listener::Listener;
use super::metrics::Metrics;
use super::packet::{Header, Ports, SHUTDOWN_RECEIVE};
use super::slots::Slots;
use super::{Config, OpenError};
use crate::timer::Timer;

/// The most connections, host programs included that have not named a port yet.
pub const MAX_CONNECTIONS: u32 = 1024;
/// The most answers that wait for receive buffers, before the guest's packets wait too.
const MAX_RESETS: usize = 256;
/// How long the guest may take to end a connection that the host has closed; Linux waits as long.
pub(super) const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);
/// How long the guest may take to answer a host program's request once it has it.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a host program is tried that has no room for a connection.
const CONNECT_TRIES: u32 = 100;
/// When something is tried again of whose possibility no event tells.
pub(super) const RETRY_PAUSE: Duration = Duration::from_millis(20);
/// The host's ports of connections that host programs began; they run from here to the end.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// Events that are not a slot's.
const LISTENER: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;

/// One entry of the table.
#[derive(Debug)]
enum Endpoint {
    /// A host program that has not said which port it wants.
    Client(UnixStream),
    /// A connection.
    Stream(Box<Stream>),
}

/// A connection and its host program.
#[derive(Debug)]
struct Stream {
    connection: Connection,
    /// None before the host program has accepted, and after it is gone.
    socket: Option<UnixStream>,
    /// The guest's data that the socket has not taken.
    pending: Pending,
    /// Whether an event comes when the socket takes data again.
    awaits_room: bool,
    /// There may be data in the socket: no read has found it empty since the last event.
    readable: bool,
    /// How much the next read asks for, after what the last ones gave.
    appetite: usize,
    /// Which directions of the socket were shut down.
    shut: (bool, bool),
    deadline: Option<Instant>,
    tries: u32,
}

impl Stream {
    fn new(connection: Connection, socket: Option<UnixStream>) -> Self {
        Self {
            connection,
            socket,
            pending: Pending::default(),
            awaits_room: false,
            readable: false,
            appetite: to_guest::MIN_READ,
            shut: (false, false),
            deadline: None,
            tries: 0,
        }
    }

    /// The host program takes no more data: what waits for it counts as passed on.
    fn refuse(&mut self, spare: &mut Spare) {
        let lost = u32::try_from(self.pending.len()).expect("a ring is shorter than 4 GiB");
        self.connection.forward(lost);
        self.pending.clear(spare);
        self.connection.close_host(SHUTDOWN_RECEIVE);
    }
}

/// See the head of this file.
pub(super) struct Muxer {
    guest_cid: u32,
    listener: Listener,
    epoll: Epoll,
    timer: Timer,
    slots: Slots<Endpoint>,
    ports: HashMap<Ports, u32>,
    /// Slots that have something for the guest, each once, in the order of their turns.
    ready: VecDeque<u32>,
    /// By slot: whether it is in `ready`.
    is_ready: Vec<bool>,
    /// Answers for packets without a connection.
    resets: VecDeque<Header>,
    deadlines: BTreeSet<(Instant, u32)>,
    next_port: u32,
    /// A host program may wait to be accepted.
    accept_due: bool,
    spare: Spare,
    pub(super) metrics: Metrics,
}

impl AsRawFd for Muxer {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

impl Muxer {
    pub(super) fn new(config: &Config) -> Result<Self, OpenError> {
        let host = |op| move |source| OpenError::Host { op, source };
        let listener = Listener::bind(&config.uds_path)?;
        let epoll = Epoll::new().map_err(host("make an epoll"))?;
        let timer = Timer::new().map_err(host("make a timer"))?;
        let watched = [(listener.as_raw_fd(), LISTENER), (timer.as_raw_fd(), TIMER)];
        for (fd, token) in watched {
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token);
            let added = epoll.ctl(ControlOperation::Add, fd, event);
            added.map_err(host("watch a descriptor"))?;
        }
        Ok(Self {
            guest_cid: config.guest_cid,
            listener,
            epoll,
            timer,
            slots: Slots::new(MAX_CONNECTIONS),
            ports: HashMap::new(),
            ready: VecDeque::new(),
            is_ready: vec![false; MAX_CONNECTIONS as usize],
            resets: VecDeque::new(),
            deadlines: BTreeSet::new(),
            next_port: FIRST_HOST_PORT,
            accept_due: false,
            spare: None,
            metrics: Metrics::default(),
        })
    }

    /// Ends all connections; the guest is not told, as it has forgotten them.
    pub(super) fn reset(&mut self) {
        for slot in 0..MAX_CONNECTIONS {
            self.remove(slot);
        }
        self.ready.clear();
        self.is_ready.fill(false);
        self.resets.clear();
        self.accept_due = true;
    }

    /// Whether the guest's packets have to wait until it takes answers.
    pub(super) fn is_congested(&self) -> bool {
        self.resets.len() >= MAX_RESETS
    }

    /// Whether there is something for the guest.
    pub(super) fn has_output(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    fn stream(&mut self, slot: u32) -> Option<&mut Stream> {
        match self.slots.get_mut(slot)? {
            Endpoint::Stream(stream) => Some(stream),
            Endpoint::Client(_) => None,
        }
    }

    fn register(&mut self, slot: u32, ports: Ports) {
        self.ports.insert(ports, slot);
        self.metrics.conns_added += 1;
    }

    /// Gives the slot a turn when it has something for the guest.
    fn schedule(&mut self, slot: u32) {
        let Some(stream) = self.stream(slot) else { return };
        let connection = &stream.connection;
        let has_data =
            stream.readable && connection.phase() == Phase::Established && !connection.is_closed_to_guest();
        if (has_data || connection.has_packet()) && !self.is_ready[slot as usize] {
            self.is_ready[slot as usize] = true;
            self.ready.push_back(slot);
        }
    }

    /// Draws the consequences of closed directions.
    fn settle(&mut self, slot: u32) {
        let Some(stream) = self.stream(slot) else { return };
        let connection = &stream.connection;
        let host_done = connection.host_refuses();
        match connection.phase() {
            Phase::Requested | Phase::Connecting => {}
            Phase::Draining => {
                if host_done || stream.pending.is_empty() {
                    self.remove(slot);
                }
            }
            Phase::Established | Phase::Closing if connection.guest_is_done() => self.end(slot),
            Phase::Closing => {}
            Phase::Established => {
                let all_written = connection.guest_is_silent() && stream.pending.is_empty();
                if connection.is_closed_to_guest() && (host_done || all_written) {
                    self.close(slot);
                } else {
                    let guest_refuses = connection.guest_refuses();
                    shut_down(stream, guest_refuses, all_written);
                }
            }
        }
    }

    /// The guest is done: it is told that the host is too, and only its last data stays.
    fn end(&mut self, slot: u32) {
        let guest_cid = self.guest_cid;
        let Some(stream) = self.stream(slot) else { return };
        let ports = stream.connection.ports;
        let reset = stream.connection.reset_packet(guest_cid);
        if stream.connection.host_refuses() || stream.pending.is_empty() {
            self.remove(slot);
        } else {
            stream.connection.drain();
            shut_down(stream, true, false);
            // The guest may use its port again.
            self.ports.remove(&ports);
        }
        self.resets.push_back(reset);
    }

    /// The host is done: the guest is told, and has a while to end the connection.
    fn close(&mut self, slot: u32) {
        let spare = &mut self.spare;
        if let Some(Endpoint::Stream(stream)) = self.slots.get_mut(slot) {
            stream.pending.clear(spare);
            stream.socket = None;
            stream.readable = false;
            stream.connection.finish();
            self.set_deadline(slot, CLOSE_TIMEOUT);
        }
    }

    /// Ends the connection at once, with an RST.
    fn kill(&mut self, slot: u32) {
        let guest_cid = self.guest_cid;
        if let Some(stream) = self.stream(slot) {
            let reset = stream.connection.reset_packet(guest_cid);
            // The guest has forgotten a connection that only drains.
            if stream.connection.phase() != Phase::Draining {
                self.resets.push_back(reset);
            }
            self.metrics.conns_killed += 1;
            self.remove(slot);
        }
    }

    /// Forgets an entry, and closes its socket.
    fn remove(&mut self, slot: u32) {
        self.clear_deadline(slot);
        let Some(Endpoint::Stream(mut stream)) = self.slots.remove(slot) else {
            return;
        };
        stream.pending.clear(&mut self.spare);
        let ports = stream.connection.ports;
        if self.ports.get(&ports) == Some(&slot) {
            self.ports.remove(&ports);
        }
        self.metrics.conns_removed += 1;
    }

    pub(super) fn set_deadline(&mut self, slot: u32, delay: Duration) {
        let deadline = Instant::now() + delay;
        let Some(stream) = self.stream(slot) else { return };
        let old = stream.deadline.replace(deadline);
        if let Some(old) = old {
            self.deadlines.remove(&(old, slot));
        }
        self.deadlines.insert((deadline, slot));
        if self.deadlines.first() == Some(&(deadline, slot)) {
            self.set_timer();
        }
    }

    fn clear_deadline(&mut self, slot: u32) {
        let deadline = self.stream(slot).and_then(|stream| stream.deadline.take());
        if let Some(deadline) = deadline {
            self.deadlines.remove(&(deadline, slot));
        }
    }

    /// The timer runs only while there is a deadline.
    fn set_timer(&mut self) {
        if let Some((first, _)) = self.deadlines.first()
            && let Err(error) = self.timer.set(first.saturating_duration_since(Instant::now()))
        {
            log::warn!("vsock: cannot set a timer: {error}");
        }
    }

    /// Does what is due at `now`.
    pub(super) fn expire(&mut self, now: Instant) {
        while let Some((deadline, slot)) = self.deadlines.first().copied() {
            if deadline > now {
                break;
            }
            self.deadlines.pop_first();
            let Some(stream) = self.stream(slot) else { continue };
            stream.deadline = None;
            match stream.connection.phase() {
                Phase::Connecting => self.connect_again(slot),
                Phase::Established | Phase::Draining => self.flush_again(slot),
                Phase::Requested | Phase::Closing => self.kill(slot),
            }
        }
        self.set_timer();
    }
}

/// Shuts down the directions of the socket that nothing uses any more.
fn shut_down(stream: &mut Stream, read: bool, write: bool) {
    let Some(socket) = &stream.socket else { return };
    // A socket whose other end has left refuses, and has nothing to shut down.
    if read && !std::mem::replace(&mut stream.shut.0, true) {
        let _ = socket.shutdown(Shutdown::Read);
    }
    if write && !std::mem::replace(&mut stream.shut.1, true) {
        let _ = socket.shutdown(Shutdown::Write);
    }
}

/// Logs the `count`th failure of a kind; ever fewer of them, as there can be any number.
fn complain(count: u64, what: &dyn std::fmt::Display) {
    if count.is_power_of_two() {
        log::warn!("vsock: {what} (failure {count})");
    }
}
