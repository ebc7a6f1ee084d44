//! Arbitrary requests: nothing panics, each is answered once, and no more than a response is written.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// Where buffers lie.
const DATA: u64 = 0x10000;
const DATA_LEN: usize = 0x1000;

fn piece() -> impl Strategy<Value = Piece> {
    let len = prop_oneof![4 => 0u32..6, 1 => 0u32..0x800];
    (DATA..DATA + 0x800, len, any::<bool>()).prop_map(|(address, len, write)| Piece { address, len, write })
}

fn chain() -> impl Strategy<Value = Vec<Piece>> {
    vec(piece(), 1..5).prop_map(|mut pieces| {
        pieces.sort_by_key(|piece| piece.write);
        pieces
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn every_request_is_answered_once_with_at_most_a_word(chains in vec(chain(), 1..4)) {
        let mem = testing::memory(MIB);
        let (mut device, mut guest) = (device(), Guest::new(&mem, false));
        mem.write_slice(&[0x55; DATA_LEN], GuestAddress(DATA)).unwrap();
        let heads: Vec<_> = chains.iter().map(|chain| guest.offer_raw(chain)).collect();

        guest.kick(&mut device).unwrap();
        device.quiesce(&mut guest.lend()).unwrap();

        let answers: Vec<_> = std::iter::from_fn(|| guest.driver.used()).collect();
        prop_assert_eq!(answers.iter().map(|answer| answer.0).collect::<Vec<_>>(), heads);
        let room = |chain: &Vec<Piece>| chain.iter().filter(|p| p.write).map(|p| p.len).sum::<u32>();
        let written: Vec<_> = chains.iter().map(|chain| room(chain).min(4)).collect();
        prop_assert_eq!(answers.iter().map(|answer| answer.1).collect::<Vec<_>>(), written.clone());
        let mut data = [0; DATA_LEN];
        mem.read_slice(&mut data, GuestAddress(DATA)).unwrap();
        let changed = data.iter().filter(|byte| **byte != 0x55).count();
        prop_assert!(changed <= written.iter().sum::<u32>() as usize);
    }

    #[test]
    fn rings_of_noise_do_no_harm(noise in vec(any::<u8>(), 0x300), ahead in 0u16..20) {
        let mem = testing::memory(MIB);
        let (mut device, mut guest) = (device(), Guest::new(&mem, true));
        mem.write_slice(&noise, GuestAddress(RINGS)).unwrap();
        guest.driver.set_avail_index(ahead);
        for _ in 0..3 {
            // A driver that breaks the protocol is refused, which is as good an answer as any.
            let _ = guest.kick(&mut device);
            let _ = device.quiesce(&mut guest.lend());
        }
        prop_assert!(device.metrics()["queue_event_count"] == 3);
    }
}
