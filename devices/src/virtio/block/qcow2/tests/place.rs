//! What the kernel can do by itself, by io_uring, and what stays as it is meanwhile.

use std::fs;

use super::build::set_refcount;
use super::chain::Folder;
use super::*;
use crate::virtio::block::backend::Place;
use crate::virtio::block::request::Request;
use crate::virtio::block::{BackingRule, Config};
use crate::virtio::{Chain, ChainStorage};

const FLUSH: Request = Request::Flush;

fn place(image: &Qcow2, request: Request, len: usize) -> Option<Place> {
    place_through(image, request, len, false)
}

fn place_through(image: &Qcow2, request: Request, len: usize, write_through: bool) -> Option<Place> {
    let mut data = vec![0; len];
    let mut chain = Chain::from(ChainStorage::default());
    let side = match request {
        Request::Write { .. } => &mut chain.readable,
        _ => &mut chain.writable,
    };
    side.push(&VolatileSlice::from(data.as_mut_slice()));
    image.place(request, &chain, write_through)
}

fn open_image(folder: &Folder, name: &str) -> Qcow2 {
    open_cached(folder, name, CacheType::Writeback)
}

fn open_cached(folder: &Folder, name: &str, cache_type: CacheType) -> Qcow2 {
    let config = Config {
        backing: Some(BackingRule::Allow),
        cache_type,
        ..folder.config(name)
    };
    Qcow2::open(&config, &[]).unwrap()
}

/// File and offset of data that can be read.
fn read_at(image: &Qcow2, offset: u64, len: usize) -> Option<(u32, u64)> {
    place(image, Request::Read { offset }, len).map(|place| (place.file, place.offset))
}

/// The same for data that can be written.
fn write_at(image: &Qcow2, offset: u64, len: usize) -> Option<(u32, u64)> {
    place(image, Request::Write { offset }, len).map(|place| (place.file, place.offset))
}

#[test]
fn data_that_lie_in_one_piece_are_found() {
    let folder = Folder::new();
    folder.image("one", Some(("base", Some("raw"))));
    folder.image("two", Some(("one", Some("qcow2"))));
    put(&open_image(&folder, "one"), 8192, &stamped(501, 4096)).unwrap();
    let image = open_image(&folder, "two");
    assert_eq!(image.files().len(), 3);
    assert_eq!(read_at(&image, 5 * 512, 1024), Some((2, 5 * 512)));
    assert_eq!(write_at(&image, 5 * 512, 1024), None);
    // Of the base and of the image before it; behind the end of the base; and zeros.
    assert_eq!(read_at(&image, 7 * 512, 8192), None);
    assert_eq!(read_at(&image, 127 * 512, 1024), None);
    assert_eq!(read_at(&image, 100 << 10, 512), None);
    let (file, offset) = read_at(&image, 8192, 4096).unwrap();
    assert_eq!(file, 1);
    let one = fs::read(folder.path("one")).unwrap();
    assert_eq!(
        one[usize::try_from(offset).unwrap()..][..4096],
        stamped(501, 4096)
    );

    put(&image, 5 * 512, &stamped(502, 512)).unwrap();
    let (file, offset) = read_at(&image, 0, 4096).unwrap();
    assert_eq!((file, write_at(&image, 0, 4096)), (0, Some((0, offset))));
    let two = fs::read(folder.path("two")).unwrap();
    assert!(two[usize::try_from(offset).unwrap()..][..4096] == get(&image, 0, 4096).unwrap());
}

#[test]
fn a_flush_is_for_the_kernel_when_no_table_has_changed() {
    let folder = Folder::new();
    folder.image("image", None);
    let image = open_image(&folder, "image");
    assert!(place(&image, FLUSH, 0).is_some());
    put(&image, 0, &stamped(1, 512)).unwrap();
    assert!(place(&image, FLUSH, 0).is_none());
    image.sync().unwrap();
    put(&image, 512, &stamped(2, 512)).unwrap();
    assert!(place(&image, FLUSH, 0).is_some());
    image.discard(0..4096).unwrap();
    assert!(place(&image, FLUSH, 0).is_none());
}

