//! Copy-on-write images with the asynchronous engine, where what lies in one piece overlaps and what changes tables does
//! not disturb it; and past the page cache.

use super::super::direct::Direct;
use super::super::qcow2::tests::{Builder, Report, get, open_file};
use super::super::raw::Raw;
use super::super::{Format, IoEngine, backend};
use super::direct::image_on_disk;
use super::*;
use crate::testing::Random;

/// Requests are offered together, each for a part of the disk of its own, of so many sectors.
const WINDOW: u64 = 32;
const WINDOWS: u64 = 48;
const DISK: usize = 1 << 20;

/// Where a request has its data.
fn data_of(window: u64) -> u64 {
    DATA + 0x4000 * window
}

fn header_of(window: u64) -> u64 {
    HEADER + 0x40 * window
}

/// An image over a base that ends in no whole sector.
struct Image {
    base: TempFile,
    image: TempFile,
}

impl Image {
    fn new(cluster_bits: u32) -> Self {
        let base = image_on_disk(300_100);
        let image = image_on_disk(0);
        let builder = Builder {
            cluster_bits,
            backing: Some(("base", Some("raw"))),
            ..Builder::default()
        };
        image.as_file().write_all(&builder.build()).unwrap();
        Self { base, image }
    }

    fn drive(&self, cache_type: CacheType) -> Config {
        Config {
            io_engine: Some(IoEngine::Async),
            format: Some(Format::Qcow2),
            backing_files: Some(vec![path(&self.base)]),
            cache_type,
            ..config(&self.image)
        }
    }

    /// A drive past the page cache, as on a disk with blocks of this many bytes.
    fn drive_with_blocks(&self, engine: IoEngine, block: u64) -> Block {
        let config = Config {
            io_engine: Some(engine),
            direct: true,
            ..self.drive(CacheType::Writeback)
        };
        let mut file = Raw::open(&path(&self.image), false, true, &[]).unwrap();
        file.direct = Some(Direct::new(512, block));
        let image = open_file(Box::new(file), &[path(&self.base)], true, config.cache_type);
        Block::over(&config, Arc::new(image)).unwrap()
    }

    /// The whole disk, as another process would read it.
    fn disk(&self) -> Vec<u8> {
        let copy = image_on_disk(0);
        copy.as_file().write_all(&content(&self.image)).unwrap();
        let config = Config {
            path_on_host: Some(path(&copy)),
            ..self.drive(CacheType::Writeback)
        };
        let image = backend::open(&config, &[]).unwrap();
        get(&*image, 0, DISK).unwrap()
    }

    fn assert_whole(&self) {
        assert_eq!(Report::of(&content(&self.image)), Report::default());
    }
}

#[derive(Debug)]
struct Offer {
    kind: u32,
    sectors: std::ops::Range<u64>,
    data: Vec<u8>,
}

impl Offer {
    fn random(random: &mut Random, sectors: std::ops::Range<u64>, stamp: u8) -> Self {
        let kind = [OUT, OUT, OUT, IN, IN, IN, IN, WRITE_ZEROES, DISCARD][random.index(9)];
        let len = usize::try_from(512 * (sectors.end - sectors.start)).unwrap();
        let data = vec![stamp; len];
        Self { kind, sectors, data }
    }

    fn bytes(&self) -> std::ops::Range<usize> {
        let byte = |sector: u64| usize::try_from(512 * sector).unwrap();
        byte(self.sectors.start)..byte(self.sectors.end)
    }

