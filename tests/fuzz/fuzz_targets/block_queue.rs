//! A disk whose driver does anything, with either engine, any queues, and past the page cache or not: nothing panics, nothing is written behind the disk's last whole
//! sector, and nothing at all to a read-only disk.
#![no_main]

use std::fs;
use std::sync::LazyLock;

use arbitrary::Arbitrary;
use devices::virtio::block::{CacheType, Config, IoEngine};
use libfuzzer_sys::fuzz_target;
use mayfly_fuzz::driver::{DATA, HEADERS, Machine, Op, limits, piece};
use serde_json::json;

/// Sectors of the disk; its image is longer by a tail that is no whole sector.
const SECTORS: usize = 16;
const TAIL: usize = 100;

/// The image, in memory, one for this process.
static IMAGE: LazyLock<String> = LazyLock::new(|| format!("/dev/shm/mayfly-fuzz-{}", std::process::id()));

#[derive(Arbitrary, Debug)]
enum Step {
    Driver(Op),
    /// A request as a driver means it: which queue, its type, sector, data (offset, sectors), and how it is
    /// offered.
    Request {
        queue: u8,
        kind: u8,
        sector: u8,
        data: Vec<(u16, u8)>,
        indirect: bool,
    },
    /// A discard or write-zeroes request: sector, count of sectors, flags.
    Range {
        zeroes: bool,
        sector: u8,
        sectors: u8,
        flags: u8,
    },
    /// The control thread opens the image anew.
    Swap,
    /// The control thread limits operations and bytes.
    Limit(u8, u16),
}

/// Offers a well-formed request, and kicks.
fn request(machine: &mut Machine<'_>, queue: u8, kind: u8, sector: u8, data: &[(u16, u8)], indirect: bool) {
    // All types are below 16; an odd one writes to the disk (virtio 1.2 §5.2.6).
    machine.write(HEADERS, &u64::from(kind % 16).to_le_bytes());
    machine.write(HEADERS + 8, &u64::from(sector % 32).to_le_bytes());
    let data = data.iter().take(8).map(|&(offset, sectors)| {
        piece(
            DATA + u64::from(offset),
            512 * u32::from(sectors % 8),
            kind % 2 == 0,
        )
    });
    let pieces: Vec<_> = std::iter::once(piece(HEADERS, 16, false))
        .chain(data)
        .chain([piece(HEADERS + 16, 1, true)])
        .collect();
    machine.offer(queue, &pieces, indirect);
    machine.kick(queue);
}

/// Offers a well-formed request that names a range, and kicks.
fn range(machine: &mut Machine<'_>, kind: u64, sector: u8, sectors: u8, flags: u8) {
    machine.write(HEADERS, &kind.to_le_bytes());
    machine.write(DATA, &u64::from(sector % 32).to_le_bytes());
    let rest = u64::from(sectors % 32) | u64::from(flags % 4) << 32;
    machine.write(DATA + 8, &rest.to_le_bytes());
    let pieces = [
        piece(HEADERS, 16, false),
        piece(DATA, 16, false),
        piece(HEADERS + 16, 1, true),
    ];
    machine.offer(0, &pieces, false);
    machine.kick(0);
}

#[derive(Arbitrary, Debug)]
struct Disk {
    read_only: bool,
    overlap: bool,
    direct: bool,
    queues: u8,
}

fuzz_target!(|input: (Disk, u64, Vec<Step>)| {
    let (disk, features, steps) = input;
    let before = vec![9; SECTORS * 512 + TAIL];
    fs::write(&*IMAGE, &before).expect("there is room in /dev/shm");
    let config = Config {
        drive_id: "disk".into(),
        partuuid: None,
        is_root_device: false,
        cache_type: CacheType::Writeback,
        is_read_only: Some(disk.read_only),
        path_on_host: Some(IMAGE.clone()),
        rate_limiter: None,
        io_engine: disk.overlap.then_some(IoEngine::Async),
        socket: None,
        direct: disk.direct,
        queues: Some(u16::from(disk.queues % 3) + 1),
        format: None,
        backing: None,
        backing_files: None,
    };
    let mem = mayfly_fuzz::memory();
    // Files in memory can go past the page cache since Linux 6.6.
    let device = config.build().or_else(|_| {
        let direct = false;
        Config { direct, ..config }.build()
    });
    let device = device.expect("the image is fine");
    let mut machine = Machine::new(&mem, Box::new(device), features);
    for step in &steps {
        match *step {
            Step::Driver(ref op) => machine.run(op),
            Step::Request {
                queue,
                kind,
                sector,
                ref data,
                indirect,
            } => request(&mut machine, queue, kind, sector, data, indirect),
            Step::Range {
                zeroes,
                sector,
                sectors,
                flags,
            } => range(&mut machine, if zeroes { 13 } else { 11 }, sector, sectors, flags),
            Step::Swap => machine.update(json!({"drive_id": "disk", "path_on_host": *IMAGE})),
            Step::Limit(ops, bytes) => {
                machine.update(json!({"drive_id": "disk", "rate_limiter": limits(ops, bytes)}))
            }
        }
    }
    // What is in flight is done when the device is gone.
    drop(machine);
    let after = fs::read(&*IMAGE).expect("the image is still there");
    assert_eq!(after.len(), before.len());
    assert_eq!(after[SECTORS * 512..], before[SECTORS * 512..]);
    assert!(!disk.read_only || after == before);
    fs::remove_file(&*IMAGE).expect("the image is ours");
});
