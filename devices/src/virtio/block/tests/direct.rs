//! Drives that go past the page cache. What their requests find is what those of others do.

use std::thread;

use super::super::direct::Direct;
use super::super::qcow2::tests::{Builder, get, open_file};
use super::super::raw::Raw;
use super::super::{IoEngine, OpenError};
use super::*;

const BLOCK: usize = 4096;

/// An image where O_DIRECT is possible: beside this program, as temporary folders may be in memory.
pub(super) fn image_on_disk(len: usize) -> TempFile {
    let program = std::env::current_exe().unwrap();
    let file = TempFile::new_in(program.parent().unwrap()).unwrap();
    let bytes: Vec<u8> = (0..len)
        .map(|i| u8::try_from(i / 512 % 255 + 1).unwrap())
        .collect();
    file.as_file().write_all(&bytes).unwrap();
    file
}

fn direct(image: &TempFile, engine: IoEngine) -> Config {
    Config {
        direct: true,
        io_engine: Some(engine),
        cache_type: CacheType::Writeback,
        ..config(image)
    }
}

/// As on a disk of which only whole blocks of 4096 bytes can be written.
fn with_large_blocks(image: &TempFile) -> Arc<Raw> {
    let mut raw = Raw::open_disk(&path(image), false, true, &[]).unwrap();
    raw.direct = Some(Direct::new(512, 4096));
    Arc::new(raw)
}

fn write_and_read_back(engine: IoEngine) {
    let image = image_on_disk(64 * 4096);
    write_and_read_back_on(direct(&image, engine).build().unwrap(), &image);
}

fn write_and_read_back_on(mut device: Block, image: &TempFile) {
    let mem = testing::memory(1 << 20);
    let mut guest = Guest::new(&mem);
    guest.activate(&mut device);
    let mut expected = content(image);
    // Aligned; at an odd address; in pieces that are no whole sectors; one sector only.
    for (turn, pieces) in [
        vec![(DATA, 8192)],
        vec![(DATA + 3, 4096)],
        vec![(DATA, 100), (DATA + 9000, 4096 - 100)],
        vec![(DATA, 512)],
    ]
    .into_iter()
    .enumerate()
    {
        let sector = 8 * u64::try_from(turn).unwrap() + 16;
        let fill = 0xa0 + u8::try_from(turn).unwrap();
        let at = usize::try_from(sector).unwrap() * 512;
        let mut len = 0;
        for (address, count) in &pieces {
            guest.fill(*address, &vec![fill; *count]);
            len += count;
        }
        let piece = |&(address, count): &(u64, usize)| (address, u32::try_from(count).unwrap());
        let data: Vec<_> = pieces.iter().map(piece).map(|(a, n)| readable(a, n)).collect();
        guest.request_until_done(&mut device, OUT, sector, &data);
        expected[at..at + len].fill(fill);
        let data: Vec<_> = pieces.iter().map(piece).map(|(a, n)| writable(a, n)).collect();
        pieces
            .iter()
            .for_each(|(address, count)| guest.fill(*address, &vec![0; *count]));
        guest.request_until_done(&mut device, IN, sector, &data);
        for (address, count) in &pieces {
            assert_eq!(guest.bytes(*address, *count), vec![fill; *count], "turn {turn}");
        }
    }
    assert!(content(image) == expected);
}

#[test]
fn aligned_and_other_requests_reach_the_disk() {
    write_and_read_back(IoEngine::Sync);
}

#[test]
fn aligned_and_other_requests_reach_the_disk_though_they_overlap() {
    write_and_read_back(IoEngine::Async);
}

#[test]
fn aligned_and_other_requests_reach_a_disk_with_large_blocks() {
    for engine in [IoEngine::Sync, IoEngine::Async] {
        let image = image_on_disk(64 * BLOCK);
        let backend = with_large_blocks(&image);
        write_and_read_back_on(Block::over(&direct(&image, engine), backend).unwrap(), &image);
    }
}

#[test]
fn a_write_that_was_undone_in_the_kernel_is_done_again() {
    let (image, mem) = (image_on_disk(BLOCK), testing::memory(1 << 20));
    let backend = with_large_blocks(&image);
    let mut device = Block::over(&direct(&image, IoEngine::Async), backend.clone()).unwrap();
    let old = content(&image);
    // Somebody has read the block, to write a part of it.
    let alone = backend.direct.as_ref().unwrap().alone(0..512);
    thread::scope(|scope| {
        let queue = scope.spawn(|| {
            let mut guest = Guest::new(&mem);
            guest.activate(&mut device);
            guest.fill(DATA, &[0xa0; BLOCK]);
            guest.request_until_done(&mut device, OUT, 0, &[readable(DATA, 4096)]);
        });
        while content(&image) != [0xa0; BLOCK] && !queue.is_finished() {
            thread::yield_now();
        }
        std::fs::File::options()
            .write(true)
            .open(image.as_path())
            .and_then(|mut file| file.write_all(&old))
            .unwrap();
        drop(alone);
    });
    assert!(content(&image) == [0xa0; BLOCK]);
    assert_eq!(device.metrics()["write_bytes"], BLOCK);
}

