//! A network card whose driver does anything, while frames of any length arrive: nothing panics, and no frame leaves that
//! a tap would not take.
#![no_main]

use arbitrary::Arbitrary;
use devices::virtio::net::{HEADER_LEN, MAX_FRAME_LEN, RX, TX};
use libfuzzer_sys::fuzz_target;
use mayfly_fuzz::driver::{DATA, HEADERS, Machine, Op, limits, piece};
use mayfly_fuzz::wire;
use serde_json::json;

#[derive(Arbitrary, Debug)]
enum Step {
    Driver(Op),
    /// A frame comes from the network.
    Frame(u16, u8),
    /// Room for what comes, in pieces of these offsets and lengths.
    Receive(Vec<(u16, u16)>, bool),
    /// A frame leaves, in pieces of these offsets and lengths.
    Send(Vec<(u16, u16)>, bool),
    /// The control thread limits frames and bytes, in both directions or of what is received.
    Limit(u8, u16, bool),
}

/// Offers a well-formed chain, and kicks.
fn offer(machine: &mut Machine<'_>, queue: u16, pieces: &[(u16, u16)], indirect: bool) {
    let queue = queue as u8;
    let write = u16::from(queue) == RX;
    let data = pieces
        .iter()
        .take(8)
        .map(|&(offset, len)| piece(DATA + u64::from(offset), u32::from(len), write));
    let chain: Vec<_> = std::iter::once(piece(HEADERS, HEADER_LEN as u32, write))
        .chain(data)
        .collect();
    machine.offer(queue, &chain, indirect);
    machine.kick(queue);
}

fuzz_target!(|input: (u64, Vec<Step>)| {
    let (features, steps) = input;
    let (card, far) = wire::card();
    let mem = mayfly_fuzz::memory();
    let mut machine = Machine::new(&mem, Box::new(card), features);
    let mut frame = vec![0; MAX_FRAME_LEN + 1];
    for step in &steps {
        match step {
            Step::Driver(op) => machine.run(op),
            Step::Receive(pieces, indirect) => offer(&mut machine, RX, pieces, *indirect),
            Step::Send(pieces, indirect) => offer(&mut machine, TX, pieces, *indirect),
            Step::Limit(ops, bytes, both) => {
                let rx = limits(*ops, *bytes);
                let tx = both.then(|| rx.clone());
                machine.update(json!({"iface_id": "eth0", "rx_rate_limiter": rx, "tx_rate_limiter": tx}));
            }
            Step::Frame(length, fill) => {
                frame.fill(*fill);
                // A full socket drops the frame, as a network may.
                let _ = far.send(&frame[..HEADER_LEN + usize::from(*length)]);
                machine.ready();
            }
        }
        while let Ok(length) = far.recv(&mut frame) {
            assert!(
                (HEADER_LEN..=MAX_FRAME_LEN).contains(&length),
                "a frame of {length} bytes left"
            );
        }
    }
});
