//! A pmem device whose driver does anything: nothing panics, and requests do nothing to the file.
#![no_main]

use std::fs;
use std::sync::LazyLock;

use arbitrary::Arbitrary;
use devices::testing::Ledger;
use devices::virtio::pmem::Config;
use libfuzzer_sys::fuzz_target;
use mayfly_fuzz::driver::{DATA, HEADERS, Machine, Op, piece};

/// The file, in memory, one for this process.
static FILE: LazyLock<String> = LazyLock::new(|| {
    let path = format!("/dev/shm/mayfly-fuzz-pmem-{}", std::process::id());
    fs::write(&path, CONTENT).expect("there is room in /dev/shm");
    path
});
const CONTENT: [u8; 5000] = [9; 5000];

#[derive(Arbitrary, Debug)]
enum Step {
    Driver(Op),
    /// A request as a driver means it: its type, and the length of the response.
    Request(u8, u8),
}

fuzz_target!(|input: (bool, bool, u64, Vec<Step>)| {
    let (read_only, limited, features, steps) = input;
    let limits = r#"{"ops":{"size":3,"refill_time":100000}}"#;
    let config = Config {
        id: "pmem".into(),
        path_on_host: FILE.clone(),
        root_device: false,
        read_only,
        rate_limiter: limited.then(|| serde_json::from_str(limits).expect("limits")),
    };
    let mem = mayfly_fuzz::memory();
    let device = config.build(&Ledger::default()).expect("the file is fine");
    let mut machine = Machine::new(&mem, Box::new(device), features);
    for step in &steps {
        match *step {
            Step::Driver(ref op) => machine.run(op),
            Step::Request(kind, room) => {
                machine.write(HEADERS, &u64::from(kind % 2).to_le_bytes());
                let response = piece(DATA, u32::from(room % 6), true);
                machine.offer(0, &[piece(HEADERS, 4, false), response], false);
                machine.kick(0);
            }
        }
    }
    drop(machine);
    assert_eq!(fs::read(&*FILE).expect("the file is still there"), CONTENT);
});
