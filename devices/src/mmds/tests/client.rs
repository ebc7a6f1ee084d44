//! A guest's end of the link, frame by frame: it sends what a test says, and looks closely at what comes.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use super::super::{DEFAULT_ADDRESS, MAC, Mmds, Now, Stack};

pub(crate) const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
pub(crate) const GUEST_MAC: [u8; 6] = [0x06, 0, 0, 0, 0, 2];
pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const PSH: u8 = 8;
pub(crate) const ACK: u8 = 16;
/// Sequence number of the first SYN.
const START: u32 = 0xffff_fff0;
/// The MSS that a client announces.
pub(crate) const MSS: u16 = 1000;

/// An ARP packet of the guest.
pub(crate) fn arp(operation: u8, sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let parts: [&[u8]; 8] = [
        &[0xff; 6],
        &GUEST_MAC,
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, operation],
        &GUEST_MAC,
        &sender.octets(),
        &[0; 6],
        &target.octets(),
        &[],
    ];
    parts.concat()
}

/// A TCP segment of the guest, from one port to another with (sequence, acknowledgement). As with a virtio driver that
/// leaves checksums to the device, the one of TCP is none.
pub(crate) fn tcp(to: u16, from: u16, (seq, ack): (u32, u32), flags: u8, data: &[u8]) -> Vec<u8> {
    let [high, low] = MSS.to_be_bytes();
    let options: &[u8] = match flags & SYN {
        0 => &[],
        _ => &[2, 4, high, low],
    };
    let header_len = u8::try_from(20 + options.len()).unwrap();
    let total = 20 + u16::from(header_len) + u16::try_from(data.len()).unwrap();
    let mut ip = vec![0x45, 0];
    ip.extend_from_slice(&total.to_be_bytes());
    ip.extend_from_slice(&[0, 0, 0x40, 0, 64, 6, 0, 0]);
    ip.extend_from_slice(&ADDRESS.octets());
    ip.extend_from_slice(&DEFAULT_ADDRESS.octets());
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut frame = [&MAC[..], &GUEST_MAC, &[8, 0], &ip].concat();
    frame.extend_from_slice(&from.to_be_bytes());
    frame.extend_from_slice(&to.to_be_bytes());
    frame.extend_from_slice(&seq.to_be_bytes());
    frame.extend_from_slice(&ack.to_be_bytes());
    frame.extend_from_slice(&[header_len << 2, flags, 0xff, 0xff, 0, 0, 0, 0]);
    frame.extend_from_slice(options);
    frame.extend_from_slice(data);
    frame
}

/// The internet checksum (RFC 1071); zero over data that holds its own.
fn checksum(data: &[u8]) -> u16 {
    let words = data
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap()
}

/// A segment from the service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) to: u16,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: u8,
    pub(crate) data: Vec<u8>,
}

impl Segment {
    /// Reads a frame, whose every header must be right.
    fn parse(frame: &[u8]) -> Self {
        assert_eq!(
            (&frame[..6], &frame[6..14]),
            (&GUEST_MAC[..], &[&MAC[..], &[8, 0]].concat()[..])
        );
        let ip = &frame[14..];
        let total = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
        assert_eq!((ip[0], total, checksum(&ip[..20])), (0x45, ip.len(), 0));
        assert_eq!(
            (&ip[12..16], &ip[16..20]),
            (&DEFAULT_ADDRESS.octets()[..], &ADDRESS.octets()[..])
        );
        let segment = &ip[20..];
        let len = u16::try_from(segment.len()).unwrap().to_be_bytes();
        assert_eq!(checksum(&[&ip[12..20], &[0, 6], &len, segment].concat()), 0);
        assert_eq!(segment[..2], 80u16.to_be_bytes());
        let word = |at: usize| u32::from_be_bytes(segment[at..at + 4].try_into().unwrap());
        Self {
            to: u16::from_be_bytes([segment[2], segment[3]]),
            seq: word(4),
            ack: word(8),
            flags: segment[13],
            data: segment[usize::from(segment[12] >> 4) * 4..].to_vec(),
        }
    }
}

