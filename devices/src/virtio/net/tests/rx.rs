use super::super::MAX_FRAME_LEN;
use super::*;

#[test]
fn receives_a_frame_into_one_buffer() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    let heads = guest.offer_rx(0, 2, 1536);
    guest.wire.send(&frame(100, 1)).unwrap();
    guest.tap_event();
    assert_eq!(guest.received(), [(heads[0], 100)]);
    assert_eq!(guest.bytes(0, 100), merged(frame(100, 1), 1));
    assert_eq!(
        (guest.counter("rx_packets_count"), guest.counter("rx_bytes_count")),
        (1, 100)
    );
    assert_eq!(guest.recorder.take_interrupts(), 1);
}

#[test]
fn keeps_unused_buffers_for_the_next_frame() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    let heads = guest.offer_rx(0, 4, 512);
    guest.wire.send(&frame(600, 1)).unwrap();
    guest.tap_event();
    guest.wire.send(&frame(50, 2)).unwrap();
    guest.tap_event();
    assert_eq!(
        guest.received(),
        [(heads[0], 512), (heads[1], 88), (heads[2], 50)]
    );
    assert_eq!(guest.bytes(0, 600), merged(frame(600, 1), 2));
    assert_eq!(guest.bytes(1024, 50), merged(frame(50, 2), 1));
}

#[test]
fn interrupts_once_for_a_batch_of_frames() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    guest.offer_rx(0, 8, 1536);
    for i in 0..5 {
        guest.wire.send(&frame(100, i)).unwrap();
    }
    guest.tap_event();
    assert_eq!(guest.received().len(), 5);
    assert_eq!(guest.recorder.take_interrupts(), 1);
    assert_eq!(guest.bytes(4 * 1536, 100), merged(frame(100, 4), 1));
}

#[test]
fn spreads_a_64_kib_frame_over_small_buffers_whether_expected_or_not() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 128);
    let heads = guest.offer_rx(0, 128, 1536);
    guest.wire.send(&frame(65562, 1)).unwrap();
    guest.tap_event();
    guest.wire.send(&frame(65562, 2)).unwrap();
    guest.tap_event();

    let received = guest.received();
    assert_eq!(received.len(), 86);
    assert_eq!(
        (received[0], received[42]),
        ((heads[0], 1536), (heads[42], 65562 - 42 * 1536))
    );
    assert_eq!(received[43], (heads[43], 1536));
    assert_eq!(guest.bytes(0, 65562), merged(frame(65562, 1), 43));
    assert_eq!(guest.bytes(43 * 1536, 65562), merged(frame(65562, 2), 43));
}

#[test]
fn fills_a_buffer_to_its_last_byte() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    let heads = guest.offer_rx(0, 3, 512);
    guest.wire.send(&frame(1024, 1)).unwrap();
    guest.tap_event();
    assert_eq!(guest.received(), [(heads[0], 512), (heads[1], 512)]);
    assert_eq!(guest.bytes(0, 1024), merged(frame(1024, 1), 2));
}

#[test]
fn writes_the_header_across_pieces() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    let head = guest
        .rx
        .offer(&[writable(BUFFERS, 11), writable(BUFFERS + 11, 500)]);
    guest.wire.send(&frame(200, 1)).unwrap();
    guest.tap_event();
    assert_eq!(guest.received(), [(head, 200)]);
    assert_eq!(guest.bytes(0, 200), merged(frame(200, 1), 1));
}

#[test]
fn leaves_frames_on_the_host_until_there_are_buffers() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    guest.wire.send(&frame(100, 1)).unwrap();
    guest.tap_event();
    assert_eq!(
        (guest.counter("no_rx_avail_buffer"), guest.rx.notify_wish().0),
        (1, 0)
    );
    let heads = guest.offer_rx(0, 1, 1536);
    guest.kick_rx();
    assert_eq!(guest.received(), [(heads[0], 100)]);
}

#[test]
fn needs_no_notification_while_the_host_has_no_frame() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    guest.offer_rx(0, 2, 1536);
    guest.tap_event();
    assert_eq!(guest.rx.notify_wish().0, 1);
    assert_eq!(guest.counter("no_rx_avail_buffer"), 0);
}

#[test]
fn holds_a_frame_until_the_guest_has_enough_buffers() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 64);
    let mut heads = guest.offer_rx(0, 4, 1536);
    guest.wire.send(&frame(20_000, 1)).unwrap();
    guest.wire.send(&frame(100, 2)).unwrap();
    guest.tap_event();
    assert_eq!((guest.received(), guest.rx.notify_wish().0), (vec![], 0));
    heads.extend(guest.offer_rx(4, 4, 1536));
    guest.kick_rx();
    assert_eq!(guest.received(), []);
    heads.extend(guest.offer_rx(8, 8, 1536));
    guest.kick_rx();

    let received = guest.received();
    let used: Vec<_> = received.iter().map(|(head, _)| *head).collect();
    assert_eq!(used, heads[..15]);
    assert_eq!(guest.bytes(0, 20_000), merged(frame(20_000, 1), 14));
    assert_eq!(guest.bytes(14 * 1536, 100), merged(frame(100, 2), 1));
}

