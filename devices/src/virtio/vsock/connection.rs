//! One connection as the protocol sees it: its phase, the credit of both ends, and which packets the guest is due
//! (virtio 1.2 §5.10.6). Plain state: sockets and queues are the muxer's.

use super::packet::{
    HOST_CID, Header, Op, Ports, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};

/// Bytes that the device holds for a host program that does not read. The guest may send that much ahead.
pub const BUF_ALLOC: u32 = 256 << 10;
/// How much of it was passed on when the guest is told, if no other packet tells it before.
const CREDIT_STEP: u32 = BUF_ALLOC / 2;

/// Where a connection stands.
///
/// ```text
/// host asks ──► Requested ──RESPONSE──► Established ──► Closing ──RST or time-out──► gone
/// guest asks ─► Connecting ──accepted──────▲  └──► Draining ──all written──► gone
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// The guest has not answered a host program's request.
    Requested,
    /// The host program has no room yet for the guest's request.
    Connecting,
    /// Data moves.
    Established,
    /// The host is done with it, and the guest was asked to end it.
    Closing,
    /// The guest is done with it and has forgotten it; the host program has not read everything.
    Draining,
}

/// What a packet of the guest asks of the muxer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// Nothing but what [`Connection::next_packet`] and [`Connection::may_send`] tell.
    Updated,
    /// The guest has accepted: the host program is to be told.
    Accepted,
    /// Payload came.
    Data,
    /// The guest closed one or both directions.
    Shutdown,
    /// The guest has ended the connection.
    Ended,
    /// The packet has no place here: the connection is to be reset.
    Violated,
}

/// The state of one connection.
#[derive(Debug)]
pub(super) struct Connection {
    /// Its name.
    pub(super) ports: Ports,
    phase: Phase,
    credit: Credit,
    /// SHUTDOWN flags that the guest sent.
    guest_closed: u32,
    /// SHUTDOWN flags of the host's end.
    host_closed: u32,
    /// Those of which the guest knows.
    told_closed: u32,
    due: Due,
}

/// Packets that the guest is to get, beside data.
#[derive(Debug, Default)]
struct Due {
    request: bool,
    response: bool,
    credit: bool,
    credit_request: bool,
    /// The guest was asked for its credit and has none to give.
    asked: bool,
}

/// Both directions' counters, modulo 2^32 (virtio 1.2 §5.10.6.3).
#[derive(Debug, Default)]
struct Credit {
    /// What the guest can hold, as it said last.
    guest_buf_alloc: u32,
    /// What the guest has passed on to its program, as it said last.
    guest_fwd_cnt: u32,
    /// Bytes sent to the guest.
    sent: u32,
    /// Bytes received from the guest.
    received: u32,
    /// Those that the host program's socket has taken.
    forwarded: u32,
    /// `forwarded` as the guest knows it.
    told: u32,
}

impl Credit {
    /// Bytes that the guest can take. A guest that contradicts itself gets nothing, or more than it can hold.
    fn free(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.guest_fwd_cnt);
        self.guest_buf_alloc.saturating_sub(in_flight)
    }

    fn held(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }
}

impl Connection {
    /// A host program asks for the guest's port.
    pub(super) fn to_guest(ports: Ports) -> Self {
        let mut connection = Self::new(ports, Phase::Requested);
        connection.due.request = true;
        connection
    }

    /// The guest asks, with the packet `request`, for a port of the host.
    pub(super) fn to_host(request: &Header) -> Self {
        let mut connection = Self::new(request.ports(), Phase::Connecting);
        connection.take_credit(request);
        connection
    }

    fn new(ports: Ports, phase: Phase) -> Self {
        Self {
            ports,
            phase,
            credit: Credit::default(),
            guest_closed: 0,
            host_closed: 0,
            told_closed: 0,
            due: Due::default(),
        }
    }

    /// Where it stands.
    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    /// The host program has accepted the guest's request.
    pub(super) fn accept(&mut self) {
        self.phase = Phase::Established;
        self.due.response = true;
    }

    /// Takes the header of a packet that the guest sent for it.
    pub(super) fn on_packet(&mut self, op: Op, header: &Header) -> Event {
        if op == Op::Reset {
            return Event::Ended;
        }
        self.take_credit(header);
        match (self.phase, op) {
            (Phase::Requested, Op::Response) => {
                self.phase = Phase::Established;
                Event::Accepted
            }
            (Phase::Requested | Phase::Connecting | Phase::Draining, _)
            | (_, Op::Request | Op::Response | Op::Reset) => Event::Violated,
            (_, Op::CreditUpdate) => Event::Updated,
            (_, Op::CreditRequest) => {
                self.due.credit = true;
                Event::Updated
            }
            (_, Op::Shutdown) => {
                self.guest_closed |= header.flags & SHUTDOWN_BOTH;
                Event::Shutdown
            }
            (_, Op::Data) if self.guest_closed & SHUTDOWN_SEND != 0 => Event::Violated,
            (_, Op::Data) => Event::Data,
        }
    }

    fn take_credit(&mut self, header: &Header) {
        self.credit.guest_buf_alloc = header.buf_alloc;
        self.credit.guest_fwd_cnt = header.fwd_cnt;
        if self.credit.free() > 0 {
            self.due.asked = false;
        }
    }

