//! Limits of both directions. The recorder's clock stands still unless a test lets time pass.

use std::time::Duration;

use super::super::{RX_LIMITER_TOKEN, TX_LIMITER_TOKEN};
use super::*;
use crate::testing::readable;
use crate::virtio::Blob;

impl Guest<'_> {
    /// Limits one direction, `rx` or `tx`.
    fn limit(&mut self, direction: &str, limits: &str) {
        let patch = format!(r#"{{"iface_id":"eth0","{direction}_rate_limiter":{limits}}}"#);
        self.update(&patch).unwrap();
    }

    fn pass(&mut self, millis: u64) {
        self.recorder.pass(Duration::from_millis(millis));
    }

    /// Tells the device that a limiter's timer has expired.
    fn expire(&mut self, token: u32) {
        self.call(|net, io| net.on_event(token, io)).unwrap();
    }

    /// Offers frames of 60 bytes to be sent.
    fn offer_tx(&mut self, count: usize) {
        (0..count).for_each(|_| _ = self.tx.offer(&[readable(BUFFERS, 60)]));
    }

    /// How many frames have left since the last call.
    fn left(&self) -> usize {
        std::iter::from_fn(|| self.wire.recv(&mut [0; 100]).ok()).count()
    }

    /// How many frames of `len` bytes wait on the host.
    fn send(&self, count: u8, len: usize) {
        (0..count).for_each(|i| _ = self.wire.send(&frame(len, i)).unwrap());
    }
}

#[test]
fn leaves_frames_in_the_queue_until_they_may_be_sent() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    guest.limit("tx", r#"{"bandwidth":{"size":120,"refill_time":1000}}"#);
    guest.offer_tx(5);
    guest.kick_tx();
    assert_eq!((guest.left(), guest.again), (2, None));
    guest.pass(499);
    guest.expire(TX_LIMITER_TOKEN);
    guest.kick_tx();
    assert_eq!(guest.left(), 0);
    guest.pass(1);
    guest.expire(TX_LIMITER_TOKEN);
    assert_eq!(guest.left(), 1);
    assert_eq!(guest.counter("tx_rate_limiter_throttled"), 3);
    assert_eq!(guest.counter("tx_rate_limiter_event_count"), 2);
    assert_eq!(guest.counter("tx_fails"), 0);
}

#[test]
fn what_is_no_frame_is_not_limited() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    guest.limit("tx", r#"{"ops":{"size":1,"refill_time":1000}}"#);
    for len in [3, 60, 4, 0x10_0000] {
        guest.tx.offer(&[readable(BUFFERS, len)]);
    }
    guest.kick_tx();
    assert_eq!((guest.left(), guest.counter("tx_malformed_frames")), (1, 3));
    assert_eq!(guest.counter("tx_rate_limiter_throttled"), 0);
}

#[test]
fn reads_no_frame_while_one_is_held_back_and_loses_none() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    let heads = guest.offer_rx(0, 4, 1536);
    guest.limit("rx", r#"{"ops":{"size":1,"refill_time":1000}}"#);
    guest.send(3, 100);
    guest.tap_event();
    assert_eq!(guest.received(), [(heads[0], 100)]);
    guest.kick_rx();
    guest.tap_event();
    guest.pass(999);
    guest.expire(RX_LIMITER_TOKEN);
    assert_eq!(guest.received(), []);
    guest.pass(1);
    guest.expire(RX_LIMITER_TOKEN);
    assert_eq!(guest.received(), [(heads[1], 100)]);
    guest.pass(1000);
    guest.expire(RX_LIMITER_TOKEN);
    assert_eq!(guest.received(), [(heads[2], 100)]);
    assert_eq!(guest.bytes(2 * 1536, 100), merged(frame(100, 2), 1));
    assert_eq!(guest.counter("rx_rate_limiter_throttled"), 3);
    assert_eq!(guest.counter("rx_event_rate_limiter_count"), 3);
    assert_eq!(guest.counter("rx_fails"), 0);
}

#[test]
fn a_frame_over_many_buffers_is_held_back_whole() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    let heads = guest.offer_rx(0, 5, 512);
    guest.limit("rx", r#"{"bandwidth":{"size":1500,"refill_time":1000}}"#);
    guest.send(2, 1024);
    guest.tap_event();
    assert_eq!(guest.received(), [(heads[0], 512), (heads[1], 512)]);
    guest.pass(366);
    guest.expire(RX_LIMITER_TOKEN);
    assert_eq!(guest.received(), [(heads[2], 512), (heads[3], 512)]);
    assert_eq!(guest.bytes(1024, 1024), merged(frame(1024, 1), 2));
}

