//! A copy-on-write image that says anything, and a guest that uses it: nothing panics, hangs, or grows without bound.
#![no_main]

use std::fs;
use std::sync::LazyLock;

use arbitrary::Arbitrary;
use devices::virtio::block::{CacheType, Config, Format};
use libfuzzer_sys::fuzz_target;
use mayfly_fuzz::driver::{DATA, HEADERS, Machine, piece};

/// The image, in memory, one for this process.
static IMAGE: LazyLock<String> =
    LazyLock::new(|| format!("/dev/shm/mayfly-fuzz-{}.qcow2", std::process::id()));

/// Bytes in a cluster, and in the disk.
const CLUSTER: usize = 512;
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
struct Request {
    /// Its type: read, write, flush, discard, or write zeroes.
    kind: u8,
    sector: u8,
    sectors: u8,
}

/// Header, refcount table, refcount block, L1 table, L2 table, and some data.
fn image() -> Vec<u8> {
    let mut image = vec![0; 8 * CLUSTER];
    let number =
        |image: &mut Vec<u8>, at: usize, value: u64| image[at..at + 8].copy_from_slice(&value.to_be_bytes());
    image[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    number(&mut image, 16, 9);
    number(&mut image, 24, DISK);
    number(&mut image, 32, 4);
    number(&mut image, 40, 3 * CLUSTER as u64);
    number(&mut image, 48, CLUSTER as u64);
    number(&mut image, 56, 1 << 32);
    number(&mut image, 96, 4 << 32 | 104);
    number(&mut image, CLUSTER, 2 * CLUSTER as u64);
    for cluster in 0..8 {
        image[2 * CLUSTER + 2 * cluster + 1] = 1;
    }
    number(&mut image, 3 * CLUSTER, 1 << 63 | 4 * CLUSTER as u64);
    for entry in 0..3u64 {
        let at = 4 * CLUSTER + 8 * usize::from(entry as u8);
        number(&mut image, at, 1 << 63 | (5 + entry) * CLUSTER as u64);
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

fuzz_target!(|input: (Vec<Change>, u16, Vec<Request>)| {
    let (changes, cut, requests) = input;
    let mut image = image();
    for change in &changes {
        let at = usize::from(change.place) * 8 % image.len();
        let value = match change.value {
            Value::Any(value) => value,
            Value::Cluster { index, copied } => u64::from(copied) << 63 | u64::from(index) * CLUSTER as u64,
            Value::Compressed { offset, sectors } => {
                1 << 62 | u64::from(sectors & 1) << 61 | u64::from(offset)
            }
        };
        image[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }
    if cut % 8 == 0 {
        image.truncate(usize::from(cut) % image.len());
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
        io_engine: None,
        socket: None,
        direct: false,
        queues: None,
        format: Some(Format::Qcow2),
        backing: None,
        backing_files: None,
    };
    let mem = mayfly_fuzz::memory();
    if let Ok(device) = config.build() {
        let mut machine = Machine::new(&mem, Box::new(device), u64::MAX);
        for step in requests.iter().take(64) {
            request(&mut machine, step);
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
});
