//! Ethernet and ARP, and what is let into the TCP stack: frames are checked here, by fields of fixed place, before code
//! that is not ours reads what a hostile guest wrote.

use std::net::Ipv4Addr;

/// The service's Ethernet address, locally administered.
pub const MAC: [u8; 6] = [0x02, 0x4d, 0x4d, 0x44, 0x53, 0x01];
/// Bytes at the beginning of a frame that [`is_for`] looks at.
pub const HEAD_LEN: usize = 42;
/// Length of an Ethernet header.
pub(super) const ETHERNET_LEN: usize = 14;
const ETHERTYPE_IPV4: &[u8] = &[0x08, 0x00];
const ETHERTYPE_ARP: &[u8] = &[0x08, 0x06];
/// Hardware Ethernet, protocol IPv4, the lengths of their addresses, and the operation (RFC 826).
const ARP_REQUEST: &[u8] = &[0, 1, 8, 0, 6, 4, 0, 1];
const ARP_REPLY: &[u8] = &[0, 1, 8, 0, 6, 4, 0, 2];
const ARP_LEN: usize = 28;
const PROTOCOL_TCP: u8 = 6;
const FIN_SYN_RST_ACK: u8 = 0x17;
const SYN: u8 = 0x02;

/// Whether a frame is the service's: ARP about `address`, or an IPv4 packet to it through whatever router the guest has
/// chosen. Frames with a VLAN tag belong to another network.
pub fn is_for(address: Ipv4Addr, frame: &[u8]) -> bool {
    let target = match frame.get(12..14) {
        Some(ETHERTYPE_IPV4) => frame.get(30..34),
        Some(ETHERTYPE_ARP) => frame.get(38..42),
        _ => None,
    };
    target == Some(&address.octets())
}

/// What a frame is to the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A request for the service's Ethernet address.
    ArpRequest,
    /// A whole TCP segment from `peer` to `port`.
    Tcp {
        peer: (Ipv4Addr, u16),
        port: u16,
        /// It asks for a new connection.
        opens: bool,
    },
    /// Well-formed as far as was looked, but nothing that is served.
    Unserved,
    /// The lengths or addresses in it make no sense.
    Malformed,
}

/// Looks at a whole frame.
pub(super) fn inspect(address: Ipv4Addr, frame: &[u8]) -> Kind {
    // The guest may have changed it since the first look.
    let is_group = |mac: [u8; 6]| mac[0] & 1 != 0;
    if !is_for(address, frame) || is_group(sender(frame)) {
        return Kind::Malformed;
    }
    let (header, payload) = frame.split_at(ETHERNET_LEN);
    if !header.ends_with(ETHERTYPE_ARP) {
        return ipv4(payload).unwrap_or(Kind::Malformed);
    }
    match payload.get(..ARP_REQUEST.len()) {
        _ if payload.len() < ARP_LEN => Kind::Malformed,
        Some(ARP_REQUEST) => Kind::ArpRequest,
        _ => Kind::Unserved,
    }
}

/// The Ethernet address that sent a frame; zero when there is none.
pub(super) fn sender(frame: &[u8]) -> [u8; 6] {
    let bytes = frame.get(6..).and_then(<[u8]>::first_chunk);
    bytes.copied().unwrap_or_default()
}

/// The answer to a frame that is an ARP request: `address` is at [`MAC`].
pub(super) fn arp_reply(address: Ipv4Addr, request: &[u8]) -> Vec<u8> {
    let asker = &request[22..32];
    let mut frame = ethernet_header(sender(request), ETHERTYPE_ARP);
    for part in [ARP_REPLY, &MAC, &address.octets(), asker] {
        frame.extend_from_slice(part);
    }
    frame
}

/// A frame around an IPv4 packet for the station `to`.
pub(super) fn ipv4_frame(to: [u8; 6], packet: &[u8]) -> Vec<u8> {
    let mut frame = ethernet_header(to, ETHERTYPE_IPV4);
    frame.extend_from_slice(packet);
    frame
}

/// The destination of an IPv4 packet.
pub(super) fn destination(packet: &[u8]) -> Option<Ipv4Addr> {
    let bytes: [u8; 4] = *packet.get(16..)?.first_chunk()?;
    Some(bytes.into())
}

fn ethernet_header(to: [u8; 6], ethertype: &[u8]) -> Vec<u8> {
    [&to, &MAC, ethertype].concat()
}

/// Looks at an IPv4 packet (RFC 791 §3.1); none when it is malformed.
fn ipv4(packet: &[u8]) -> Option<Kind> {
    let header_len = usize::from(packet.first()? & 0x0f) * 4;
    let total_len = usize::from(be16(packet, 2)?);
    let version = packet.first()? >> 4;
    if version != 4 || header_len < 20 || total_len < header_len || packet.len() < total_len {
        return None;
    }
    let source: [u8; 4] = *packet.get(12..)?.first_chunk()?;
    // Nobody can be answered at such a source.
    if source[0] == 0 || source[0] >= 224 || Some(source.into()) == destination(packet) {
        return None;
    }
    let is_fragment = be16(packet, 6)? & 0x3fff != 0;
    if packet[9] != PROTOCOL_TCP || is_fragment {
        return Some(Kind::Unserved);
    }
    tcp(source.into(), packet.get(header_len..total_len)?)
}

/// Looks at a TCP segment (RFC 9293 §3.1); none when it is malformed.
fn tcp(source: Ipv4Addr, segment: &[u8]) -> Option<Kind> {
    let (source_port, port) = (be16(segment, 0)?, be16(segment, 2)?);
    let header_len = usize::from(segment.get(12)? >> 4) * 4;
    if header_len < 20 || segment.len() < header_len || source_port == 0 || port == 0 {
        return None;
    }
    Some(Kind::Tcp {
        peer: (source, source_port),
        port,
        opens: segment[13] & FIN_SYN_RST_ACK == SYN,
    })
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}
