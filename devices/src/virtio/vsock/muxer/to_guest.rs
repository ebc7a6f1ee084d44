//! What the guest receives.

use std::io::ErrorKind;
use std::os::fd::AsFd;

use super::{Endpoint, Muxer, REQUEST_TIMEOUT};
use crate::virtio::QueueError;
use crate::virtio::vsock::Progress;
use crate::virtio::vsock::connection::Phase;
use crate::virtio::vsock::packet::{MAX_PAYLOAD, SHUTDOWN_SEND};
use crate::virtio::vsock::room::Room;

/// Turns of connections in one turn of the device.
const TURN: usize = 64;
/// What a read asks for at least, and at most: then it is another connection's turn.
pub(super) const MIN_READ: usize = 4096;
const MAX_READ: usize = MAX_PAYLOAD as usize;

impl Muxer {
    /// Fills the guest's buffers, one connection after the other, for at most a turn.
    pub(in crate::virtio::vsock) fn fill(
        &mut self,
        room: &mut Room<'_, '_, '_>,
    ) -> Result<Progress, QueueError> {
        for _ in 0..TURN {
            if !self.has_output() {
                return Ok(Progress::Done);
            }
            if !room.gather(1)? {
                if room.await_more()? {
                    continue;
                }
                return Ok(Progress::Done);
            }
            if let Some(reset) = self.resets.pop_front() {
                room.put(reset);
                self.metrics.rx_packets_count += 1;
            } else if let Some(slot) = self.ready.pop_front() {
                self.is_ready[slot as usize] = false;
                self.visit(slot, room)?;
                room.publish();
            }
        }
        Ok(Progress::More)
    }

    /// Gives the guest one packet of a connection, or what one read of its socket brings.
    fn visit(&mut self, slot: u32, room: &mut Room<'_, '_, '_>) -> Result<(), QueueError> {
        let guest_cid = self.guest_cid;
        let Some(stream) = self.stream(slot) else {
            return Ok(());
        };
        if let Some(header) = stream.connection.next_packet(guest_cid) {
            // Before its answer the guest gets nothing but the request.
            let is_request = stream.connection.phase() == Phase::Requested;
            room.put(header);
            self.metrics.rx_packets_count += 1;
            if is_request {
                self.set_deadline(slot, REQUEST_TIMEOUT);
            }
            self.schedule(slot);
            return Ok(());
        }
        if !stream.readable {
            return Ok(());
        }
        let credit = usize::try_from(stream.connection.may_send()).expect("a u32 fits");
        if credit == 0 {
            stream.connection.ask_for_credit();
            if stream.connection.has_packet() {
                self.schedule(slot);
            }
            return Ok(());
        }
        let limit = credit.min(stream.appetite);
        room.gather(limit)?;
        self.read(slot, limit, room);
        Ok(())
    }

    /// Moves up to `limit` bytes from a socket to the guest.
    fn read(&mut self, slot: u32, limit: usize, room: &mut Room<'_, '_, '_>) {
        let guest_cid = self.guest_cid;
        let Some(Endpoint::Stream(stream)) = self.slots.get_mut(slot) else {
            return;
        };
        let Some(socket) = &stream.socket else { return };
        match room.read(socket.as_fd(), limit) {
            Ok(0) => {
                stream.readable = false;
                stream.connection.close_host(SHUTDOWN_SEND);
                self.settle(slot);
            }
            Ok(len) => {
                let packets = room.deliver(len, stream.connection.data_header(guest_cid));
                stream
                    .connection
                    .sent(u32::try_from(len).expect("at most MAX_READ"));
                // Follows more data at once, and less slowly.
                stream.appetite = match len == limit {
                    true => (2 * limit).clamp(stream.appetite, MAX_READ),
                    false => len.max(stream.appetite - stream.appetite / 4).max(MIN_READ),
                };
                self.metrics.rx_packets_count += packets;
                self.metrics.rx_bytes_count += len as u64;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => stream.readable = false,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => {
                self.metrics.rx_read_fails += 1;
                self.kill(slot);
            }
        }
        self.schedule(slot);
    }
}