    fn make(&self, guest: &mut Guest<'_>, window: u64) {
        let (header, data) = (header_of(window), data_of(window));
        let len = u32::try_from(self.data.len()).unwrap();
        let piece = match self.kind {
            IN => writable(data, len),
            OUT => {
                guest.fill(data, &self.data);
                readable(data, len)
            }
            _ => {
                let unmap = u32::from(self.kind == WRITE_ZEROES && window.is_multiple_of(2));
                guest.fill(data, &self.sectors.start.to_le_bytes());
                guest.fill(data + 8, &(len / 512).to_le_bytes());
                guest.fill(data + 12, &unmap.to_le_bytes());
                readable(data, 16)
            }
        };
        guest.header(header, self.kind, self.sectors.start);
        guest.fill(header + 16, &[0xee]);
        guest
            .driver
            .offer(&[readable(header, 16), piece, writable(header + 16, 1)]);
    }
}

/// Offers requests together, and waits until all are done.
fn serve(guest: &mut Guest<'_>, device: &mut Block, offers: &[Offer]) {
    for (window, offer) in (0..).zip(offers) {
        offer.make(guest, window);
    }
    guest.drain(device);
    let mut io = testing::io(guest.mem, &mut guest.queues, &guest.recorder, guest.features);
    device.quiesce(&mut io).unwrap();
    assert_eq!(guest.answered(), offers.len());
    for (window, offer) in (0..).zip(offers) {
        assert_eq!(guest.bytes(header_of(window) + 16, 1), [OK], "{offer:?}");
    }
}

fn assert_random_requests_work(image: &Image, build: impl Fn() -> Block) {
    let mem = testing::memory(2 << 20);
    let mut expected = content(&image.base);
    expected.resize(DISK, 0);
    let mut random = Random::new(1);
    for stamp in 1..30 {
        let mut device = build();
        let mut guest = Guest::new(&mem);
        guest.activate(&mut device);
        for _ in 0..3 {
            let mut offer = |window: u64| {
                let start = WINDOW * window + random.below(WINDOW);
                let end = start + 1 + random.below(WINDOW * (window + 1) - start);
                Offer::random(&mut random, start..end, stamp)
            };
            let offers: Vec<_> = (0..WINDOWS).map(&mut offer).collect();
            serve(&mut guest, &mut device, &offers);
            let now = get(&*device.backend, 0, DISK).unwrap();
            for (window, offer) in (0..).zip(&offers) {
                let range = offer.bytes();
                match offer.kind {
                    IN => assert!(
                        guest.bytes(data_of(window), offer.data.len()) == expected[range],
                        "{:?}",
                        offer.sectors
                    ),
                    OUT => expected[range].copy_from_slice(&offer.data),
                    WRITE_ZEROES => expected[range].fill(0),
                    // Each byte is what it was, or zero.
                    _ => expected[range.clone()]
                        .iter_mut()
                        .zip(&now[range])
                        .filter(|(_, now)| **now == 0)
                        .for_each(|(byte, _)| *byte = 0),
                }
            }
            assert!(now == expected);
        }
        drop(device);
        image.assert_whole();
    }
    assert!(image.disk() == expected);
}

#[test]
fn random_requests_do_what_they_do_on_a_plain_disk() {
    for (cluster_bits, cache_type) in [
        (9, CacheType::Writeback),
        (12, CacheType::Unsafe),
        (16, CacheType::Writeback),
    ] {
        let image = Image::new(cluster_bits);
        assert_random_requests_work(&image, || image.drive(cache_type).build().unwrap());
    }
}

#[test]
fn random_requests_do_so_past_the_page_cache() {
    for (cluster_bits, engine, block) in [
        (12, IoEngine::Sync, 512),
        (9, IoEngine::Sync, 4096),
        (12, IoEngine::Async, 512),
        (9, IoEngine::Async, 4096),
        (16, IoEngine::Async, 4096),
    ] {
        let image = Image::new(cluster_bits);
        assert_random_requests_work(&image, || image.drive_with_blocks(engine, block));
    }
}