#[test]
fn drops_a_frame_that_a_full_queue_could_not_take() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 4);
    let heads = guest.offer_rx(0, 4, 1536);
    guest.wire.send(&frame(20_000, 1)).unwrap();
    guest.wire.send(&frame(100, 2)).unwrap();
    guest.tap_event();
    assert_eq!(guest.received(), [(heads[0], 100)]);
    assert_eq!(guest.counter("rx_fails"), 1);
    assert_eq!(guest.bytes(0, 100), merged(frame(100, 2), 1));
}

#[test]
fn drops_a_frame_longer_than_any_should_be() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 256);
    let heads = guest.offer_rx(0, 200, 1536);
    guest.wire.send(&frame(MAX_FRAME_LEN + 1, 1)).unwrap();
    guest.wire.send(&frame(MAX_FRAME_LEN, 2)).unwrap();
    guest.tap_event();
    let received = guest.received();
    assert_eq!(
        (received.len(), received[0], guest.counter("rx_fails")),
        (43, (heads[0], 1536), 1)
    );
    assert_eq!(guest.bytes(0, MAX_FRAME_LEN), merged(frame(MAX_FRAME_LEN, 2), 43));
}

#[test]
fn forgets_a_held_frame_on_reset() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 64);
    guest.offer_rx(0, 4, 1536);
    guest.wire.send(&frame(20_000, 1)).unwrap();
    guest.tap_event();
    guest.net.reset();
    guest.offer_rx(4, 40, 1536);
    guest.kick_rx();
    assert_eq!(guest.received(), []);
}

#[test]
fn gives_each_frame_one_chain_without_mergeable_buffers() {
    let mem = ram();
    let mut guest = Guest::with(&mem, 8, 0);
    let heads = guest.offer_rx(0, 4, 512);
    guest.wire.send(&frame(600, 1)).unwrap();
    guest.wire.send(&frame(512, 2)).unwrap();
    guest.wire.send(&frame(60, 3)).unwrap();
    guest.tap_event();
    assert_eq!(guest.received(), [(heads[0], 512), (heads[1], 60)]);
    assert_eq!(guest.counter("rx_fails"), 1);
    assert_eq!(guest.bytes(0, 512), merged(frame(512, 2), 1));
    assert_eq!(guest.bytes(512, 60), merged(frame(60, 3), 1));
}

#[test]
fn reads_into_no_more_pieces_than_the_kernel_takes() {
    let mem = memory(16 << 20);
    let mut guest = Guest::new(&mem, 256);
    let mut heads = vec![];
    for chain in 0..11u64 {
        let piece = |i| writable(BUFFERS + (chain * 250 + i) * 16, 16);
        let pieces: Vec<_> = (0..250).map(piece).collect();
        heads.push(guest.rx.offer_indirect(0x80_0000 + chain * 0x1000, &pieces));
    }
    guest.wire.send(&frame(14_000, 1)).unwrap();
    guest.wire.send(&frame(17_000, 2)).unwrap();
    guest.wire.send(&frame(100, 3)).unwrap();
    guest.tap_event();
    let used = [
        (heads[0], 4000),
        (heads[1], 4000),
        (heads[2], 4000),
        (heads[3], 2000),
        (heads[4], 100),
    ];
    assert_eq!(guest.received(), used);
    assert_eq!(guest.bytes(0, 14_000), merged(frame(14_000, 1), 4));
    assert_eq!(guest.counter("rx_fails"), 1);
}

#[test]
fn leaves_what_is_beyond_a_turn_for_later() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 256);
    guest.offer_rx(0, 256, 128);
    for i in 0..100 {
        guest.wire.send(&frame(20, i)).unwrap();
    }
    guest.tap_event();
    assert_eq!((guest.received().len(), guest.again), (64, Some(RX)));
    guest.kick_rx();
    assert_eq!((guest.received().len(), guest.again), (36, None));
}

#[test]
fn waits_for_a_queue_that_is_not_ready() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    guest.wire.send(&frame(100, 1)).unwrap();
    let ready = guest.queues[0];
    guest.queues[0] = Queue::new(crate::virtio::QueueConfig::new(8), false, &mem).unwrap();
    guest.tap_event();
    guest.queues[0] = ready;
    guest.offer_rx(0, 1, 1536);
    guest.kick_rx();
    assert_eq!(guest.received().len(), 1);
}

#[test]
fn reports_a_buffer_smaller_than_the_header() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    guest.offer_rx(0, 1, 11);
    assert!(guest.call(|net, io| net.on_event(0, io)).is_err());
    assert_eq!(guest.counter("event_fails"), 1);
}

#[test]
fn stops_when_the_host_has_gone() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    guest.offer_rx(0, 4, 1536);
    guest.wire = UnixDatagram::unbound().unwrap();
    guest.tap_event();
    assert_eq!((guest.counter("tap_read_fails"), guest.again), (1, None));
    assert_eq!(guest.received(), []);
}
