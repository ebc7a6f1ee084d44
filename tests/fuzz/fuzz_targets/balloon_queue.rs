//! A balloon whose driver does anything while the user changes it: nothing panics, the driver changes no field of the
//! configuration space but its own, and what is given back are whole pages.
#![no_main]

use arbitrary::Arbitrary;
use devices::virtio::balloon::{Config, Patch, StartHinting, TargetPatch};
use libfuzzer_sys::fuzz_target;
use mayfly_fuzz::driver::{DATA, HEADERS, Machine, Op, piece};
use serde_json::json;

/// Pages that requests of ours name: the data's.
const FIRST_PFN: u32 = (DATA >> 12) as u32;

#[derive(Arbitrary, Debug)]
enum Step {
    Driver(Op),
    /// Page numbers to inflate or deflate.
    Pages(bool, Vec<u8>),
    /// Entries of statistics.
    Statistics(Vec<(u8, u64)>),
    /// A command of hinting.
    Command(u32),
    /// Free ranges, hinted or reported: page and offset, length.
    Free(bool, Vec<(u8, u8, u16)>),
    /// The driver writes to the configuration space.
    Config(u8, [u8; 4]),
    Target(u32),
    Start(bool),
    Stop,
}

fn send(machine: &mut Machine<'_>, queue: u8, bytes: &[u8]) {
    machine.write(HEADERS, bytes);
    machine.offer(queue, &[piece(HEADERS, bytes.len() as u32, false)], false);
    machine.kick(queue);
}

fn patch(machine: &mut Machine<'_>, patch: &Patch) {
    // A device that needs a reset, or a target that is too large, refuses it.
    let _ = machine.try_update(json!(patch));
}

fn run(machine: &mut Machine<'_>, step: &Step) {
    match step {
        Step::Driver(op) => machine.run(op),
        Step::Pages(inflate, pages) => {
            let numbers = pages.iter().take(64).map(|page| FIRST_PFN + u32::from(*page));
            let bytes: Vec<u8> = numbers.flat_map(u32::to_le_bytes).collect();
            send(machine, u8::from(!inflate), &bytes);
        }
        Step::Statistics(entries) => {
            let mut bytes = Vec::new();
            for (tag, value) in entries.iter().take(24) {
                bytes.extend(u16::from(*tag).to_le_bytes());
                bytes.extend(value.to_le_bytes());
            }
            send(machine, 2, &bytes);
        }
        Step::Command(command) => send(machine, 3, &command.to_le_bytes()),
        Step::Free(reported, ranges) => {
            let ranges = ranges.iter().take(8).map(|&(page, offset, len)| {
                let at = DATA + (u64::from(page % 32) << 12) + u64::from(offset);
                piece(at, u32::from(len), true)
            });
            let queue = 3 + u8::from(*reported);
            machine.offer(queue, &ranges.collect::<Vec<_>>(), false);
            machine.kick(queue);
        }
        Step::Config(offset, bytes) => {
            let others = [0, 8].map(|field| machine.config(field));
            machine.write_config(u64::from(*offset), bytes);
            assert_eq!([0, 8].map(|field| machine.config(field)), others);
        }
        Step::Target(amount_mib) => {
            let amount_mib = *amount_mib;
            patch(machine, &Patch::Target(TargetPatch { amount_mib }));
        }
        Step::Start(acknowledge_on_stop) => {
            let acknowledge_on_stop = *acknowledge_on_stop;
            patch(
                machine,
                &Patch::StartHinting(StartHinting { acknowledge_on_stop }),
            );
        }
        Step::Stop => patch(machine, &Patch::StopHinting),
    }
}

fuzz_target!(|input: (u64, Vec<Step>)| {
    let (features, steps) = input;
    let config = Config {
        amount_mib: 1,
        deflate_on_oom: true,
        stats_polling_interval_s: u16::MAX,
        free_page_hinting: true,
        free_page_reporting: true,
    };
    let mem = mayfly_fuzz::memory();
    let device = config.build().expect("the host has a timer left");
    let mut machine = Machine::new(&mem, Box::new(device), features);
    for step in &steps {
        run(&mut machine, step);
    }
    let metrics = machine.metrics();
    for name in ["free_page_report_freed", "free_page_hint_freed"] {
        let bytes = metrics[name].as_u64().expect("a counter");
        assert!(bytes.is_multiple_of(4096), "{name}: {bytes}");
    }
});