#[test]
fn a_request_under_way_does_not_reach_what_a_freed_cluster_becomes() {
    for (first, free) in [
        (OUT, DISCARD),
        (OUT, WRITE_ZEROES),
        (IN, DISCARD),
        (IN, WRITE_ZEROES),
    ] {
        let (image, mem) = (Image::new(12), testing::memory(2 << 20));
        let mut device = image.drive(CacheType::Writeback).build().unwrap();
        let mut guest = Guest::new(&mem);
        guest.activate(&mut device);
        let offer = |kind, sectors, stamp| Offer {
            kind,
            sectors,
            data: vec![stamp; 4096],
        };
        serve(&mut guest, &mut device, &[offer(OUT, 0..8, 1)]);
        // The last one needs a cluster, and would get the one that is free.
        let offers = [
            offer(first, 0..8, 2),
            offer(IN, 80..88, 0),
            offer(free, 0..8, 0),
            offer(OUT, 8..16, 3),
        ];
        serve(&mut guest, &mut device, &offers);
        if first == IN {
            assert!(guest.bytes(data_of(0), 4096).iter().all(|byte| *byte < 2));
        }
        assert!(get(&*device.backend, 4096, 4096).unwrap() == [3; 4096]);
    }
}

#[test]
fn without_flushes_all_is_in_the_file_at_the_end_of_a_run() {
    let (image, mem) = (Image::new(12), testing::memory(2 << 20));
    let mut device = image.drive(CacheType::Unsafe).build().unwrap();
    let mut guest = Guest::new(&mem);
    guest.activate(&mut device);
    let offer = Offer {
        kind: OUT,
        sectors: 3..5,
        data: vec![7; 1024],
    };
    offer.make(&mut guest, 0);
    guest.drain(&mut device);
    assert_eq!(
        (guest.answered(), guest.bytes(header_of(0) + 16, 1)),
        (1, vec![OK])
    );
    assert!(image.disk()[3 * 512..5 * 512] == [7; 1024]);
}

#[test]
fn a_durable_write_of_a_driver_without_flush_brings_the_tables_of_the_one_before() {
    for engine in [IoEngine::Sync, IoEngine::Async] {
        let (image, mem) = (Image::new(12), testing::memory(2 << 20));
        let config = Config {
            io_engine: Some(engine),
            ..image.drive(CacheType::Writeback)
        };
        let mut device = config.build().unwrap();
        let mut offer = Offer {
            kind: OUT,
            sectors: 2000..2001,
            data: vec![7; 512],
        };
        let mut guest = Guest::new(&mem);
        guest.activate(&mut device);
        offer.make(&mut guest, 0);
        guest.drain(&mut device);
        assert_eq!(guest.answered(), 1);
        device.end();
        device.reset();

        let mut guest = Guest::new(&mem);
        guest.features = feature::COMMON;
        guest.activate(&mut device);
        offer.sectors = 2001..2002;
        offer.make(&mut guest, 0);
        guest.drain(&mut device);
        assert_eq!(
            (guest.answered(), guest.bytes(header_of(0) + 16, 1)),
            (1, vec![OK])
        );
        assert!(image.disk()[2001 * 512..2002 * 512] == [7; 512], "{engine:?}");
    }
}

#[test]
fn a_discard_beside_a_request_under_way_gives_back_the_rest() {
    let (image, mem) = (Image::new(12), testing::memory(2 << 20));
    let mut device = image.drive(CacheType::Writeback).build().unwrap();
    let mut guest = Guest::new(&mem);
    guest.activate(&mut device);
    let offer = |kind, sectors: std::ops::Range<u64>| Offer {
        kind,
        data: vec![7; usize::try_from(512 * (sectors.end - sectors.start)).unwrap()],
        sectors,
    };
    serve(&mut guest, &mut device, &[offer(OUT, 1024..1048)]);
    serve(
        &mut guest,
        &mut device,
        &[offer(IN, 1033..1034), offer(DISCARD, 1024..1048)],
    );
    let now = get(&*device.backend, 1024 * 512, 3 * 4096).unwrap();
    assert!(now == [[0; 4096], [7; 4096], [0; 4096]].concat());
    drop(device);
    image.assert_whole();
}
