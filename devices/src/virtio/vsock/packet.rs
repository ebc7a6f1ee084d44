//! The header of a packet (virtio 1.2 §5.10.6): plain data, read from and written to bytes.

/// Bytes of a header, in both queues.
pub const HEADER_LEN: usize = HEADER_BYTES as usize;
/// The same, as used rings count.
pub const HEADER_BYTES: u32 = 44;
/// The host's own address.
pub const HOST_CID: u64 = 2;
/// The most payload bytes of a packet, as Linux has it. The specification sets no limit.
pub const MAX_PAYLOAD: u32 = 64 << 10;

/// SHUTDOWN: the sender receives no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// SHUTDOWN: the sender sends no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// SHUTDOWN: the sender is done.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// `type` of a stream's packets, the only one that the device has.
pub const TYPE_STREAM: u16 = 1;

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Accepts one.
    Response = 2,
    /// Refuses or ends one.
    Reset = 3,
    /// Ends one or both directions.
    Shutdown = 4,
    /// Carries data.
    Data = 5,
    /// Tells the sender's buffer space.
    CreditUpdate = 6,
    /// Asks for the receiver's buffer space.
    CreditRequest = 7,
}

impl Op {
    fn from_number(number: u16) -> Option<Self> {
        use Op::{CreditRequest, CreditUpdate, Data, Request, Reset, Response, Shutdown};
        let known = [
            Request,
            Response,
            Reset,
            Shutdown,
            Data,
            CreditUpdate,
            CreditRequest,
        ];
        known.into_iter().find(|op| *op as u16 == number)
    }
}

/// The ports of a connection, which together name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ports {
    /// The host's.
    pub host: u32,
    /// The guest's.
    pub guest: u32,
}

/// A header, field by field.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    /// Address of the sender.
    pub src_cid: u64,
    /// Address of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of payload behind the header.
    pub len: u32,
    /// `type`: the kind of socket.
    pub socket_type: u16,
    /// What the packet is for; an [`Op`] when it makes sense.
    pub op: u16,
    /// Details of a SHUTDOWN.
    pub flags: u32,
    /// Bytes that the sender can hold of what it receives.
    pub buf_alloc: u32,
    /// Bytes that the sender has received and passed on, modulo 2^32.
    pub fwd_cnt: u32,
}

/// Why a packet of the guest is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformed {
    /// It says that somebody else sent it.
    Source,
    /// It is for somebody else than the host.
    Destination,
    /// It belongs to a kind of socket that the device does not have.
    SocketType,
    /// There is no such operation.
    Op,
    /// It claims more payload than it has or than a packet may have, or payload where none may be.
    Length,
}

impl Header {
    /// Reads a header.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Self {
        Self {
            src_cid: u64::from_le_bytes(field(bytes, 0)),
            dst_cid: u64::from_le_bytes(field(bytes, 8)),
            src_port: u32::from_le_bytes(field(bytes, 16)),
            dst_port: u32::from_le_bytes(field(bytes, 20)),
            len: u32::from_le_bytes(field(bytes, 24)),
            socket_type: u16::from_le_bytes(field(bytes, 28)),
            op: u16::from_le_bytes(field(bytes, 30)),
            flags: u32::from_le_bytes(field(bytes, 32)),
            buf_alloc: u32::from_le_bytes(field(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(field(bytes, 40)),
        }
    }

    /// The header as it lies in a queue.
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.socket_type.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The ports of a packet that the guest sends.
    pub fn ports(&self) -> Ports {
        Ports {
            host: self.dst_port,
            guest: self.src_port,
        }
    }

    /// Checks a packet that the guest `guest_cid` sends with `payload` bytes behind its header, and tells what it is
    /// for.
    pub fn check(&self, guest_cid: u32, payload: usize) -> Result<Op, Malformed> {
        if self.src_cid != u64::from(guest_cid) {
            return Err(Malformed::Source);
        }
        if self.dst_cid != HOST_CID {
            return Err(Malformed::Destination);
        }
        if self.socket_type != TYPE_STREAM {
            return Err(Malformed::SocketType);
        }
        let op = Op::from_number(self.op).ok_or(Malformed::Op)?;
        let limit = if op == Op::Data { MAX_PAYLOAD } else { 0 };
        let len = usize::try_from(self.len).expect("a u32 fits");
        if self.len > limit || len > payload {
            return Err(Malformed::Length);
        }
        Ok(op)
    }

    /// The RST that answers this packet (virtio 1.2 §5.10.6.4); none for an RST, or two ends could go on for ever.
    pub fn reset(&self) -> Option<Self> {
        (self.op != Op::Reset as u16).then(|| Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            socket_type: self.socket_type,
            op: Op::Reset as u16,
            ..Self::default()
        })
    }
}

