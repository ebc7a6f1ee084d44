//! A network card on a tap or on passt, whose driver does anything, while frames of any length arrive and the user changes
//! it: nothing panics, and no frame leaves that a tap would not take.
#![no_main]

use arbitrary::Arbitrary;
use devices::virtio::VirtioDevice;
use devices::virtio::net::{HEADER_LEN, MAX_FRAME_LEN, RX, TX};
use libfuzzer_sys::fuzz_target;
use mayfly_fuzz::driver::{DATA, HEADERS, Machine, Op, limits, piece};
use mayfly_fuzz::wire::{self, Far};
use serde_json::json;

#[derive(Arbitrary, Debug)]
enum Step {
    Driver(Op),
    /// A frame comes from the network.
    Frame(u16, u8),
    /// Something that may be no frame comes.
    Bytes(Vec<u8>),
    /// The control thread pulls the cable or plugs it in.
    Link(bool),
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

fuzz_target!(|input: (u64, bool, Vec<Step>)| {
    let (features, on_passt, steps) = input;
    let (card, mut far): (Box<dyn VirtioDevice>, Far) = if on_passt {
        let (card, far) = wire::passt_card();
        (Box::new(card), far)
    } else {
        let (card, far) = wire::card();
        (Box::new(card), far)
    };
    let mem = mayfly_fuzz::memory();
    let mut machine = Machine::new(&mem, card, features);
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
            Step::Link(up) => {
                let state = if *up { "up" } else { "down" };
                machine.update(json!({"iface_id": "eth0", "link_state": state}));
            }
            Step::Frame(length, fill) => {
                frame.fill(*fill);
                far.send(&frame[..HEADER_LEN + usize::from(*length)]);
                machine.ready();
            }
            Step::Bytes(bytes) => {
                far.send_raw(bytes);
                machine.ready();
            }
        }
        far.drain();
    }
});
