use std::net::Ipv4Addr;
use std::time::Duration;

use super::super::MMDS_TOKEN;
use super::*;
use crate::mmds::tests::client::{ACK, ADDRESS, PSH, RST, SYN, arp, tcp};
use crate::mmds::tests::service;
use crate::mmds::{DEFAULT_ADDRESS, Mmds, Version};
use crate::testing::readable;

const FEATURES: u64 = MRG_RXBUF | GUEST_CSUM | GUEST_TSO4;
/// Where frames of the guest are, behind the receive buffers.
const SENT: u64 = BUFFERS + 0x10_0000;
/// Where TCP begins in the first receive buffer.
const SEGMENT: u64 = 12 + 14 + 20;

impl<'m> Guest<'m> {
    /// A guest whose card serves the metadata service.
    fn served(mem: &'m GuestMemory) -> Self {
        Self::serving(mem, &Arc::new(service(Version::V1)))
    }

    /// A guest whose card serves this one.
    fn serving(mem: &'m GuestMemory, mmds: &Arc<Mmds>) -> Self {
        Self::of(mem, 64, FEATURES, |net| net.with_mmds(Arc::clone(mmds)).unwrap())
    }

    /// Asks on a new connection, whose port no other has, and gets an answer of one segment.
    fn ask(&mut self, port: u16, request: &str) -> String {
        let first = self.offer_rx(0, 1, 2048)[0];
        self.speak(&tcp(80, port, (1, 0), SYN, b""));
        assert_eq!(self.received()[0].0, first);
        let seq = u32::from_be_bytes(self.bytes(SEGMENT + 4, 4).try_into().unwrap());
        self.offer_rx(0, 1, 2048);
        let ack = seq.wrapping_add(1);
        self.speak(&tcp(80, port, (2, ack), ACK | PSH, request.as_bytes()));
        let len = usize::try_from(self.received()[0].1).unwrap();
        let offset = usize::try_from(SEGMENT).unwrap() + 20;
        let end = 2 + u32::try_from(request.len()).unwrap();
        self.speak(&tcp(80, port, (end, 0), RST, b""));
        String::from_utf8(self.bytes(SEGMENT + 20, len - offset)).unwrap()
    }

    /// A token that is valid for a minute.
    fn token(&mut self, port: u16) -> String {
        let answer = self.ask(
            port,
            "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n",
        );
        answer[answer.len() - 32..].to_owned()
    }

    /// Whether a request with this token may read.
    fn reads(&mut self, port: u16, token: &str) -> bool {
        let request = format!("GET /text HTTP/1.1\r\nX-metadata-token: {token}\r\n\r\n");
        self.ask(port, &request).starts_with("HTTP/1.1 200 ")
    }

    /// Sends a frame, its header apart, as Linux does.
    fn speak(&mut self, frame: &[u8]) {
        self.mem
            .write_slice(&[0; HEADER_LEN], GuestAddress(SENT))
            .unwrap();
        self.mem.write_slice(frame, GuestAddress(SENT + 0x1000)).unwrap();
        self.tx.offer(&[
            readable(SENT, 12),
            readable(SENT + 0x1000, u32::try_from(frame.len()).unwrap()),
        ]);
        self.kick_tx();
        assert!(self.tx.used().is_some());
    }

    /// What arrived on the host's side.
    fn leaked(&self) -> Option<usize> {
        self.wire.recv(&mut [0; 100]).ok()
    }

    /// Whether the timer of the service runs.
    fn timer_runs(&self) -> bool {
        let watched = self.recorder.watched.lock().unwrap();
        let (fd, _) = watched.iter().find(|(_, token)| *token == MMDS_TOKEN).unwrap();
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
        let value = info.lines().find(|line| line.starts_with("it_value")).unwrap();
        value != "it_value: (0, 0)"
    }
}