    /// Counts payload that came; false when the guest had no credit for it.
    pub(super) fn receive(&mut self, bytes: u32) -> bool {
        if bytes > BUF_ALLOC - self.credit.held() {
            return false;
        }
        self.credit.received = self.credit.received.wrapping_add(bytes);
        true
    }

    /// Counts payload that has left for the host program, or was thrown away as that is gone.
    pub(super) fn forward(&mut self, bytes: u32) {
        self.credit.forwarded = self.credit.forwarded.wrapping_add(bytes);
    }

    /// Bytes that may be sent to the guest now.
    pub(super) fn may_send(&self) -> u32 {
        if self.phase == Phase::Established && !self.is_closed_to_guest() {
            return self.credit.free();
        }
        0
    }

    /// Counts payload sent to the guest.
    pub(super) fn sent(&mut self, bytes: u32) {
        self.credit.sent = self.credit.sent.wrapping_add(bytes);
    }

    /// There is data for the guest, and no credit: asks for it, once until there is some.
    pub(super) fn ask_for_credit(&mut self) {
        let starved = self.phase == Phase::Established && !self.is_closed_to_guest();
        if starved && !std::mem::replace(&mut self.due.asked, true) {
            self.due.credit_request = true;
        }
    }

    /// The host program sends no more (`SHUTDOWN_SEND`), or receives no more (`SHUTDOWN_RECEIVE`).
    pub(super) fn close_host(&mut self, flags: u32) {
        self.host_closed |= flags;
    }

    /// The host has closed its end wholly: what remains is that the guest does.
    pub(super) fn finish(&mut self) {
        self.phase = Phase::Closing;
        self.host_closed = SHUTDOWN_BOTH;
    }

    /// The guest has closed its end wholly; only its data is left to be passed on.
    pub(super) fn drain(&mut self) {
        self.phase = Phase::Draining;
        self.due = Due::default();
    }

    /// Nothing moves towards the guest any more.
    pub(super) fn is_closed_to_guest(&self) -> bool {
        self.host_closed & SHUTDOWN_SEND != 0 || self.guest_closed & SHUTDOWN_RECEIVE != 0
    }

    /// The guest receives no more.
    pub(super) fn guest_refuses(&self) -> bool {
        self.guest_closed & SHUTDOWN_RECEIVE != 0
    }

    /// The guest sends no more.
    pub(super) fn guest_is_silent(&self) -> bool {
        self.guest_closed & SHUTDOWN_SEND != 0
    }

    /// The host program receives no more: the guest's data is thrown away.
    pub(super) fn host_refuses(&self) -> bool {
        self.host_closed & SHUTDOWN_RECEIVE != 0
    }

    /// The guest is done with the connection.
    pub(super) fn guest_is_done(&self) -> bool {
        self.guest_closed == SHUTDOWN_BOTH
    }

    /// Whether [`Connection::next_packet`] has something.
    pub(super) fn has_packet(&self) -> bool {
        let Due {
            request,
            response,
            credit,
            credit_request,
            ..
        } = self.due;
        request || response || credit || credit_request || self.shutdown_is_due() || self.credit_is_due()
    }

    /// The next packet without payload that the guest, `guest_cid`, is to get. It counts as sent.
    pub(super) fn next_packet(&mut self, guest_cid: u32) -> Option<Header> {
        let take = std::mem::take;
        let op = if take(&mut self.due.request) {
            Op::Request
        } else if take(&mut self.due.response) {
            Op::Response
        } else if self.shutdown_is_due() {
            self.told_closed = self.host_closed;
            Op::Shutdown
        } else if take(&mut self.due.credit_request) {
            Op::CreditRequest
        } else if self.due.credit || self.credit_is_due() {
            Op::CreditUpdate
        } else {
            return None;
        };
        let flags = if op == Op::Shutdown { self.host_closed } else { 0 };
        Some(Header {
            op: op as u16,
            flags,
            ..self.data_header(guest_cid)
        })
    }

    /// The header of a packet with data, whose `len` is to be set. It counts as sent: the guest then knows the credit.
    pub(super) fn data_header(&mut self, guest_cid: u32) -> Header {
        self.due.credit = false;
        self.credit.told = self.credit.forwarded;
        Header {
            op: Op::Data as u16,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.credit.forwarded,
            ..header(self.ports, guest_cid)
        }
    }

    /// The RST that ends it.
    pub(super) fn reset_packet(&self, guest_cid: u32) -> Header {
        Header {
            op: Op::Reset as u16,
            ..header(self.ports, guest_cid)
        }
    }

    fn shutdown_is_due(&self) -> bool {
        let speaking = matches!(self.phase, Phase::Established | Phase::Closing);
        speaking && self.host_closed != self.told_closed
    }

    fn credit_is_due(&self) -> bool {
        let news = self.credit.forwarded.wrapping_sub(self.credit.told);
        self.phase == Phase::Established && news >= CREDIT_STEP && !self.guest_is_silent()
    }
}

fn header(ports: Ports, guest_cid: u32) -> Header {
    Header {
        src_cid: HOST_CID,
        dst_cid: guest_cid.into(),
        src_port: ports.host,
        dst_port: ports.guest,
        socket_type: TYPE_STREAM,
        ..Header::default()
    }
}