#[test]
fn a_held_back_frame_comes_without_mergeable_buffers_too() {
    let mem = ram();
    let mut guest = Guest::with(&mem, 8, 0);
    let heads = guest.offer_rx(0, 2, 1536);
    guest.limit("rx", r#"{"ops":{"size":1,"refill_time":1000}}"#);
    guest.send(2, 100);
    guest.tap_event();
    guest.pass(1000);
    guest.expire(RX_LIMITER_TOKEN);
    assert_eq!(guest.received(), [(heads[0], 100), (heads[1], 100)]);
    assert_eq!(guest.bytes(1536, 100), merged(frame(100, 1), 1));
}

#[test]
fn one_direction_does_not_hold_the_other_back() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    guest.limit("tx", r#"{"ops":{"size":1,"refill_time":1000}}"#);
    guest.offer_rx(0, 4, 1536);
    guest.offer_tx(2);
    guest.kick_tx();
    guest.send(3, 100);
    guest.tap_event();
    assert_eq!((guest.left(), guest.received().len()), (1, 3));
}

#[test]
fn a_patch_of_both_directions_lifts_both_limits() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    let one = r#"{"ops":{"size":1,"refill_time":1000}}"#;
    guest.limit("rx", one);
    guest.limit("tx", one);
    guest.offer_rx(0, 4, 1536);
    guest.offer_tx(3);
    guest.send(3, 100);
    guest.kick_tx();
    guest.tap_event();
    assert_eq!((guest.left(), guest.received().len()), (1, 1));
    let none = r#"{"ops":{"size":0,"refill_time":0}}"#;
    let patch = format!(r#"{{"iface_id":"eth0","rx_rate_limiter":{none},"tx_rate_limiter":{none}}}"#);
    guest.update(&patch).unwrap();
    guest.expire(RX_LIMITER_TOKEN);
    guest.expire(TX_LIMITER_TOKEN);
    assert_eq!((guest.left(), guest.received().len()), (2, 2));
}

#[test]
fn a_patch_with_a_bad_part_changes_nothing() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    let patch = r#"{"iface_id":"eth0","tx_rate_limiter":{"ops":{"size":1,"refill_time":1000}},
        "rx_rate_limiter":{"ops":{"size":1}}}"#;
    assert!(guest.update(patch).is_err());
    guest.offer_tx(3);
    guest.kick_tx();
    assert_eq!(guest.left(), 3);
}

#[test]
fn a_reset_drops_what_is_held_back_and_keeps_what_was_used_up() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    guest.limit("rx", r#"{"ops":{"size":1,"refill_time":1000}}"#);
    guest.offer_rx(0, 4, 1536);
    guest.send(2, 100);
    guest.tap_event();
    guest.net.reset();
    guest.call(|net, io| net.activate(io)).unwrap();
    guest.tap_event();
    guest.expire(RX_LIMITER_TOKEN);
    guest.send(1, 200);
    guest.tap_event();
    assert_eq!(guest.received().len(), 1);
    guest.pass(1000);
    guest.expire(RX_LIMITER_TOKEN);
    assert_eq!(guest.received()[0].1, 200);
}

#[test]
fn a_restored_card_has_no_new_burst() {
    let mem = ram();
    let limits = r#","tx_rate_limiter":{"ops":{"size":1,"one_time_burst":2,"refill_time":3600000}}"#;
    let mut guest = Guest::new(&mem, 8);
    let insert = |guest: &mut Guest, saved: Option<Blob>| {
        let (tap, wire) = FakeTap::new();
        (guest.net, guest.wire) = (Net::new(&config(limits), tap), wire);
        saved.into_iter().for_each(|saved| guest.net.load(saved).unwrap());
        guest.call(|net, io| net.activate(io)).unwrap();
    };
    insert(&mut guest, None);
    guest.offer_tx(3);
    guest.kick_tx();
    assert_eq!(guest.left(), 3);

    let saved = guest.net.save();
    insert(&mut guest, Some(saved.clone()));
    guest.offer_tx(1);
    guest.kick_tx();
    assert_eq!(guest.left(), 0);
    assert!(Net::new(&config(""), FakeTap::new().0).load(saved).is_err());
}
