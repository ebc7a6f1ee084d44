//! The asynchronous engine on copy-on-write images: what lies in one place overlaps, and what changes tables does not
//! disturb it.

use super::super::qcow2::tests::{Builder, Report, get};
use super::super::{Format, IoEngine, backend};
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

fn drive(image: &TempFile, cache_type: CacheType) -> Config {
    Config {
        io_engine: Some(IoEngine::Async),
        format: Some(Format::Qcow2),
        cache_type,
        ..config(image)
    }
}

fn new_image(cluster_bits: u32) -> TempFile {
    let image = TempFile::new().unwrap();
    let builder = Builder {
        cluster_bits,
        ..Builder::default()
    };
    image.as_file().write_all(&builder.build()).unwrap();
    image
}

/// The whole disk, as another process would read it.
fn disk(image: &TempFile) -> Vec<u8> {
    let copy = TempFile::new().unwrap();
    copy.as_file().write_all(&content(image)).unwrap();
    let image = backend::open(&drive(&copy, CacheType::Writeback), &[]).unwrap();
    get(&*image, 0, DISK).unwrap()
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

#[test]
fn random_requests_do_what_they_do_on_a_plain_disk() {
    for (cluster_bits, cache_type) in [
        (9, CacheType::Writeback),
        (12, CacheType::Writeback),
        (12, CacheType::Unsafe),
        (16, CacheType::Writeback),
    ] {
        let (image, mem) = (new_image(cluster_bits), testing::memory(2 << 20));
        let mut expected = vec![0; DISK];
        let mut random = Random::new(u64::from(cluster_bits));
        for stamp in 1..40 {
            let mut device = drive(&image, cache_type).build().unwrap();
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
                            "{offer:?}"
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
                assert!(now == expected, "clusters of 2^{cluster_bits}");
            }
            if cache_type == CacheType::Unsafe {
                assert!(disk(&image) == expected);
            }
            drop(device);
            assert_eq!(Report::of(&content(&image)), Report::default());
        }
        assert!(disk(&image) == expected);
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
        let (image, mem) = (new_image(12), testing::memory(2 << 20));
        let mut device = drive(&image, CacheType::Writeback).build().unwrap();
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
    let (image, mem) = (new_image(12), testing::memory(2 << 20));
    let mut device = drive(&image, CacheType::Unsafe).build().unwrap();
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
    assert!(disk(&image)[3 * 512..5 * 512] == [7; 1024]);
}