/// Has a queue write runs of sectors at the same time, each filled with one byte.
fn write_all(guest: &mut Guest<'_>, device: &mut Block, writes: &[(u64, u32, u8)]) {
    for (slot, &(sector, sectors, fill)) in (0u64..).zip(writes) {
        let (header, data) = (HEADER + 32 * slot, DATA + 0x1000 * slot);
        guest.header(header, OUT, sector);
        guest.fill(header + 16, &[0xee]);
        guest.fill(data, &vec![fill; 512 * usize::try_from(sectors).unwrap()]);
        let pieces = [
            readable(header, 16),
            readable(data, 512 * sectors),
            writable(header + 16, 1),
        ];
        guest.driver.offer(&pieces);
    }
    guest.drain(device);
    let mut io = testing::io(guest.mem, &mut guest.queues, &guest.recorder, guest.features);
    device.quiesce(&mut io).unwrap();
    assert_eq!(guest.answered(), writes.len());
    let slots = 0..u64::try_from(writes.len()).unwrap();
    assert!(
        slots
            .into_iter()
            .all(|slot| guest.bytes(HEADER + 32 * slot + 16, 1) == [OK])
    );
}

/// One queue writes whole blocks while another writes one sector of each, and both write sectors beside the other's.
#[test]
fn queues_that_write_to_the_same_blocks_undo_nothing_of_each_other() {
    const BLOCKS: u64 = 8;
    let image = image_on_disk(2 * 8 * BLOCK);
    let (backend, config) = (with_large_blocks(&image), direct(&image, IoEngine::Async));
    let queue = || Block::over(&config, backend.clone()).unwrap();
    let (mut whole, mut parts) = (queue(), queue());
    let (one, other) = (testing::memory(1 << 20), testing::memory(1 << 20));
    let (mut first, mut second) = (Guest::new(&one), Guest::new(&other));
    first.activate(&mut whole);
    second.activate(&mut parts);
    for turn in 0..32 {
        let (mine, theirs) = (turn, 0x80 | turn);
        let at = u64::from(turn) % 7;
        let of_whole = |block| [(8 * block, 8, mine), (8 * (BLOCKS + block) + at, 1, mine)];
        let of_parts = |block| {
            [
                (8 * block + 3, 1, theirs),
                (8 * (BLOCKS + block) + at + 1, 1, theirs),
            ]
        };
        let of_whole: Vec<_> = (0..BLOCKS).flat_map(of_whole).collect();
        let of_parts: Vec<_> = (0..BLOCKS).flat_map(of_parts).collect();
        thread::scope(|scope| {
            scope.spawn(|| write_all(&mut first, &mut whole, &of_whole));
            scope.spawn(|| write_all(&mut second, &mut parts, &of_parts));
        });
        let found = content(&image);
        let (blocks, beside) = found.split_at(8 * BLOCK);
        for (block, beside) in blocks.chunks(BLOCK).zip(beside.chunks(BLOCK)) {
            let mut sectors: Vec<_> = block.chunks(512).map(|sector| sector[0]).collect();
            // Either may be the last.
            assert!([mine, theirs].contains(&sectors.remove(3)), "turn {turn}");
            assert_eq!(sectors, [mine; 7], "turn {turn}");
            let at = 512 * usize::from(turn % 7);
            assert_eq!((beside[at], beside[at + 512]), (mine, theirs), "turn {turn}");
        }
    }
}

#[test]
fn is_shown_when_it_is_set_only() {
    let image = image(512);
    let shown = |config: &Config| serde_json::to_string(config).unwrap();
    assert!(!shown(&config(&image)).contains("direct"));
    let direct = Config {
        direct: true,
        ..config(&image)
    };
    assert!(shown(&direct).ends_with(r#""socket":null,"direct":true}"#));
}

#[test]
fn a_file_system_without_it_is_named() {
    // Files of /proc cannot be opened so.
    let config = Config {
        direct: true,
        is_read_only: Some(true),
        path_on_host: Some("/proc/version".into()),
        ..config(&image(512))
    };
    let error = config.build().err().unwrap();
    assert!(matches!(error, OpenError::NotDirect { .. }), "{error:?}");
    assert!(error.to_string().contains("leave direct out"), "{error}");
}

#[test]
fn what_a_copy_on_write_image_has_behind_its_end_is_not_what_went_through_the_buffer() {
    // Clusters smaller than the disk's blocks, and a write of several pieces that ends in the middle of a block.
    for clusters in 130..134 {
        let file = image_on_disk(0);
        let builder = Builder {
            cluster_bits: 11,
            ..Builder::default()
        };
        file.as_file().write_all(&builder.build()).unwrap();
        let mut raw = Raw::open(&path(&file), false, true, &[]).unwrap();
        raw.direct = Some(Direct::new(512, 4096));
        let image = open_file(Box::new(raw), &[], true, CacheType::Writeback);
        let mut device = Block::over(&direct(&file, IoEngine::Sync), Arc::new(image)).unwrap();
        let mem = testing::memory(2 << 20);
        let mut guest = Guest::new(&mem);
        let len = clusters * 2048;
        guest.fill(DATA, &vec![0xaa; len]);
        let data = readable(DATA, u32::try_from(len).unwrap());
        assert_eq!(guest.request(&mut device, OUT, 0, &[data]), (OK, 1));
        assert_eq!(
            guest.request(&mut device, OUT, 800, &[readable(DATA, 512)]),
            (OK, 1)
        );
        let now = get(&*device.backend, 800 * 512, 2048).unwrap();
        assert!(
            now == [vec![0xaa; 512], vec![0; 1536]].concat(),
            "{clusters} clusters"
        );
    }
}
