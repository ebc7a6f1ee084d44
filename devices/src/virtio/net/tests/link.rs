//! The link goes down and up, and moves to another tap.

use super::super::feature;
use super::*;
use crate::testing::readable;

const STATUS: std::ops::Range<usize> = 6..8;

impl Guest<'_> {
    fn patch(&mut self, fields: &str) -> Result<(), String> {
        let patched = self.update(&format!(r#"{{"iface_id":"eth0",{fields}}}"#));
        patched.map_err(|error| error.to_string())
    }

    fn status(&self) -> &[u8] {
        &self.net.config_space()[STATUS]
    }

    fn send_one(&mut self, seed: u8) -> Vec<u8> {
        let sent = frame(100, seed);
        self.mem
            .write_slice(&sent, GuestAddress(BUFFERS + 0x8000))
            .unwrap();
        self.tx.offer(&[readable(BUFFERS + 0x8000, 100)]);
        self.kick_tx();
        sent
    }

    /// Moves to the other tap; returns the host's end of it.
    fn move_away(&mut self) -> UnixDatagram {
        self.patch(r#""host_dev_name":"tap1""#).unwrap();
        self.others.lock().unwrap().pop().unwrap()
    }
}

/// All that waits on the host's end.
fn waiting(wire: &UnixDatagram) -> Vec<Vec<u8>> {
    let mut bytes = [0; 2048];
    std::iter::from_fn(|| wire.recv(&mut bytes).ok().map(|len| bytes[..len].to_vec())).collect()
}

#[test]
fn starts_with_the_link_that_the_config_says() {
    for (rest, status) in [
        ("", 1),
        (r#","link_state":"up""#, 1),
        (r#","link_state":"down""#, 0),
    ] {
        let net = Net::new(&config(rest), FakeTap::new().0);
        assert_eq!(net.config_space()[STATUS], [status, 0], "{rest}");
        assert_ne!(net.info().features & feature::STATUS, 0);
    }
}

#[test]
fn shows_the_link_in_the_configuration_space() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    guest.patch(r#""link_state":"down""#).unwrap();
    assert_eq!(guest.status(), [0, 0]);
    guest.patch(r#""rx_rate_limiter":null"#).unwrap();
    assert_eq!(guest.status(), [0, 0]);
    guest.patch(r#""link_state":"up""#).unwrap();
    assert_eq!(guest.status(), [1, 0]);
}

#[test]
fn passes_nothing_in_either_direction_while_the_link_is_down() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    guest.patch(r#""link_state":"down""#).unwrap();
    guest.offer_rx(0, 4, 1536);
    guest.wire.send(&frame(100, 1)).unwrap();
    guest.tap_event();
    guest.kick_rx();
    guest.send_one(2);
    assert_eq!((guest.received(), waiting(&guest.wire)), (vec![], vec![]));
    assert!(guest.tx.used().is_some(), "the frame is lost, not kept");
    assert_eq!((guest.counter("tx_fails"), guest.counter("tx_count")), (1, 0));
}

#[test]
fn passes_only_what_comes_after_the_link_is_up_again() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    guest.offer_rx(0, 4, 1536);
    guest.patch(r#""link_state":"down""#).unwrap();
    guest.wire.send(&frame(100, 1)).unwrap();
    guest.tap_event();
    guest.patch(r#""link_state":"up""#).unwrap();
    guest.wire.send(&frame(200, 2)).unwrap();
    guest.tap_event();
    let lengths: Vec<_> = guest.received().iter().map(|(_, len)| *len).collect();
    assert_eq!(lengths, [200]);
    waiting(&guest.wire);
    let sent = guest.send_one(3);
    assert_eq!(waiting(&guest.wire), [sent]);
}

#[test]
fn forgets_a_frame_that_was_held_back_when_the_link_goes_down() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    guest.offer_rx(0, 1, 1536);
    guest.wire.send(&frame(3000, 1)).unwrap();
    guest.tap_event();
    guest.patch(r#""link_state":"down""#).unwrap();
    guest.patch(r#""link_state":"up""#).unwrap();
    guest.offer_rx(1, 2, 1536);
    guest.kick_rx();
    assert_eq!(guest.received(), []);
}

#[test]
fn moves_to_another_tap_and_serves_only_that_one() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    guest.offer_rx(0, 4, 1536);
    let old = guest.net.backend.as_fd().as_raw_fd();
    let other = guest.move_away();
    let new = guest.net.backend.as_fd().as_raw_fd();
    let watched = guest.recorder.watched.lock().unwrap().clone();
    assert!(
        watched.contains(&(new, 0)) && !watched.contains(&(old, 0)),
        "{watched:?}"
    );
    assert!(guest.wire.send(&frame(100, 1)).is_err(), "the old tap is closed");

    waiting(&other);
    let sent = guest.send_one(1);
    assert_eq!(waiting(&other), [sent]);
    other.send(&frame(100, 2)).unwrap();
    guest.tap_event();
    assert_eq!(guest.received().len(), 1);
}

#[test]
fn gives_the_other_tap_the_offloads_of_the_driver() {
    let mem = ram();
    let mut guest = Guest::with(&mem, 8, MRG_RXBUF | GUEST_CSUM);
    guest.move_away();
    assert_eq!(*guest.net.backend.set.lock().unwrap(), [GUEST_CSUM, GUEST_CSUM]);
}

#[test]
fn what_came_to_the_other_tap_before_it_had_the_offloads_of_the_driver_is_lost() {
    let mem = ram();
    for (features, lengths) in [
        (MRG_RXBUF | GUEST_CSUM, vec![100]),
        (MRG_RXBUF | GUEST_CSUM | GUEST_TSO4, vec![3000, 100]),
    ] {
        let mut guest = Guest::with(&mem, 8, features);
        guest.offer_rx(0, 2, 4096);
        guest.patch(r#""host_dev_name":"busy""#).unwrap();
        let other = guest.others.lock().unwrap().pop().unwrap();
        other.send(&frame(100, 1)).unwrap();
        guest.tap_event();
        let received: Vec<_> = guest.received().iter().map(|(_, len)| *len).collect();
        assert_eq!(received, lengths);
    }
}

#[test]
fn tells_the_network_where_the_guest_is_after_a_move_and_when_the_link_comes_up() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    let other = guest.move_away();
    let told = waiting(&other);
    assert_eq!(told.len(), 1);
    assert_eq!(
        (told[0].len(), &told[0][..HEADER_LEN]),
        (72, &[0; HEADER_LEN][..])
    );
    let mut expected = vec![0xff; 6];
    expected.extend([2, 0, 0, 0, 0, 1, 0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    expected.extend([2, 0, 0, 0, 0, 1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 1, 0, 0, 0, 0]);
    assert_eq!(told[0][HEADER_LEN..HEADER_LEN + 42], expected);

    guest.patch(r#""link_state":"down""#).unwrap();
    assert_eq!(waiting(&other).len(), 0);
    guest.patch(r#""link_state":"up""#).unwrap();
    assert_eq!(waiting(&other), told);
    guest.patch(r#""link_state":"up""#).unwrap();
    assert_eq!(waiting(&other).len(), 0);
}

#[test]
fn is_silent_about_a_guest_whose_address_it_does_not_know_and_while_the_link_is_down() {
    let mem = ram();
    let anonymous = |net: Net<FakeTap>| Net::new(&config(""), net.backend);
    let mut guest = Guest::of(&mem, 8, 0, anonymous);
    assert_eq!(waiting(&guest.move_away()).len(), 0);

    let mut guest = Guest::new(&mem, 8);
    guest.patch(r#""link_state":"down""#).unwrap();
    assert_eq!(waiting(&guest.move_away()).len(), 0);
}

#[test]
fn stays_on_a_tap_that_it_has_already() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    guest.patch(r#""host_dev_name":"tap0""#).unwrap();
    assert!(guest.others.lock().unwrap().is_empty());
    let sent = guest.send_one(1);
    assert_eq!(waiting(&guest.wire), [sent]);
}

#[test]
fn a_tap_that_cannot_be_had_changes_nothing() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    let limits = r#""tx_rate_limiter":{"ops":{"size":1,"refill_time":3600000}}"#;
    let refused = guest.patch(&format!(r#""host_dev_name":"tap2","link_state":"down",{limits}"#));
    let error = refused.unwrap_err();
    assert!(error.contains("the tap 'tap2' is in use already"), "{error}");
    assert_eq!(guest.status(), [1, 0]);
    let sent = [guest.send_one(1), guest.send_one(2)];
    assert_eq!(waiting(&guest.wire), sent);
}

#[test]
fn moves_while_no_driver_is_there() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    guest.net.reset();
    let other = guest.move_away();
    guest.call(|net, io| net.activate(io)).unwrap();
    other.send(&frame(100, 1)).unwrap();
    guest.offer_rx(0, 1, 1536);
    guest.tap_event();
    assert_eq!(guest.received().len(), 1);
}
