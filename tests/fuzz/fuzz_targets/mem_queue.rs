//! Hotpluggable memory whose driver does anything: nothing panics, the sizes that the driver and the user see agree, and
//! slots of memory are there exactly while a block in them is plugged.
#![no_main]

use arbitrary::Arbitrary;
use devices::testing::{LEDGER_START, Ledger};
use devices::virtio::VirtioDevice;
use devices::virtio::mem::{Config, Status};
use libfuzzer_sys::fuzz_target;
use mayfly_fuzz::driver::{DATA, HEADERS, Machine, Op, piece};
use serde_json::json;

const MIB: u64 = 1 << 20;
/// MiB in a block, a slot and all: few, so that requests meet.
const BLOCK: u32 = 8;
const SLOT: u32 = 128;
const TOTAL: u32 = 512;

#[derive(Arbitrary, Debug)]
enum Step {
    Driver(Op),
    /// A request as a driver means it: its type, first block and count of blocks.
    Request(u8, u8, u8),
    /// A request with an address and a count that nobody means.
    Wild(u16, u64, u16),
    /// The user requests blocks, or what cannot be had.
    Resize(u16),
    /// The host has no memory, or has some again.
    Refuse(bool),
}

fn request(machine: &mut Machine<'_>, kind: u16, address: u64, count: u16) {
    machine.write(HEADERS, &u64::from(kind).to_le_bytes());
    machine.write(HEADERS + 8, &address.to_le_bytes());
    machine.write(HEADERS + 16, &u64::from(count).to_le_bytes());
    machine.offer(0, &[piece(HEADERS, 24, false), piece(DATA, 10, true)], false);
    machine.kick(0);
}

fn config() -> Config {
    Config {
        total_size_mib: TOTAL,
        block_size_mib: BLOCK,
        slot_size_mib: SLOT,
    }
}

/// What must hold at any time.
fn check(machine: &mut Machine<'_>, ledger: &Ledger) {
    let status: Status = serde_json::from_value(machine.slot().device_status()).expect("a status");
    let slots = ledger.account().slots.len() as u32;
    assert!(status.plugged_size_mib <= slots * SLOT && slots * BLOCK <= status.plugged_size_mib);
    let mut fields = [0; 56];
    machine.slot().read_config(0, &mut fields);
    let field = |index: usize| {
        let bytes = fields[8 * index..][..8].try_into().expect("eight bytes");
        u64::from_le_bytes(bytes) / MIB
    };
    assert_eq!(field(5), u64::from(status.plugged_size_mib));
    assert_eq!(field(6), u64::from(status.requested_size_mib));
    assert!(field(4) >= field(6) && field(4) <= u64::from(TOTAL));
}

fuzz_target!(|input: (u64, Vec<Step>)| {
    let (features, steps) = input;
    let (mem, ledger) = (mayfly_fuzz::memory(), Ledger::default());
    let device = config().build(&ledger).expect("the config is fine");
    let mut machine = Machine::new(&mem, Box::new(device), features);
    for step in &steps {
        match *step {
            Step::Driver(ref op) => machine.run(op),
            Step::Request(kind, first, count) => {
                let address = LEDGER_START + u64::from(first % 66) * u64::from(BLOCK) * MIB;
                request(&mut machine, u16::from(kind % 4), address, u16::from(count % 40));
            }
            Step::Wild(kind, address, count) => request(&mut machine, kind, address, count),
            Step::Resize(size) => {
                // What is refused has changed nothing, which is checked below.
                let _ = machine.slot().update(json!({ "requested_size_mib": size }));
            }
            Step::Refuse(refuse) => ledger.account().refuse = refuse,
        }
        check(&mut machine, &ledger);
    }
    ledger.account().refuse = false;
    let saved = serde_json::to_value(machine.slot().save()).expect("plain data");
    let state = serde_json::from_value(saved["device"].clone()).expect("a device's state");
    let other = Ledger::default();
    let mut copy = config().build(&other).expect("the config is fine");
    copy.load(state).expect("what was saved can be loaded");
    assert_eq!(other.account().slots, ledger.account().slots);
});
