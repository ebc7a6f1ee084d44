//! A host whose disk is full, under a copy-on-write image.

use std::sync::Arc;

use super::super::qcow2::tests::{Builder, Platter, get, open, open_with};
use super::*;

const CLUSTER: u32 = 512;

/// An empty image of which the first L2 table and one cluster of data have room in the file: each table maps 32 KiB.
fn image_with_room() -> Platter {
    let mut bytes = Builder {
        cluster_bits: 9,
        ..Builder::default()
    }
    .build();
    assert_eq!(bytes.len(), 4 * 512);
    bytes.resize(6 * 512, 0);
    Platter::new(bytes)
}

fn drive(platter: &Platter, cache_type: CacheType) -> Block {
    let mut device = Config {
        cache_type,
        ..config(&image(512))
    }
    .build()
    .unwrap();
    let durable = cache_type == CacheType::Writeback;
    device.backend = Arc::new(open_with(platter, false, durable).unwrap());
    device
}

#[test]
fn a_pause_while_the_host_is_full_leaves_the_drive_at_work_and_loses_nothing() {
    let (platter, mem) = (image_with_room(), testing::memory(1 << 20));
    let (mut device, mut guest) = (drive(&platter, CacheType::Writeback), Guest::new(&mem));
    guest.fill(DATA, &[7; CLUSTER as usize]);
    let data = [readable(DATA, CLUSTER)];
    assert_eq!(guest.request(&mut device, OUT, 0, &data), (OK, 1));
    platter.fill(Some(0));
    let mut io = testing::io(guest.mem, &mut guest.queues, &guest.recorder, guest.features);
    device.quiesce(&mut io).unwrap();
    assert_eq!(guest.request(&mut device, FLUSH, 0, &[]), (IO_ERROR, 1));
    platter.fill(None);
    assert_eq!(guest.request(&mut device, FLUSH, 0, &[]), (OK, 1));
    let image = open(&Platter::new(platter.bytes())).unwrap();
    assert_eq!(get(&image, 0, 512).unwrap(), [7; 512]);
}

#[test]
fn without_flushes_what_a_full_host_did_not_take_was_not_done() {
    let (platter, mem) = (image_with_room(), testing::memory(1 << 20));
    let (mut device, mut guest) = (drive(&platter, CacheType::Unsafe), Guest::new(&mem));
    platter.fill(Some(6 * 512));
    let offers = [
        (OUT, 0, readable(DATA, CLUSTER)),
        (IN, 0, writable(DATA + 0x1000, CLUSTER)),
        (WRITE_ZEROES, 0, readable(DATA + 0x2000, 16)),
        (DISCARD, 0, readable(DATA + 0x3000, 16)),
    ];
    guest.fill(DATA, &[7; CLUSTER as usize]);
    // These are for the part of the disk that the second table maps.
    guest.fill(DATA + 0x2000, &[64, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]);
    guest.fill(DATA + 0x3000, &[65, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    guest.fill(STATUS, &[0xee; 4]);
    for (number, (kind, sector, data)) in (0..).zip(offers) {
        let header = HEADER + 0x20 * number;
        guest.header(header, kind, sector);
        guest
            .driver
            .offer(&[readable(header, 16), data, writable(STATUS + number, 1)]);
    }
    guest.drain(&mut device);
    assert_eq!(guest.answered(), 4);
    assert_eq!(guest.bytes(STATUS, 4), [IO_ERROR, OK, IO_ERROR, IO_ERROR]);
    assert_eq!(device.metrics()["execute_fails"], 3);

    platter.fill(None);
    let data = [readable(DATA, CLUSTER)];
    assert_eq!(guest.request(&mut device, OUT, 1, &data), (OK, 1));
    let image = open(&Platter::new(platter.bytes())).unwrap();
    assert_eq!(get(&image, 0, 1024).unwrap(), [7; 1024]);
}