fn field<const N: usize>(bytes: &[u8; HEADER_LEN], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet() -> Header {
        Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 0x0102_0304,
            dst_port: 0x0506_0708,
            len: 4,
            socket_type: TYPE_STREAM,
            op: Op::Data as u16,
            flags: 0x090a_0b0c,
            buf_alloc: 0x0d0e_0f10,
            fwd_cnt: 0x1112_1314,
        }
    }

    #[test]
    fn lays_fields_out_as_the_specification_says() {
        let bytes = packet().to_bytes();
        let expected = [
            3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 4, 3, 2, 1, 8, 7, 6, 5, 4, 0, 0, 0, 1, 0, 5, 0,
            0xc, 0xb, 0xa, 9, 0x10, 0xf, 0xe, 0xd, 0x14, 0x13, 0x12, 0x11,
        ];
        assert_eq!(bytes, expected);
        assert_eq!(Header::parse(&bytes), packet());
    }

    #[test]
    fn takes_every_operation_of_a_stream() {
        let check = |op: u16| {
            Header {
                op,
                len: 0,
                ..packet()
            }
            .check(3, 0)
        };
        let ops = [1, 2, 3, 4, 5, 6, 7].map(|op| check(op).unwrap() as u16);
        assert_eq!(ops, [1, 2, 3, 4, 5, 6, 7]);
        assert_eq!([0, 8, 0x105].map(check), [Err(Malformed::Op); 3]);
    }

    #[test]
    fn refuses_addresses_that_are_not_these_two() {
        let from = |src_cid| Header { src_cid, ..packet() }.check(3, 4);
        let to = |dst_cid| Header { dst_cid, ..packet() }.check(3, 4);
        assert_eq!([4, 2, 3 | 1 << 32].map(from), [Err(Malformed::Source); 3]);
        assert_eq!([0, 1, 3, 2 | 1 << 32].map(to), [Err(Malformed::Destination); 4]);
    }

    #[test]
    fn refuses_other_kinds_of_sockets() {
        let of = |socket_type| {
            Header {
                socket_type,
                ..packet()
            }
            .check(3, 4)
        };
        assert_eq!([0, 2, 0xffff].map(of), [Err(Malformed::SocketType); 3]);
    }

    #[test]
    fn refuses_more_payload_than_there_is_or_may_be() {
        let with = |len, there| Header { len, ..packet() }.check(3, there);
        assert_eq!(with(4, 3), Err(Malformed::Length));
        assert_eq!(with(MAX_PAYLOAD, 1 << 20), Ok(Op::Data));
        assert_eq!(with(MAX_PAYLOAD + 1, 1 << 20), Err(Malformed::Length));
        assert_eq!(with(u32::MAX, usize::MAX), Err(Malformed::Length));
    }

    #[test]
    fn refuses_payload_of_a_packet_that_carries_none() {
        let request = Header {
            op: Op::Request as u16,
            ..packet()
        };
        assert_eq!(request.check(3, 4), Err(Malformed::Length));
    }

    #[test]
    fn answers_with_a_reset_of_the_same_kind_but_no_reset_with_a_reset() {
        let seqpacket = Header {
            socket_type: 2,
            ..packet()
        };
        let reset = seqpacket.reset().unwrap();
        assert_eq!((reset.src_cid, reset.dst_cid), (2, 3));
        assert_eq!((reset.src_port, reset.dst_port), (0x0506_0708, 0x0102_0304));
        assert_eq!((reset.socket_type, reset.op, reset.len), (2, 3, 0));
        assert_eq!(reset.reset(), None);
    }
}