/// The link to a guest.
pub(crate) struct Link {
    pub(crate) stack: Stack,
    pub(crate) mmds: Arc<Mmds>,
    pub(crate) now: Duration,
}

impl Link {
    pub(crate) fn new(mmds: Mmds) -> Self {
        let (mmds, now) = (Arc::new(mmds), Duration::from_secs(5));
        Self {
            stack: Stack::new(Arc::clone(&mmds), 42, now),
            mmds,
            now,
        }
    }

    pub(crate) fn send(&mut self, frame: &[u8]) {
        self.stack.receive(frame, self.time());
    }

    /// All frames that wait.
    pub(crate) fn frames(&mut self) -> Vec<Vec<u8>> {
        let now = self.time();
        std::iter::from_fn(|| self.stack.take_frame(now)).collect()
    }

    pub(crate) fn segments(&mut self) -> Vec<Segment> {
        self.frames().iter().map(|frame| Segment::parse(frame)).collect()
    }

    /// Lets time pass until the stack has something to do, and lets it.
    pub(crate) fn wait(&mut self) {
        let delay = self.stack.next_work(self.now).expect("something is due");
        self.pass(delay);
    }

    /// Lets time pass, and the stack do what is due then.
    pub(crate) fn pass(&mut self, time: Duration) {
        self.now += time;
        self.stack.work(self.time());
    }

    fn time(&self) -> Now {
        Now {
            interface: self.now,
            tokens: self.now,
        }
    }

    /// Opens a connection from this port.
    pub(crate) fn connect(&mut self, port: u16) -> Peer {
        self.send(&tcp(80, port, (START, 0), SYN, b""));
        let answer = self.segments();
        assert_eq!(answer.len(), 1, "{answer:?}");
        assert_eq!(
            (answer[0].flags, answer[0].ack),
            (SYN | ACK, START.wrapping_add(1))
        );
        let mut peer = Peer {
            port,
            seq: START.wrapping_add(1),
            ack: answer[0].seq.wrapping_add(1),
        };
        peer.say(self, ACK, b"");
        peer
    }
}

/// The guest's end of a connection.
#[derive(Clone)]
pub(crate) struct Peer {
    pub(crate) port: u16,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
}

impl Peer {
    /// Sends a segment with these flags.
    pub(crate) fn say(&mut self, link: &mut Link, flags: u8, data: &[u8]) {
        link.send(&tcp(80, self.port, (self.seq, self.ack), flags, data));
        let sent = u32::try_from(data.len()).unwrap() + u32::from(flags & FIN);
        self.seq = self.seq.wrapping_add(sent);
    }

    /// Takes and acknowledges what comes in order, until nothing more does. Returns the data, and whether the service
    /// has ended its side.
    pub(crate) fn hear(&mut self, link: &mut Link) -> (Vec<u8>, bool) {
        let (mut data, mut ended) = (Vec::new(), false);
        loop {
            let segments = link.segments();
            if segments.is_empty() {
                return (data, ended);
            }
            for segment in segments {
                assert_eq!((segment.to, segment.flags & RST), (self.port, 0));
                if segment.seq == self.ack {
                    self.ack = self.ack.wrapping_add(u32::try_from(segment.data.len()).unwrap());
                    data.extend(segment.data);
                    if segment.flags & FIN != 0 {
                        self.ack = self.ack.wrapping_add(1);
                        ended = true;
                    }
                }
            }
            self.say(link, ACK, b"");
        }
    }

    /// Asks, and hears the answer as text.
    pub(crate) fn ask(&mut self, link: &mut Link, request: &str) -> String {
        self.say(link, ACK | PSH, request.as_bytes());
        String::from_utf8(self.hear(link).0).unwrap()
    }
}