#[test]
fn a_write_whose_answer_promises_tables_is_not_for_the_kernel_before_they_are_on_the_host() {
    let folder = Folder::new();
    folder.image("image", None);
    let (write, len) = (Request::Write { offset: 0 }, 512);
    let image = open_cached(&folder, "image", CacheType::Unsafe);
    put(&image, 0, &stamped(1, 4096)).unwrap();
    assert!(place(&image, write, len).is_none());
    image.settle().unwrap();
    assert!(place(&image, write, len).is_some());
    drop(image);
    let image = open_image(&folder, "image");
    put(&image, 8192, &stamped(1, 4096)).unwrap();
    assert!(place(&image, write, len).is_some());
    assert!(place_through(&image, write, len, true).is_none());
    assert!(place_through(&image, Request::Read { offset: 0 }, len, true).is_some());
    image.sync().unwrap();
    assert!(place_through(&image, write, len, true).is_some());
}

#[test]
fn clusters_where_the_kernel_works_do_not_become_free() {
    let folder = Folder::new();
    folder.image("image", None);
    let image = open_image(&folder, "image");
    put(&image, 0, &stamped(1, 8192)).unwrap();
    let before = write_at(&image, 0, 4096);
    assert!(before.is_some());
    for request in [
        Request::Read { offset: 512 },
        Request::Write { offset: 4096 - 512 },
    ] {
        let held = place(&image, request, 512).unwrap();
        image.discard(0..4096).unwrap();
        assert!(get(&image, 0, 4096).unwrap() == stamped(1, 4096));
        for may_unmap in [false, true] {
            image.write_zeroes(0..4096, may_unmap).unwrap();
            assert!(get(&image, 0, 4096).unwrap() == [0; 4096]);
            assert_eq!(write_at(&image, 0, 4096), before);
            put(&image, 0, &stamped(1, 4096)).unwrap();
        }
        // Those beside it are free to go.
        image.discard(4096..8192).unwrap();
        assert!(get(&image, 4096, 4096).unwrap() == [0; 4096]);
        put(&image, 4096, &stamped(1, 4096)).unwrap();
        drop(held);
    }
    image.write_zeroes(0..4096, true).unwrap();
    assert_eq!(write_at(&image, 0, 4096), None);
    drop(image);
    let bytes = fs::read(folder.path("image")).unwrap();
    assert_eq!(Report::of(&bytes), Report::default());
}

#[test]
fn a_cluster_that_a_snapshot_shares_stays_where_it_is_only_if_nothing_is_written() {
    let folder = Folder::new();
    folder.image("image", None);
    put(&open_image(&folder, "image"), 0, &stamped(1, 4096)).unwrap();
    let mut bytes = fs::read(folder.path("image")).unwrap();
    let u64_at = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let l2 = usize::try_from(u64_at(&bytes, 3 * 4096) & !(1 << 63)).unwrap();
    let data = u64_at(&bytes, l2) & !(1 << 63);
    bytes[l2..l2 + 8].copy_from_slice(&data.to_be_bytes());
    let index = usize::try_from(data / 4096).unwrap();
    set_refcount(&mut bytes[2 * 4096..3 * 4096], 4, index, 2);
    folder.write("image", &bytes);

    let image = open_image(&folder, "image");
    assert_eq!((read_at(&image, 0, 512), write_at(&image, 0, 512)), (None, None));
    drop(image);
    let read_only = Config {
        is_read_only: Some(true),
        ..folder.config("image")
    };
    let image = Qcow2::open(&read_only, &[]).unwrap();
    assert_eq!(read_at(&image, 0, 512), Some((0, data)));
    assert!(place(&image, FLUSH, 0).is_none());
}