#[test]
fn answers_what_is_for_the_service_and_keeps_it_from_the_tap() {
    let mem = ram();
    let mut guest = Guest::served(&mem);
    let heads = guest.offer_rx(0, 2, 2048);
    guest.speak(&arp(1, ADDRESS, DEFAULT_ADDRESS));
    assert_eq!(guest.leaked(), None);
    assert_eq!(guest.received(), [(heads[0], 12 + 42)]);
    let header = guest.bytes(0, HEADER_LEN);
    assert_eq!((&header[..10], &header[10..]), (&[0; 10][..], &[1, 0][..]));
    assert_eq!(guest.bytes(12 + 28, 4), DEFAULT_ADDRESS.octets());
    assert_eq!((guest.counter("tx_count"), guest.counter("rx_count")), (0, 1));
}

#[test]
fn leaves_everything_else_to_the_tap() {
    let mem = ram();
    let mut guest = Guest::served(&mem);
    guest.offer_rx(0, 2, 2048);
    let neighbour = Ipv4Addr::new(10, 0, 0, 1);
    guest.speak(&arp(1, ADDRESS, neighbour));
    assert_eq!(guest.leaked(), Some(12 + 42));
    let mut elsewhere = tcp(80, 1000, (1, 0), SYN, b"");
    elsewhere[30..34].copy_from_slice(&neighbour.octets());
    guest.speak(&elsewhere);
    assert_eq!(guest.leaked(), Some(12 + elsewhere.len()));
    assert_eq!(guest.received(), []);
}

#[test]
fn a_card_that_does_not_serve_it_knows_nothing_of_the_service() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 64);
    guest.offer_rx(0, 2, 2048);
    guest.speak(&arp(1, ADDRESS, DEFAULT_ADDRESS));
    assert_eq!(guest.leaked(), Some(12 + 42));
    assert_eq!(guest.received(), []);
}

#[test]
fn an_answer_waits_for_a_buffer() {
    let mem = ram();
    let mut guest = Guest::served(&mem);
    guest.speak(&arp(1, ADDRESS, DEFAULT_ADDRESS));
    guest.speak(&arp(1, ADDRESS, DEFAULT_ADDRESS));
    assert_eq!(guest.received(), []);
    guest.offer_rx(0, 2, 2048);
    guest.kick_rx();
    assert_eq!(guest.received().len(), 2);
}

#[test]
fn an_answer_leaves_frames_of_the_tap_to_their_own_event() {
    let mem = ram();
    let mut guest = Guest::served(&mem);
    guest.offer_rx(0, 4, 2048);
    guest.wire.send(&frame(100, 1)).unwrap();
    guest.speak(&arp(1, ADDRESS, DEFAULT_ADDRESS));
    assert_eq!(guest.received().len(), 1);
    guest.tap_event();
    assert_eq!(guest.received().len(), 1);
    assert_eq!(guest.bytes(2048, 100), merged(frame(100, 1), 1));
}

#[test]
fn the_timer_runs_as_long_as_there_is_a_connection() {
    let mem = ram();
    let mut guest = Guest::served(&mem);
    guest.offer_rx(0, 8, 2048);
    guest.speak(&arp(1, ADDRESS, DEFAULT_ADDRESS));
    assert!(!guest.timer_runs());
    guest.speak(&tcp(80, 1000, (1, 0), SYN, b""));
    assert!(guest.timer_runs());
    guest.speak(&tcp(80, 1000, (2, 0), RST, b""));
    assert!(!guest.timer_runs());
}

#[test]
fn the_timer_is_no_event_of_the_tap() {
    let mem = ram();
    let mut guest = Guest::served(&mem);
    guest.call(|net, io| net.on_event(MMDS_TOKEN, io)).unwrap();
    assert_eq!(guest.counter("rx_tap_event_count"), 0);
    guest.tap_event();
    assert_eq!(guest.counter("rx_tap_event_count"), 1);
}

