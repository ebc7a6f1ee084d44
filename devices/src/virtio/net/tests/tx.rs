use super::super::MAX_FRAME_LEN;
use super::*;
use crate::testing::readable;

impl Guest<'_> {
    /// Puts `bytes` at `BUFFERS + offset`.
    fn store(&self, offset: u64, bytes: &[u8]) {
        self.mem
            .write_slice(bytes, GuestAddress(BUFFERS + offset))
            .unwrap();
    }

    fn sent(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 1 << 17];
        let len = self.wire.recv(&mut bytes).ok()?;
        bytes.truncate(len);
        Some(bytes)
    }
}

#[test]
fn sends_the_pieces_of_a_chain_as_one_frame() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    let bytes = frame(3000, 1);
    guest.store(0, &bytes);
    let head = guest.tx.offer(&[
        readable(BUFFERS, 7),
        readable(BUFFERS + 7, 993),
        readable(BUFFERS + 1000, 2000),
    ]);
    guest.kick_tx();
    assert_eq!(guest.sent(), Some(bytes));
    assert_eq!(guest.tx.used(), Some((head, 0)));
    assert_eq!(
        (guest.counter("tx_packets_count"), guest.counter("tx_bytes_count")),
        (1, 3000)
    );
}

#[test]
fn sends_the_longest_frame() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    let bytes = frame(MAX_FRAME_LEN, 1);
    guest.store(0, &bytes);
    guest
        .tx
        .offer(&[readable(BUFFERS, u32::try_from(MAX_FRAME_LEN).unwrap())]);
    guest.kick_tx();
    assert_eq!(guest.sent(), Some(bytes));
}

#[test]
fn interrupts_once_for_a_batch_of_frames() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    for _ in 0..5 {
        guest.tx.offer(&[readable(BUFFERS, 60)]);
    }
    guest.kick_tx();
    assert_eq!(guest.recorder.take_interrupts(), 1);
    assert_eq!(guest.counter("tx_count"), 5);
}

#[test]
fn asks_for_notification_once_the_queue_is_empty() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    guest.tx.offer(&[readable(BUFFERS, 60)]);
    guest.kick_tx();
    assert_eq!(guest.tx.notify_wish().0, 0);
    guest.kick_tx();
    assert_eq!(guest.counter("no_tx_avail_buffer"), 1);
}

#[test]
fn completes_and_counts_what_is_no_frame() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    let short = guest.tx.offer(&[readable(BUFFERS, 25)]);
    let long = guest
        .tx
        .offer(&[readable(BUFFERS, u32::try_from(MAX_FRAME_LEN + 1).unwrap())]);
    let empty = guest.tx.offer(&[writable(BUFFERS, 60)]);
    guest.kick_tx();
    let used = [guest.tx.used(), guest.tx.used(), guest.tx.used()];
    assert_eq!(used, [Some((short, 0)), Some((long, 0)), Some((empty, 0))]);
    assert_eq!(guest.counter("tx_malformed_frames"), 3);
    assert_eq!(guest.sent(), None);
}

#[test]
fn counts_frames_under_a_foreign_address_and_sends_them() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    let mut bytes = frame(60, 1);
    guest.store(0, &bytes);
    bytes[18..24].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    guest.store(100, &bytes);
    guest.tx.offer(&[readable(BUFFERS, 60)]);
    guest
        .tx
        .offer(&[readable(BUFFERS + 100, 20), readable(BUFFERS + 120, 40)]);
    guest.kick_tx();
    assert_eq!(guest.counter("tx_spoofed_mac_count"), 1);
    assert_eq!(guest.counter("tx_packets_count"), 2);
}

#[test]
fn loses_a_frame_that_the_host_refuses() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    guest.wire = UnixDatagram::unbound().unwrap();
    let head = guest.tx.offer(&[readable(BUFFERS, 60)]);
    guest.kick_tx();
    assert_eq!(guest.tx.used(), Some((head, 0)));
    assert_eq!(
        (guest.counter("tap_write_fails"), guest.counter("tx_fails")),
        (1, 1)
    );
}

#[test]
fn leaves_what_is_beyond_a_turn_for_later() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 128);
    guest.wire = UnixDatagram::unbound().unwrap();
    for _ in 0..100 {
        guest.tx.offer(&[readable(BUFFERS, 60)]);
    }
    guest.kick_tx();
    assert_eq!((guest.again, guest.counter("tx_fails")), (Some(TX), 64));
    assert_eq!(guest.counter("tx_remaining_reqs_count"), 36);
    guest.kick_tx();
    assert_eq!((guest.again, guest.counter("tx_fails")), (None, 100));
}

#[test]
fn reports_a_frame_outside_of_guest_memory() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    guest.tx.offer(&[readable(0xffff_0000, 60)]);
    assert!(guest.call(|net, io| net.on_queue(TX, io)).is_err());
    assert_eq!(guest.counter("event_fails"), 1);
}
