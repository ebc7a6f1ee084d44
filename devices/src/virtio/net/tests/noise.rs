use proptest::prelude::*;

use super::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn survives_any_rings_and_frames(
        rings in prop::collection::vec((0u64..0x300, any::<[u8; 4]>()), 0..64),
        avail in any::<[u16; 2]>(),
        frames in prop::collection::vec(1usize..70_000, 0..3),
        mergeable: bool,
    ) {
        let mem = ram();
        let mut guest = Guest::with(&mem, 16, if mergeable { MRG_RXBUF } else { 0 });
        guest.offer_rx(0, 8, 600);
        for (offset, bytes) in &rings {
            for base in [0x1000, 0x8_0000] {
                mem.write_slice(bytes, GuestAddress(base + offset)).unwrap();
            }
        }
        guest.rx.set_avail_index(avail[0] % 32);
        guest.tx.set_avail_index(avail[1] % 32);
        for len in frames {
            let _ = guest.wire.send(&vec![1; len]);
        }
        let _ = guest.call(|net, io| net.on_queue(TX, io));
        let _ = guest.call(|net, io| net.on_event(0, io));
        let _ = guest.call(|net, io| net.on_queue(RX, io));
    }
}
