//! Random requests of a driver: what the device has agreed to is what it does.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

fn request() -> impl Strategy<Value = (u16, u64, u16)> {
    let kind = prop_oneof![6 => Just(PLUG), 6 => Just(UNPLUG), 1 => Just(UNPLUG_ALL), 3 => Just(STATE), 1 => any::<u16>()];
    let address = prop_oneof![
        8 => (0u64..514).prop_map(|block| LEDGER_START + block * 2 * MIB),
        1 => any::<u64>(),
    ];
    let count = prop_oneof![4 => 0u16..4, 4 => 0u16..200, 1 => any::<u16>()];
    (kind, address, count)
}

/// What the driver has been promised: a list of blocks.
fn expect(model: &mut [bool], (kind, address, count): (u16, u64, u16), response: (u16, u16)) {
    if kind == UNPLUG_ALL && response.0 == ACK {
        return model.fill(false);
    }
    if response.0 != ACK {
        return;
    }
    let first = usize::try_from((address - LEDGER_START) / (2 * MIB)).unwrap();
    let blocks = &mut model[first..first + usize::from(count)];
    match kind {
        PLUG => {
            assert!(blocks.iter().all(|plugged| !plugged));
            blocks.fill(true);
        }
        UNPLUG => {
            assert!(blocks.iter().all(|plugged| *plugged));
            blocks.fill(false);
        }
        _ => {
            let plugged = blocks.iter().filter(|plugged| **plugged).count();
            let state = match plugged {
                0 => 1,
                plugged if plugged == blocks.len() => 0,
                _ => 2,
            };
            assert_eq!((kind, response.1), (STATE, state));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn slots_sizes_and_answers_agree_after_any_requests(
        steps in vec((request(), prop::option::weighted(0.2, 0u32..513), any::<bool>()), 1..60)
    ) {
        let mem = testing::memory(MEMORY);
        let (mut guest, mut model) = (Guest::new(&mem, 1024), vec![false; 512]);
        for (request, size, refuse) in steps {
            if let Some(blocks) = size {
                guest.request_size(2 * blocks).unwrap();
            }
            guest.ledger.account().refuse = refuse && request.0 == UNPLUG;
            let response = guest.ask_at(request.0, request.1, request.2);
            expect(&mut model, request, response);

            let plugged = model.iter().filter(|plugged| **plugged).count() as u64;
            prop_assert_eq!(guest.field(PLUGGED), plugged * 2 * MIB);
            let slots: Vec<_> = (0u32..).zip(model.chunks(64)).filter(|(_, slot)| slot.contains(&true)).map(|(i, _)| i).collect();
            prop_assert_eq!(guest.slots(), slots);
            let mut copy = config().build(&Ledger::default()).unwrap();
            copy.load(guest.device.save()).unwrap();
            prop_assert_eq!(copy.status(), guest.device.status());
        }
    }

    #[test]
    fn rings_of_noise_do_no_harm(noise in vec(any::<u8>(), 0x300), ahead in 0u16..20) {
        let mem = testing::memory(MEMORY);
        let mut guest = Guest::new(&mem, 1024);
        mem.write_slice(&noise, GuestAddress(RINGS)).unwrap();
        guest.driver.set_avail_index(ahead);
        for _ in 0..3 {
            // A driver that breaks the protocol is refused, which is as good an answer as any.
            let _ = guest.kick();
        }
        prop_assert!(guest.status().plugged_size_mib <= 1024);
    }
}
