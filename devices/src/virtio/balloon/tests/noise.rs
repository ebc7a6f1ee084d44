//! Arbitrary rings: nothing panics, and no memory is lost but what was given away.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// From here on no request names a page.
const SAFE: u64 = 0xc_0000;

fn piece() -> impl Strategy<Value = Piece> {
    let place =
        prop_oneof![8 => REQUEST..REQUEST + 0x2000, 4 => FIRST..FIRST + 0x1_0000, 1 => MEMORY as u64..];
    let len = prop_oneof![8 => 0u32..64, 4 => (0u32..8).prop_map(|pages| pages << 12)];
    (place, len, any::<bool>()).prop_map(|(address, len, write)| Piece { address, len, write })
}

/// Words that requests consist of: pages, most of them in memory, and commands. As buffers begin and end anywhere, any
/// bytes make up a word: without those from 0xc0 on, none of them is a page from [`SAFE`] on.
fn word() -> impl Strategy<Value = u32> {
    let anywhere = any::<u32>().prop_map(|word| word & 0xbfbf_bfbf | 0x100);
    prop_oneof![8 => FIRST_PFN..FIRST_PFN + 0x20, 1 => anywhere, 4 => 0u32..6]
}

#[derive(Debug, Clone)]
enum Step {
    Offer(u16, Vec<Piece>),
    Start(bool),
    Stop,
    Expire,
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0u16..5, vec(piece(), 1..4)).prop_map(|(queue, mut pieces)| {
            pieces.sort_by_key(|piece| piece.write);
            Step::Offer(queue, pieces)
        }),
        2 => any::<bool>().prop_map(Step::Start),
        1 => Just(Step::Stop),
        1 => Just(Step::Expire),
        1 => Just(Step::Reset),
    ]
}

fn follow(guest: &mut Guest<'_>, step: Step) {
    match step {
        Step::Offer(queue, pieces) => {
            guest.drivers[usize::from(queue)].offer(&pieces);
            // A driver that breaks the protocol is refused, which is as good an answer as any.
            let _ = guest.kick(queue);
        }
        Step::Start(acknowledge_on_stop) => {
            guest
                .patch(&Patch::StartHinting(StartHinting { acknowledge_on_stop }))
                .unwrap();
        }
        Step::Stop => guest.patch(&Patch::StopHinting).unwrap(),
        Step::Expire => {
            let _ = guest.run(|device, io| device.on_event(0, io));
        }
        Step::Reset => {
            guest.device.reset();
            guest.run(|device, io| device.activate(io)).unwrap();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_request_reaches_memory_that_it_does_not_name(words in vec(word(), 64), steps in vec(step(), 1..24)) {
        let mem = memory();
        let mut guest = Guest::new(&mem, &full_config());
        for (at, word) in (REQUEST..).step_by(4).zip(words) {
            mem.write_obj(word, GuestAddress(at)).unwrap();
        }
        for step in steps {
            follow(&mut guest, step);
        }
        let mut rest = vec![0; MEMORY - usize::try_from(SAFE).unwrap()];
        mem.read_slice(&mut rest, GuestAddress(SAFE)).unwrap();
        prop_assert!(rest.iter().all(|byte| *byte == 0xaa));
    }
}
