//! A copy-on-write image that says anything, with a raw image behind it or without, and a guest that uses it: nothing
//! panics, hangs, or grows without bound, and nothing is written to the image behind it.
#![no_main]

use std::fs;
use std::sync::LazyLock;

use arbitrary::Arbitrary;
use devices::virtio::block::{CacheType, Config, Format, IoEngine};
use libfuzzer_sys::fuzz_target;
use mayfly_fuzz::driver::{DATA, HEADERS, Machine, Op, piece};

/// The image, in memory, one for this process.
static IMAGE: LazyLock<String> =
    LazyLock::new(|| format!("/dev/shm/mayfly-fuzz-{}.qcow2", std::process::id()));

/// The raw image behind it, which is shorter than the disk and ends in no whole sector.
static BACKING: LazyLock<String> = LazyLock::new(|| {
    let path = format!("/dev/shm/mayfly-fuzz-{}.raw", std::process::id());
    fs::write(&path, BACKING_CONTENT).expect("there is room in /dev/shm");
    path
});
const BACKING_CONTENT: [u8; 50_100] = [7; 50_100];

/// Bytes in the disk.
const DISK: u64 = 1 << 17;

/// An eight-byte number somewhere in the image.
#[derive(Arbitrary, Debug)]
struct Change {
    /// In units of eight bytes.
    place: u16,
    value: Value,
}

#[derive(Arbitrary, Debug)]
enum Value {
    Any(u64),
    /// An offset that may be good, with a mark.
    Cluster {
        index: u8,
        copied: bool,
    },
    Compressed {
        offset: u16,
        sectors: u8,
    },
}

#[derive(Arbitrary, Debug)]
struct Shape {
    /// Clusters have twice as many bytes for each.
    cluster: u8,
    /// There is an image behind it.
    backed: bool,
    /// Requests overlap.
    overlap: bool,
    /// Where the image ends too early, if at all.
    cut: u16,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Driver(Op),
    Request(Request),
}

/// A request as a driver means it.
#[derive(Arbitrary, Debug)]
struct Request {
    /// Its type: read, write, flush, discard, or write zeroes.
    kind: u8,
    sector: u8,
    sectors: u8,
}

/// Header, refcount table, refcount block, L1 table, L2 table, and some data.
fn image(cluster_bits: u8, backed: bool) -> Vec<u8> {
    let cluster: usize = 1 << cluster_bits;
    let size = cluster as u64;
    let mut image = vec![0; 8 * cluster];
    let mut number = |at: usize, value: u64| image[at..at + 8].copy_from_slice(&value.to_be_bytes());
    number(16, cluster_bits.into());
    number(24, DISK);
    number(32, DISK.div_ceil(size * size / 8));
    number(40, 3 * size);
    number(48, size);
    number(56, 1 << 32);
    number(96, 4 << 32 | 104);
    if backed {
        number(8, 128);
        number(16, 4 << 32 | u64::from(cluster_bits));
        // An extension: the format of the file behind it.
        number(104, 0xe279_2aca << 32 | 3);
    }
    number(cluster, 2 * size);
    number(3 * cluster, 1 << 63 | 4 * size);
    for entry in 0..3 {
        number(4 * cluster + 8 * entry, 1 << 63 | (5 + entry as u64) * size);
    }
    for entry in 0..8 {
        image[2 * cluster + 2 * entry + 1] = 1;
    }
    image[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    if backed {
        image[112..115].copy_from_slice(b"raw");
        image[128..132].copy_from_slice(b"base");
    }
    image
}

fn request(machine: &mut Machine<'_>, request: &Request) {
    let kind = [0u32, 1, 4, 11, 13][usize::from(request.kind % 5)];
    let (sector, sectors) = (u64::from(request.sector), u32::from(request.sectors % 32));
    machine.write(HEADERS, &u64::from(kind).to_le_bytes());
    machine.write(HEADERS + 8, &sector.to_le_bytes());
    // Discard and write zeroes name their range in the data.
    machine.write(DATA, &sector.to_le_bytes());
    machine.write(DATA + 8, &u64::from(sectors).to_le_bytes());
    let len = if kind > 4 { 16 } else { 512 * sectors };
    let mut pieces = vec![piece(HEADERS, 16, false)];
    if kind != 4 && len > 0 {
        pieces.push(piece(DATA, len, kind == 0));
    }
    pieces.push(piece(HEADERS + 16, 1, true));
    machine.offer(0, &pieces, false);
    machine.kick(0);
}

fuzz_target!(|input: (Shape, Vec<Change>, u64, Vec<Step>)| {
    let (shape, changes, features, steps) = input;
    let cluster_bits = 9 + shape.cluster % 4;
    let mut image = image(cluster_bits, shape.backed);
    for change in &changes {
        let at = usize::from(change.place) * 8 % image.len();
        let value = match change.value {
            Value::Any(value) => value,
            Value::Cluster { index, copied } => u64::from(copied) << 63 | u64::from(index) << cluster_bits,
            Value::Compressed { offset, sectors } => {
                1 << 62 | u64::from(sectors & 1) << 61 | u64::from(offset)
            }
        };
        image[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }
    if shape.cut % 8 == 1 {
        image.truncate(usize::from(shape.cut) % image.len());
    }
    fs::write(&*IMAGE, &image).expect("there is room in /dev/shm");
    let config = Config {
        drive_id: "disk".into(),
        partuuid: None,
        is_root_device: false,
        cache_type: CacheType::Writeback,
        is_read_only: None,
        path_on_host: Some(IMAGE.clone()),
        rate_limiter: None,
        io_engine: shape.overlap.then_some(IoEngine::Async),
        socket: None,
        direct: false,
        queues: None,
        format: Some(Format::Qcow2),
        backing: None,
        backing_files: shape.backed.then(|| vec![BACKING.clone()]),
    };
    let mem = mayfly_fuzz::memory();
    if let Ok(device) = config.build() {
        let mut machine = Machine::new(&mem, Box::new(device), features);
        for step in steps.iter().take(64) {
            match step {
                Step::Driver(op) => machine.run(op),
                Step::Request(it) => request(&mut machine, it),
            }
        }
    }
    // Where an entry leads to may be far away, but the image says how far that can be.
    let len = fs::metadata(&*IMAGE).expect("the image is still there").len();
    let disk = image.get(24..32).map_or(0, |size| {
        u64::from_be_bytes(size.try_into().expect("it is 8 bytes"))
    });
    let most = disk.saturating_mul(2).saturating_add(1 << 30);
    assert!(len <= most.saturating_add(image.len() as u64));
    fs::remove_file(&*IMAGE).expect("the image is ours");
    if shape.backed {
        let backing = fs::read(&*BACKING).expect("the file is still there");
        assert_eq!(backing, BACKING_CONTENT);
    }
});
