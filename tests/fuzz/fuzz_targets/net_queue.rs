//! A network card on a tap, with one pair of queues or two, or on passt, whose driver does anything, while frames of any length arrive and the user changes
//! it: nothing panics, and no frame leaves that a tap would not take.
#![no_main]

use arbitrary::Arbitrary;
use devices::virtio::VirtioDevice;
use devices::virtio::net::{HEADER_LEN, MAX_FRAME_LEN, RX, TX};
use libfuzzer_sys::fuzz_target;
use mayfly_fuzz::driver::{DATA, HEADER_STEP, HEADERS, Machine, Op, limits, piece};
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
    /// A command for the control queue, of which so many bytes are there, to where a driver with MQ has it or without.
    Command([u8; 6], u8, bool),
}

#[derive(Arbitrary, Debug, Clone, Copy)]
enum Kind {
    Tap,
    Pairs,
    Passt,
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

fn card(kind: Kind) -> (Box<dyn VirtioDevice>, Far) {
    match kind {
        Kind::Tap => {
            let (card, far) = wire::card();
            (Box::new(card), far)
        }
        Kind::Pairs => {
            let (card, far) = wire::card_with_pairs();
            (Box::new(card), far)
        }
        Kind::Passt => {
            let (card, far) = wire::passt_card();
            (Box::new(card), far)
        }
    }
}

fn command(machine: &mut Machine<'_>, bytes: &[u8; 6], length: u8, with_mq: bool) {
    let control = if with_mq { machine.slot().queue_count() - 1 } else { 2 };
    machine.write(HEADERS, bytes);
    let chain = [
        piece(HEADERS, u32::from(length % 7), false),
        piece(HEADERS + HEADER_STEP, 1, true),
    ];
    machine.offer(control as u8, &chain, false);
    machine.kick(control as u8);
}

fuzz_target!(|input: (u64, Kind, Vec<Step>)| {
    let (features, kind, steps) = input;
    let (card, mut far) = card(kind);
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
            Step::Command(bytes, length, with_mq) => command(&mut machine, bytes, *length, *with_mq),
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
