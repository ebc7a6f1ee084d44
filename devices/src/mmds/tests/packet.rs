//! Which frames are the service's, and which of those get further.

use std::net::Ipv4Addr;

use super::super::packet::{Kind, arp_reply, inspect};
use super::super::{DEFAULT_ADDRESS, MAC, is_for};
use super::client::{ADDRESS, GUEST_MAC, SYN, arp, tcp};

fn look(frame: &[u8]) -> Kind {
    inspect(DEFAULT_ADDRESS, frame)
}

/// A whole SYN with one byte changed.
fn spoilt(at: usize, value: u8) -> Kind {
    let mut frame = tcp(80, 1000, (0, 0), SYN, b"");
    frame[at] = value;
    look(&frame)
}

#[test]
fn the_service_owns_its_address_and_nothing_else() {
    let frame = tcp(80, 1000, (0, 0), SYN, b"");
    let request = arp(1, ADDRESS, DEFAULT_ADDRESS);
    assert!(is_for(DEFAULT_ADDRESS, &frame) && is_for(DEFAULT_ADDRESS, &request));
    let other = Ipv4Addr::new(169, 254, 169, 253);
    assert!(!is_for(other, &frame) && !is_for(other, &request));
    // Asked by the service's address about another one: not about the service.
    assert!(!is_for(DEFAULT_ADDRESS, &arp(1, DEFAULT_ADDRESS, other)));
    for ethertype in [[0x86, 0xdd], [0x81, 0x00], [0x08, 0x01]] {
        let mut other = frame.clone();
        other[12..14].copy_from_slice(&ethertype);
        assert!(!is_for(DEFAULT_ADDRESS, &other), "{ethertype:?}");
    }
    assert!(!is_for(DEFAULT_ADDRESS, &frame[..33]) && !is_for(DEFAULT_ADDRESS, &[]));
}

#[test]
fn a_whole_segment_names_its_peer() {
    let kind = Kind::Tcp {
        peer: (ADDRESS, 1000),
        port: 80,
        opens: true,
    };
    assert_eq!(look(&tcp(80, 1000, (0, 0), SYN, b"")), kind);
}

#[test]
fn the_way_that_a_frame_was_sent_does_not_matter() {
    let mut frame = tcp(80, 1000, (0, 0), SYN, b"");
    frame[..6].copy_from_slice(&[2, 9, 9, 9, 9, 9]);
    assert!(matches!(look(&frame), Kind::Tcp { .. }));
}

#[test]
fn frames_that_are_cut_off_are_malformed() {
    let (segment, request) = (
        tcp(80, 1000, (0, 0), SYN, b"abc"),
        arp(1, ADDRESS, DEFAULT_ADDRESS),
    );
    for len in 0..segment.len() {
        assert_eq!(look(&segment[..len]), Kind::Malformed, "{len}");
    }
    for len in 0..request.len() {
        assert_eq!(look(&request[..len]), Kind::Malformed, "{len}");
    }
}

#[test]
fn impossible_headers_are_malformed() {
    for (at, value) in [
        (6, 0x01),       // sent by a group
        (14, 0x55),      // IP version 5
        (14, 0x44),      // IP header of 16 bytes
        (14, 0x4f),      // IP header longer than the packet
        (17, 0xff),      // longer than the frame
        (17, 19),        // shorter than its header
        (26, 224),       // from a group
        (26, 0),         // from nowhere
        (14 + 32, 0x40), // TCP header of 16 bytes
        (14 + 32, 0xf0), // TCP header longer than the segment
    ] {
        assert_eq!(spoilt(at, value), Kind::Malformed, "byte {at} = {value:#x}");
    }
    let mut own = tcp(80, 1000, (0, 0), SYN, b"");
    own[26..30].copy_from_slice(&DEFAULT_ADDRESS.octets());
    assert_eq!(look(&own), Kind::Malformed);
    assert_eq!(look(&tcp(80, 0, (0, 0), SYN, b"")), Kind::Malformed);
    assert_eq!(look(&tcp(0, 1000, (0, 0), SYN, b"")), Kind::Malformed);
}

#[test]
fn other_protocols_and_fragments_are_not_served() {
    assert_eq!(spoilt(14 + 9, 17), Kind::Unserved);
    assert_eq!(spoilt(14 + 9, 1), Kind::Unserved);
    assert_eq!(spoilt(14 + 6, 0x20), Kind::Unserved);
    assert_eq!(spoilt(14 + 7, 1), Kind::Unserved);
    // "Do not fragment" is no fragment.
    assert!(matches!(spoilt(14 + 6, 0x40), Kind::Tcp { .. }));
    assert_eq!(look(&arp(2, ADDRESS, DEFAULT_ADDRESS)), Kind::Unserved);
}

#[test]
fn an_arp_request_is_answered_to_who_asked() {
    let request = arp(1, ADDRESS, DEFAULT_ADDRESS);
    assert_eq!(look(&request), Kind::ArpRequest);
    let reply = arp_reply(DEFAULT_ADDRESS, &request);
    let expected = [
        &GUEST_MAC[..],
        &MAC,
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2],
        &MAC,
        &DEFAULT_ADDRESS.octets(),
        &GUEST_MAC,
        &ADDRESS.octets(),
    ];
    assert_eq!(reply, expected.concat());
}