#[test]
fn a_reset_forgets_frames_and_connections() {
    let mem = ram();
    let mut guest = Guest::served(&mem);
    guest.speak(&tcp(80, 1000, (1, 0), SYN, b""));
    guest.net.reset();
    guest.offer_rx(0, 8, 2048);
    guest.kick_rx();
    assert_eq!(guest.received(), []);
    assert!(!guest.timer_runs());
}

#[test]
fn what_is_not_acknowledged_comes_again_in_its_time() {
    let mem = ram();
    let mut guest = Guest::served(&mem);
    guest.offer_rx(0, 8, 2048);
    guest.speak(&tcp(80, 1000, (1, 0), SYN, b""));
    assert_eq!(guest.received().len(), 1);
    guest.recorder.pass(Duration::from_secs(2));
    guest.call(|net, io| net.on_event(MMDS_TOKEN, io)).unwrap();
    assert_eq!(guest.received().len(), 1);
}

#[test]
fn a_pause_does_not_count_as_silence() {
    let mem = ram();
    let mut guest = Guest::served(&mem);
    guest.offer_rx(0, 8, 2048);
    guest.speak(&tcp(80, 1000, (1, 0), SYN, b""));
    assert_eq!(guest.received().len(), 1);
    guest.call(|net, io| net.quiesce(io)).unwrap();
    guest.recorder.pass(Duration::from_secs(3600));
    guest.call(|net, io| net.on_event(MMDS_TOKEN, io)).unwrap();
    assert_eq!(guest.received(), []);
    assert!(guest.timer_runs());
}

#[test]
fn limits_of_the_sending_direction_are_for_the_tap_only() {
    let mem = ram();
    let mut guest = Guest::served(&mem);
    let limits = r#"{"iface_id":"eth0","tx_rate_limiter":{"ops":{"size":1,"refill_time":1000}}}"#;
    guest.update(limits).unwrap();
    guest.offer_rx(0, 8, 2048);
    for _ in 0..5 {
        guest.speak(&arp(1, ADDRESS, DEFAULT_ADDRESS));
    }
    assert_eq!(guest.received().len(), 5);
    // The one frame of the limit is still there to be used.
    guest.speak(&arp(1, ADDRESS, Ipv4Addr::new(10, 0, 0, 1)));
    assert_eq!(guest.leaked(), Some(12 + 42));
}

#[test]
fn a_token_is_valid_for_as_long_on_every_card() {
    let (mem, other_mem) = (ram(), ram());
    let mmds = Arc::new(service(Version::V2));
    let (mut early, mut late) = (Guest::serving(&mem, &mmds), Guest::serving(&other_mem, &mmds));
    late.recorder = Arc::clone(&early.recorder);
    early.speak(&arp(1, ADDRESS, DEFAULT_ADDRESS));
    early.offer_rx(0, 1, 2048);
    early.kick_rx();
    assert_eq!(early.received().len(), 1);
    early.recorder.pass(Duration::from_secs(100));
    let (from_late, from_early) = (late.token(1000), early.token(1000));
    early.recorder.pass(Duration::from_millis(59_999));
    assert!(early.reads(1001, &from_late) && late.reads(1001, &from_late));
    assert!(early.reads(1002, &from_early) && late.reads(1002, &from_early));
    early.recorder.pass(Duration::from_millis(1));
    assert!(!early.reads(1003, &from_late) && !late.reads(1003, &from_late));
    assert!(!early.reads(1004, &from_early) && !late.reads(1004, &from_early));
}

#[test]
fn a_token_ends_during_a_pause_too() {
    let mem = ram();
    let mut guest = Guest::serving(&mem, &Arc::new(service(Version::V2)));
    let token = guest.token(1000);
    assert!(guest.reads(1001, &token));
    guest.call(|net, io| net.quiesce(io)).unwrap();
    guest.recorder.pass(Duration::from_secs(60));
    assert!(!guest.reads(1002, &token));
}
