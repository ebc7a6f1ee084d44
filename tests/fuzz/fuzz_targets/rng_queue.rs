//! An entropy device whose driver does anything: nothing panics, and no request gets more than there is room for.
#![no_main]

use arbitrary::Arbitrary;
use devices::virtio::rng::Config;
use libfuzzer_sys::fuzz_target;
use mayfly_fuzz::driver::{DATA, Machine, Op, limits, piece};

#[derive(Arbitrary, Debug)]
enum Step {
    Driver(Op),
    /// A request as a driver means it: pieces of these offsets and lengths.
    Request(Vec<(u16, u16)>, bool),
}

fuzz_target!(|input: (Option<(u8, u16)>, u64, Vec<Step>)| {
    let (limit, features, steps) = input;
    let config = Config {
        rate_limiter: limit.map(|(ops, bytes)| serde_json::from_value(limits(ops, bytes)).expect("limits")),
    };
    let mem = mayfly_fuzz::memory();
    let mut machine = Machine::new(&mem, Box::new(config.build()), features);
    let mut only_requests = true;
    let mut room = 0;
    for step in &steps {
        match step {
            Step::Driver(op) => {
                only_requests = false;
                machine.run(op);
            }
            Step::Request(pieces, indirect) => {
                let pieces = pieces.iter().take(8);
                room += pieces.clone().map(|&(_, len)| u64::from(len)).sum::<u64>();
                let pieces = pieces.map(|&(offset, len)| piece(DATA + u64::from(offset), len.into(), true));
                machine.offer(0, &pieces.collect::<Vec<_>>(), *indirect);
                machine.kick(0);
            }
        }
    }
    let given = machine.metrics()["entropy_bytes"].as_u64().expect("a counter");
    assert!(!only_requests || given <= room, "{given} bytes in {room}");
});
