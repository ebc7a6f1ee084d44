//! Guests that speak in frames: polite, slow, gone, and hostile ones.

use std::time::Duration;

use proptest::prelude::{any, prop};
use proptest::proptest;
use serde_json::json;

use super::super::{DEFAULT_ADDRESS, MAC, MAX_FRAME_LEN, Version};
use super::client::{ACK, ADDRESS, FIN, Link, MSS, PSH, RST, SYN, arp, tcp};
use super::{config, counter, service, service_of};

const GET: &str = "GET /text HTTP/1.1\r\n\r\n";

fn link() -> Link {
    Link::new(service(Version::V1))
}

/// A link to a service with one long text at /long.
fn long_link(len: usize) -> Link {
    Link::new(service_of(config(""), json!({"long": "x".repeat(len)})))
}

#[test]
fn answers_arp_for_its_address() {
    let mut link = link();
    link.send(&arp(1, ADDRESS, DEFAULT_ADDRESS));
    let frames = link.frames();
    assert_eq!((frames.len(), &frames[0][22..28]), (1, &MAC[..]));
    link.send(&arp(2, ADDRESS, DEFAULT_ADDRESS));
    assert!(link.frames().is_empty());
}

#[test]
fn answers_requests_one_after_the_other_on_one_connection() {
    let mut link = link();
    let mut peer = link.connect(1000);
    for _ in 0..3 {
        let answer = peer.ask(&mut link, GET);
        assert!(
            answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("plain"),
            "{answer}"
        );
    }
    assert_eq!(counter(&link.mmds, "connections_created"), 1);
    assert_eq!(counter(&link.mmds, "connections_destroyed"), 0);
}

#[test]
fn answers_requests_that_come_together_in_order() {
    let mut link = link();
    let mut peer = link.connect(1000);
    let answers = peer.ask(&mut link, &format!("{GET}GET /x HTTP/1.1\r\n\r\n{GET}"));
    let statuses: Vec<_> = answers
        .split("HTTP/1.1 ")
        .skip(1)
        .map(|answer| &answer[..3])
        .collect();
    assert_eq!(statuses, ["200", "404", "200"]);
}

#[test]
fn puts_a_request_together_that_comes_byte_by_byte() {
    let mut link = link();
    let mut peer = link.connect(1000);
    let (last, first) = GET.as_bytes().split_last().unwrap();
    for byte in first {
        peer.say(&mut link, ACK | PSH, &[*byte]);
        assert_eq!(peer.hear(&mut link).0, b"");
    }
    peer.say(&mut link, ACK | PSH, &[*last]);
    assert!(peer.hear(&mut link).0.ends_with(b"plain"));
}

#[test]
fn puts_segments_in_order() {
    let mut link = link();
    let mut peer = link.connect(1000);
    let (first, second) = GET.split_at(10);
    let mut ahead = peer.clone();
    ahead.seq = ahead.seq.wrapping_add(10);
    ahead.say(&mut link, ACK | PSH, second.as_bytes());
    link.frames();
    peer.say(&mut link, ACK | PSH, first.as_bytes());
    peer.seq = ahead.seq;
    assert!(peer.hear(&mut link).0.ends_with(b"plain"));
}

#[test]
fn throws_the_body_of_a_request_away() {
    let mut link = link();
    let mut peer = link.connect(1000);
    let put =
        "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 9\r\nContent-Length: 5\r\n\r\n";
    let token = peer.ask(&mut link, &format!("{put}GE"));
    assert!(token.starts_with("HTTP/1.1 200 "), "{token}");
    assert_eq!(peer.ask(&mut link, "T /"), "");
    assert!(peer.ask(&mut link, GET).ends_with("plain"));
}

#[test]
fn a_long_answer_comes_in_segments_of_the_size_that_the_guest_takes() {
    let mut link = long_link(200_000);
    let mut peer = link.connect(1000);
    peer.say(&mut link, ACK | PSH, b"GET /long HTTP/1.1\r\n\r\n");
    let first = link.segments();
    assert!(
        first.len() > 1 && first.iter().all(|segment| segment.data.len() <= usize::from(MSS)),
        "{}",
        first.len()
    );
    // As if they were lost: the guest acknowledges nothing of them, and they come again.
    link.wait();
    let (answer, _) = peer.hear(&mut link);
    let (head, body) = answer.split_at(answer.len() - 200_000);
    assert!(head.ends_with(b"Content-Length: 200000\r\n\r\n") && body.iter().all(|byte| *byte == b'x'));
}

