//! What the host's programs do.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};

use super::{
    Endpoint, FIRST_HOST_PORT, LISTENER, MAX_CONNECTIONS, Muxer, RETRY_PAUSE, Stream, TIMER, complain,
};
use crate::virtio::Buffers;
use crate::virtio::vsock::Progress;
use crate::virtio::vsock::connection::{Connection, Phase};
use crate::virtio::vsock::host::{self, Greeting};
use crate::virtio::vsock::packet::Ports;

/// Events taken in one turn.
const BATCH: usize = 64;
/// Programs accepted in one turn.
const ACCEPTS: usize = 64;

impl Muxer {
    /// Takes what became ready since the last call, at most a turn's worth.
    pub(in crate::virtio::vsock) fn poll(&mut self) -> io::Result<Progress> {
        let mut events = [EpollEvent::default(); BATCH];
        let count = match self.epoll.wait(0, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(Progress::More),
            Err(error) => return Err(error),
        };
        for event in &events[..count] {
            match event.data() {
                LISTENER => self.accept_due = true,
                TIMER => self.expire(Instant::now()),
                slot => {
                    if let Ok(slot) = u32::try_from(slot) {
                        self.on_socket(slot, event.events());
                    }
                }
            }
        }
        Ok(if count == BATCH {
            Progress::More
        } else {
            Progress::Done
        })
    }

    /// Accepts the programs that wait, at most a turn's worth.
    pub(in crate::virtio::vsock) fn accept(&mut self) -> Progress {
        if !self.accept_due {
            return Progress::Done;
        }
        for _ in 0..ACCEPTS {
            match self.listener.accept() {
                Ok(Some(socket)) => self.add_client(socket),
                Ok(None) => {
                    self.accept_due = false;
                    return Progress::Done;
                }
                Err(error) => {
                    // It waits until something else happens: by then a descriptor may be free.
                    self.metrics.muxer_event_fails += 1;
                    let what = format_args!("cannot accept a host program: {error}");
                    complain(self.metrics.muxer_event_fails, &what);
                    return Progress::Done;
                }
            }
        }
        Progress::More
    }

    /// Waits for the program's line. When the table is full, it sees its connection closed at once.
    fn add_client(&mut self, socket: UnixStream) {
        let fd = socket.as_raw_fd();
        let Ok(slot) = self.slots.insert(Endpoint::Client(socket)) else {
            self.metrics.muxer_event_fails += 1;
            let what =
                format_args!("a host program was turned away, as there are {MAX_CONNECTIONS} connections");
            return complain(self.metrics.muxer_event_fails, &what);
        };
        if let Err(error) = self.watch(fd, slot) {
            log::warn!("vsock: cannot watch a host program: {error}");
            self.slots.remove(slot);
            return;
        }
        // Mostly it has said its line already.
        self.on_socket(slot, EventSet::IN.bits());
    }

    /// Hears of a socket's readiness from now on.
    pub(super) fn watch(&self, fd: RawFd, slot: u32) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, slot.into());
        self.epoll.ctl(ControlOperation::Add, fd, event)
    }

    /// Hears, or hears no more, when the socket takes data again.
    pub(super) fn await_room(&mut self, slot: u32, wanted: bool) {
        let Some(Endpoint::Stream(stream)) = self.slots.get_mut(slot) else {
            return;
        };
        let Some(socket) = &stream.socket else { return };
        if stream.awaits_room == wanted {
            return;
        }
        stream.awaits_room = wanted;
        let room = if wanted { EventSet::OUT } else { EventSet::empty() };
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED | room;
        let event = EpollEvent::new(events, slot.into());
        let changed = self
            .epoll
            .ctl(ControlOperation::Modify, socket.as_raw_fd(), event);
        changed.expect("the socket is open and watched");
    }

    fn on_socket(&mut self, slot: u32, events: u32) {
        if let Some(Endpoint::Client(socket)) = self.slots.get_mut(slot) {
            match host::greeting(socket) {
                Greeting::Incomplete => return,
                Greeting::Port(port) => self.request(slot, port),
                Greeting::Unusable => {
                    self.metrics.conn_event_fails += 1;
                    self.slots.remove(slot);
                    return;
                }
            }
        }
        let Some(Endpoint::Stream(stream)) = self.slots.get_mut(slot) else {
            // Removed earlier in this batch.
            return;
        };
        stream.readable |= events != EventSet::OUT.bits();
        if has(events, EventSet::HANG_UP | EventSet::ERROR) {
            stream.refuse(&mut self.spare);
            if stream.connection.phase() == Phase::Requested {
                return self.kill(slot);
            }
        }
        if has(events, EventSet::OUT) {
            self.flush(slot);
        }
        self.settle(slot);
        self.schedule(slot);
    }

    /// Asks the guest for the port that a program wants.
    fn request(&mut self, slot: u32, port: u32) {
        let ports = self.free_ports(port);
        self.slots.change(slot, |endpoint| match endpoint {
            Endpoint::Client(socket) => {
                let stream = Stream::new(Connection::to_guest(ports), Some(socket));
                Endpoint::Stream(Box::new(stream))
            }
            stream @ Endpoint::Stream(_) => stream,
        });
        self.register(slot, ports);
    }

    /// A port of the host that no other connection to the guest's port has.
    fn free_ports(&mut self, guest: u32) -> Ports {
        loop {
            let host = self.next_port;
            self.next_port = host.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            let ports = Ports { host, guest };
            if host != u32::MAX && !self.ports.contains_key(&ports) {
                return ports;
            }
        }
    }

    /// Tells a program that the guest has accepted.
    pub(super) fn greet(&mut self, slot: u32) {
        let Some(stream) = self.stream(slot) else { return };
        let mut line = format!("OK {}\n", stream.connection.ports.host).into_bytes();
        let mut bytes = Buffers::new();
        bytes.push(&VolatileSlice::from(&mut line[..]));
        if let Some(socket) = &stream.socket {
            // The first bytes always find room. A program that has left is noticed by its event.
            let _ = bytes.send(socket.as_fd());
        }
    }

    /// Writes what waits for a program, as far as it takes it.
    fn flush(&mut self, slot: u32) {
        let Some(Endpoint::Stream(stream)) = self.slots.get_mut(slot) else {
            return;
        };
        let Some(socket) = &stream.socket else { return };
        if stream.pending.is_empty() {
            return;
        }
        match stream.pending.flush(socket, &mut self.spare) {
            Ok(count) => stream
                .connection
                .forward(u32::try_from(count).expect("at most a ring")),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) if host::is_shortage(&error) => self.set_deadline(slot, RETRY_PAUSE),
            Err(_) => {
                self.metrics.tx_flush_fails += 1;
                stream.refuse(&mut self.spare);
            }
        }
        if self.stream(slot).is_some_and(|stream| stream.pending.is_empty()) {
            self.await_room(slot, false);
        }
    }

    /// Writes what the host had no memory for.
    pub(super) fn flush_again(&mut self, slot: u32) {
        self.flush(slot);
        self.settle(slot);
        self.schedule(slot);
    }
}

fn has(events: u32, wanted: EventSet) -> bool {
    events & wanted.bits() != 0
}
