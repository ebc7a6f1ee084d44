//! Arbitrary rings: nothing panics, and nothing is written that the drive does not have.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// An image of 8 sectors and a tail that the guest must not reach.
const LEN: usize = 8 * 512 + 100;

fn piece() -> impl Strategy<Value = Piece> {
    let place = prop_oneof![8 => DATA..DATA + 0x1000, 1 => 0u64..0x11000, 1 => any::<u64>()];
    let len =
        prop_oneof![8 => (0u32..8).prop_map(|sectors| 512 * sectors), 1 => 0u32..5000, 1 => any::<u32>()];
    (place, len, any::<bool>()).prop_map(|(address, len, write)| Piece { address, len, write })
}

/// Mostly a header, data and a status byte.
fn chain() -> impl Strategy<Value = Vec<Piece>> {
    let header = (0u64..8).prop_map(|i| readable(HEADER + 32 * i, 16));
    let ends = (
        prop_oneof![8 => header, 1 => piece()],
        prop_oneof![8 => Just(writable(STATUS, 1)), 1 => piece()],
    );
    (ends, vec(piece(), 0..3)).prop_map(|((first, last), data)| {
        let mut chain = [vec![first], data, vec![last]].concat();
        chain.sort_by_key(|piece| piece.write);
        chain
    })
}

fn header() -> impl Strategy<Value = (u32, u64)> {
    (
        prop_oneof![Just(OUT), 0u32..12],
        prop_oneof![4 => 0u64..12, 1 => any::<u64>()],
    )
}

fn serve(image: &TempFile, guest: &mut Guest<'_>) {
    let mut device = device(image);
    for _ in 0..4 {
        // A driver that breaks the protocol is refused, which is as good an answer as any.
        let _ = guest.kick(&mut device);
    }
    let content = content(image);
    assert_eq!(content.len(), LEN);
    assert_eq!(content[8 * 512..], [9; 100]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn chains_of_any_shape_stay_within_the_disk(
        headers in vec(header(), 8),
        chains in vec(chain(), 1..8),
    ) {
        let (image, mem) = (image(LEN), testing::memory(1 << 18));
        let mut guest = Guest::new(&mem);
        for (at, (kind, sector)) in (HEADER..).step_by(32).zip(headers) {
            guest.header(at, kind, sector);
        }
        for chain in chains {
            guest.driver.offer(&chain);
        }
        serve(&image, &mut guest);
    }

    #[test]
    fn rings_of_noise_stay_within_the_disk(noise in vec(any::<u8>(), 0x3000), ahead in 0u16..260) {
        let (image, mem) = (image(LEN), testing::memory(1 << 18));
        let mut guest = Guest::new(&mem);
        guest.fill(0, &noise);
        guest.driver.set_avail_index(ahead);
        serve(&image, &mut guest);
    }
}