#[test]
fn sends_again_what_is_not_acknowledged_and_in_ever_longer_intervals() {
    let mut link = link();
    let mut peer = link.connect(1000);
    peer.say(&mut link, ACK | PSH, GET.as_bytes());
    let first = link.segments();
    let mut times = vec![link.now];
    for _ in 0..3 {
        link.wait();
        assert_eq!(link.segments(), first);
        times.push(link.now);
    }
    let gaps: Vec<_> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(gaps[0] < gaps[1] && gaps[1] < gaps[2], "{gaps:?}");
    assert!(peer.hear(&mut link).0.is_empty());
}

#[test]
fn has_nothing_to_wait_for_without_a_connection() {
    let mut link = link();
    assert_eq!(link.stack.next_work(link.now), None);
    let mut peer = link.connect(1000);
    assert!(
        peer.ask(&mut link, "GET /text HTTP/1.0\r\n\r\n")
            .ends_with("plain")
    );
    peer.say(&mut link, ACK | FIN, b"");
    link.frames();
    assert_eq!(link.stack.next_work(link.now), None);
    assert_eq!(counter(&link.mmds, "connections_destroyed"), 1);
}

#[test]
fn forgets_a_guest_that_is_silent_for_a_minute() {
    let mut link = link();
    let mut peer = link.connect(1000);
    peer.say(&mut link, ACK | PSH, GET.as_bytes());
    let start = link.now;
    while link.stack.next_work(link.now).is_some() {
        link.wait();
        link.frames();
    }
    let patience = link.now - start;
    assert_eq!(patience, Duration::from_secs(60));
    assert_eq!(counter(&link.mmds, "connections_destroyed"), 1);
}

#[test]
fn ends_the_connection_after_the_last_answer() {
    let mut link = link();
    let mut peer = link.connect(1000);
    peer.say(
        &mut link,
        ACK | PSH,
        b"GET /text HTTP/1.1\r\nConnection: close\r\n\r\n",
    );
    let (answer, ended) = peer.hear(&mut link);
    assert!(ended && answer.ends_with(b"plain"));
    peer.say(&mut link, ACK | FIN, b"");
    assert_eq!(link.segments().last().map(|segment| segment.ack), Some(peer.seq));
    assert_eq!(counter(&link.mmds, "connections_destroyed"), 1);
}

#[test]
fn answers_a_guest_that_has_ended_its_side() {
    let mut link = long_link(50_000);
    let mut peer = link.connect(1000);
    peer.say(&mut link, ACK | PSH | FIN, b"GET /long HTTP/1.1\r\n\r\n");
    let (answer, ended) = peer.hear(&mut link);
    assert!(ended && answer.len() > 50_000);
    assert_eq!(counter(&link.mmds, "connections_destroyed"), 1);
}

#[test]
fn refuses_what_is_no_request_and_ends() {
    let mut link = link();
    let mut peer = link.connect(1000);
    peer.say(&mut link, ACK | PSH, &[0; 100]);
    let (answer, ended) = peer.hear(&mut link);
    assert!(ended && answer.starts_with(b"HTTP/1.1 400 "));
}

#[test]
fn a_reset_ends_a_connection_at_once() {
    let mut link = long_link(50_000);
    let mut peer = link.connect(1000);
    peer.say(&mut link, ACK | PSH, b"GET /long HTTP/1.1\r\n\r\n");
    link.frames();
    peer.say(&mut link, RST | ACK, b"");
    assert!(link.frames().is_empty());
    assert_eq!(link.stack.next_work(link.now), None);
    assert_eq!(counter(&link.mmds, "connections_destroyed"), 1);
}

#[test]
fn what_belongs_to_no_connection_is_reset() {
    let mut link = link();
    for port in [80, 81] {
        link.send(&tcp(port, 1000, (7, 9), ACK, b"abc"));
    }
    let mut closed_port = tcp(443, 1000, (7, 0), SYN, b"");
    link.send(&closed_port);
    closed_port[36..38].copy_from_slice(&80u16.to_be_bytes());
    let resets = link.frames();
    assert!(resets.len() == 3 && resets.iter().all(|frame| frame[47] & RST != 0));
    assert_eq!(counter(&link.mmds, "connections_created"), 0);
    assert_eq!(counter(&link.mmds, "rx_accepted_unusual"), 2);
}

#[test]
fn a_repeated_request_for_a_connection_opens_one() {
    let mut link = link();
    for _ in 0..3 {
        link.send(&tcp(80, 1000, (1, 0), SYN, b""));
    }
    let answers = link.segments();
    assert!(
        answers
            .iter()
            .all(|answer| answer.flags == SYN | ACK && answer.seq == answers[0].seq)
    );
    assert_eq!(counter(&link.mmds, "connections_created"), 1);
}

#[test]
fn serves_connections_side_by_side() {
    let mut link = link();
    let mut peers: Vec<_> = (1000..1020).map(|port| link.connect(port)).collect();
    for peer in &mut peers {
        peer.say(&mut link, ACK | PSH, &GET.as_bytes()[..10]);
        peer.hear(&mut link);
    }
    for peer in &mut peers {
        assert!(peer.ask(&mut link, &GET[10..]).ends_with("plain"));
    }
}

