//! What the guest sends.

use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd};

use super::{CONNECT_TRIES, Endpoint, Muxer, RETRY_PAUSE, Stream};
use crate::unix_socket;
use crate::virtio::Buffers;
use crate::virtio::vsock::connection::{Connection, Event, Phase};
use crate::virtio::vsock::host;
use crate::virtio::vsock::packet::{HEADER_LEN, Header, Malformed, Op};

impl Muxer {
    /// Takes one packet: a header and its payload.
    pub(in crate::virtio::vsock) fn on_packet(&mut self, packet: &mut Buffers<'_>) {
        let mut bytes = [0; HEADER_LEN];
        if packet.read(0, &mut bytes) < HEADER_LEN {
            self.metrics.tx_queue_event_fails += 1;
            return;
        }
        let header = Header::parse(&bytes);
        packet.advance(HEADER_LEN);
        match header.check(self.guest_cid, packet.len()) {
            Ok(op) => {
                packet.truncate(usize::try_from(header.len).expect("checked against the payload"));
                self.metrics.tx_packets_count += 1;
                self.on_sound_packet(op, &header, packet);
            }
            Err(malformed) => self.on_malformed(malformed, &header),
        }
    }

    fn on_malformed(&mut self, malformed: Malformed, header: &Header) {
        self.metrics.tx_queue_event_fails += 1;
        match malformed {
            // Nobody can be told.
            Malformed::Source | Malformed::Op => {}
            Malformed::Destination | Malformed::SocketType => self.resets.extend(header.reset()),
            Malformed::Length => match self.ports.get(&header.ports()) {
                Some(slot) => self.kill(*slot),
                None => self.resets.extend(header.reset()),
            },
        }
    }

    fn on_sound_packet(&mut self, op: Op, header: &Header, payload: &Buffers<'_>) {
        let Some(slot) = self.ports.get(&header.ports()).copied() else {
            if op == Op::Request {
                self.open(header);
            } else {
                self.resets.extend(header.reset());
            }
            return;
        };
        let Some(stream) = self.stream(slot) else { return };
        if op == Op::Request && stream.connection.phase() == Phase::Closing {
            // The guest has forgotten the old connection, and uses its port again.
            self.remove(slot);
            return self.open(header);
        }
        match stream.connection.on_packet(op, header) {
            Event::Updated | Event::Shutdown => {}
            Event::Accepted => {
                self.clear_deadline(slot);
                self.greet(slot);
            }
            Event::Data => {
                if !self.on_data(slot, payload) {
                    return self.kill(slot);
                }
            }
            Event::Ended => return self.remove(slot),
            Event::Violated => return self.kill(slot),
        }
        self.settle(slot);
        self.schedule(slot);
    }

    /// Passes payload on; false when the guest had no credit for it.
    fn on_data(&mut self, slot: u32, payload: &Buffers<'_>) -> bool {
        let Some(Endpoint::Stream(stream)) = self.slots.get_mut(slot) else {
            return true;
        };
        let len = u32::try_from(payload.len()).expect("at most MAX_PAYLOAD");
        if !stream.connection.receive(len) {
            return false;
        }
        self.metrics.tx_bytes_count += u64::from(len);
        let (mut taken, mut shortage) = (0, false);
        match &stream.socket {
            Some(socket) if !stream.connection.host_refuses() => {
                if stream.pending.is_empty() && len > 0 {
                    match payload.send(socket.as_fd()) {
                        Ok(count) => taken = count,
                        Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                        Err(error) if host::is_shortage(&error) => shortage = true,
                        Err(_) => {
                            self.metrics.tx_write_fails += 1;
                            stream.refuse(&mut self.spare);
                            taken = payload.len();
                        }
                    }
                }
            }
            _ => taken = payload.len(),
        }
        stream
            .connection
            .forward(u32::try_from(taken).expect("at most MAX_PAYLOAD"));
        if taken < payload.len() {
            stream.pending.push(payload, taken, &mut self.spare);
            self.await_room(slot, true);
        }
        if shortage {
            self.set_deadline(slot, RETRY_PAUSE);
        }
        true
    }

    /// Serves the guest's request for a connection.
    fn open(&mut self, request: &Header) {
        let refusal = request.reset();
        let stream = Stream::new(Connection::to_host(request), None);
        let Ok(slot) = self.slots.insert(Endpoint::Stream(Box::new(stream))) else {
            self.metrics.muxer_event_fails += 1;
            log::debug!(
                "vsock: no room for the guest's connection to port {}",
                request.dst_port
            );
            return self.resets.extend(refusal);
        };
        self.register(slot, request.ports());
        self.connect_again(slot);
    }

    /// Connects to the host program that the guest wants, or sets a time to try again when it has no room.
    pub(super) fn connect_again(&mut self, slot: u32) {
        let Some(stream) = self.stream(slot) else { return };
        stream.tries += 1;
        let (port, tries) = (stream.connection.ports.host, stream.tries);
        let connected = unix_socket::connect(&self.listener.path_of(port));
        match connected.and_then(|socket| self.watch(socket.as_raw_fd(), slot).map(|()| socket)) {
            Ok(socket) => {
                let Some(stream) = self.stream(slot) else { return };
                stream.socket = Some(socket);
                stream.connection.accept();
                self.schedule(slot);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock && tries < CONNECT_TRIES => {
                self.set_deadline(slot, RETRY_PAUSE);
            }
            Err(error) => {
                self.metrics.muxer_event_fails += 1;
                log::debug!("vsock: the guest's connection to port {port} finds nobody: {error}");
                self.kill(slot);
            }
        }
    }
}
