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