#[test]
fn gives_up_the_quietest_connection_for_a_new_one() {
    let mut link = link();
    let mut peers = Vec::new();
    for port in 1000..1032 {
        link.now += Duration::from_millis(1);
        peers.push(link.connect(port));
    }
    link.now += Duration::from_millis(1);
    assert!(peers[0].ask(&mut link, GET).ends_with("plain"));
    let mut new = link.connect(2000);
    assert!(new.ask(&mut link, GET).ends_with("plain"));
    assert!(peers[0].ask(&mut link, GET).ends_with("plain"));
    peers[1].say(&mut link, ACK | PSH, GET.as_bytes());
    assert!(link.frames()[0][47] & RST != 0);
}

#[test]
fn a_flood_of_new_connections_takes_bounded_room() {
    let mut link = link();
    for port in 1..5000 {
        link.send(&tcp(80, port, (1, 0), SYN, b""));
    }
    assert!(link.frames().len() <= 128 + 32);
    let (created, gone) = (
        counter(&link.mmds, "connections_created"),
        counter(&link.mmds, "connections_destroyed"),
    );
    assert_eq!((created, created - gone), (4999, 32));
    let mut peer = link.connect(6000);
    assert!(peer.ask(&mut link, GET).ends_with("plain"));
}

#[test]
fn a_guest_that_takes_no_frames_is_not_waited_for() {
    let mut link = long_link(500_000);
    let mut peers: Vec<_> = (1000..1010).map(|port| link.connect(port)).collect();
    for peer in &mut peers {
        peer.say(&mut link, ACK | PSH, b"GET /long HTTP/1.1\r\n\r\n");
    }
    link.pass(Duration::from_secs(1));
    assert_eq!(link.stack.next_work(link.now), None);
    assert!(link.frames().len() > 32);
    assert!(link.stack.next_work(link.now).is_some());
}

#[test]
fn a_flood_of_arp_requests_is_cut_off() {
    let mut link = link();
    for _ in 0..1000 {
        link.send(&arp(1, ADDRESS, DEFAULT_ADDRESS));
    }
    assert_eq!(link.frames().len(), 128);
    assert_eq!(counter(&link.mmds, "tx_errors"), 872);
}

#[test]
fn frames_that_are_too_long_are_not_looked_at() {
    let mut link = link();
    let mut frame = tcp(80, 1000, (1, 0), SYN, b"");
    frame.resize(MAX_FRAME_LEN + 1, 0);
    link.send(&frame);
    assert_eq!((link.frames().len(), counter(&link.mmds, "rx_bad_eth")), (0, 1));
}

#[test]
fn a_reset_of_the_device_forgets_everything() {
    let mut link = link();
    let mut peer = link.connect(1000);
    peer.say(&mut link, ACK | PSH, GET.as_bytes());
    link.stack.reset();
    assert!(!link.stack.has_frame() && link.stack.next_work(link.now).is_none());
    assert_eq!(counter(&link.mmds, "connections_destroyed"), 1);
    assert!(link.connect(1000).ask(&mut link, GET).ends_with("plain"));
}

#[test]
fn frames_and_bytes_are_counted() {
    let mut link = link();
    let mut peer = link.connect(1000);
    peer.ask(&mut link, GET);
    link.send(&[0; 60]);
    let counted = |name| counter(&link.mmds, name);
    // SYN, its acknowledgement, the request, the acknowledgement of the answer, and junk.
    assert_eq!(
        (
            counted("rx_accepted"),
            counted("rx_count"),
            counted("rx_accepted_err")
        ),
        (5, 4, 1)
    );
    assert!(counted("tx_frames") >= 2 && counted("tx_bytes") > 2 * 54 + 5);
}

proptest! {
    #[test]
    fn junk_never_panics(
        frames in prop::collection::vec((any::<bool>(), any::<u16>(), any::<(u32, u32)>(), any::<u8>(), prop::collection::vec(any::<u8>(), 0..100)), 0..50),
        spoil in prop::collection::vec((14usize..80, any::<u8>()), 0..4),
    ) {
        let mut link = link();
        let peer = link.connect(1000);
        for (on_connection, port, numbers, flags, data) in frames {
            let (port, numbers) = if on_connection { (1000, (peer.seq, peer.ack)) } else { (port, numbers) };
            let mut frame = tcp(80, port, numbers, flags, &data);
            for (at, value) in &spoil {
                if let Some(byte) = frame.get_mut(*at) {
                    *byte = *value;
                }
            }
            link.send(&frame);
            link.pass(Duration::from_millis(u64::from(port % 500)));
            link.frames();
        }
    }
}
