//! Images that are refused, with what the user reads. None of them is written to.

use super::*;

/// What is said of a good image with `bytes` put at `at`.
fn refusal(builder: Builder, at: usize, bytes: &[u8]) -> String {
    let mut image = builder.build();
    image[at..at + bytes.len()].copy_from_slice(bytes);
    let platter = Platter::new(image.clone());
    platter.fill(Some(0));
    let error = open(&platter).err().expect("the image is refused").to_string();
    assert_eq!(platter.bytes(), image);
    error
}

fn changed(at: usize, bytes: &[u8]) -> String {
    refusal(Builder::default(), at, bytes)
}

#[test]
fn refuses_features_with_the_remedy() {
    for (at, bytes, words) in [
        (0, &b"RAW\0"[..], "no qcow2 header: leave format out"),
        (7, &[4], "version 4"),
        (35, &[2], "encrypted: decrypt it (qemu-img convert"),
        (79, &[1], "dirty bit is set): repair it (qemu-img check -r all)"),
        (79, &[2], "corrupt: repair it (qemu-img check -r all)"),
        (79, &[4], "external data file"),
        (79, &[8], "bits 0x8): convert it"),
        (79, &[16], "extended_l2=off"),
        (72, &[0x80], "bits 0x8000000000000000"),
        (95, &[1], "(qemu-img bitmap --remove), or set is_read_only"),
        (88, &[1], "autoclear bits 0x100000000000000"),
    ] {
        let error = changed(at, bytes);
        assert!(error.contains(words) && error.contains("test.qcow2"), "{error}");
    }
}

#[test]
fn refuses_tables_that_are_outside_of_the_file_or_too_large() {
    for (at, bytes, words) in [
        (20, &[0, 0, 0, 8][..], "the cluster size"),
        (20, &[0, 0, 0, 22], "the cluster size"),
        (20, &[0xff; 4], "the cluster size"),
        (24, &[0xff; 8], "the disk's size"),
        (24, &[0, 0, 1, 0, 0, 0, 0, 0], "the disk's size"),
        (24, &[0, 0, 0, 0, 0, 0, 1, 0xff], "one sector"),
        (36, &[0xff; 4], "the L1 table"),
        (36, &[0; 4], "the disk's size"),
        (40, &[0; 8], "the L1 table"),
        (40, &[0xff; 8], "the L1 table"),
        (46, &[0x30, 1], "the L1 table"),
        (3 * 4096, &[0x80, 0, 0, 0, 0, 1, 0, 0], "the L1 table"),
        (48, &[0; 8], "the refcount table"),
        (48, &[0xff; 8], "the refcount table"),
        (56, &[0xff; 4], "the refcount table"),
        (4096, &[0, 0, 0, 0, 0, 1, 0, 0], "the refcount table"),
        (4096 + 8, &[0, 0, 0, 0, 0, 0, 0x20, 0], "the refcount table"),
        (4096 + 16, &[0, 0, 0, 0, 0, 0, 0x30, 0], "the refcount table"),
        (96, &[0, 0, 0, 7], "the width of refcounts"),
        (100, &[0, 0, 0, 72], "the header"),
        (100, &[0, 0, 0x10, 0], "the header"),
        (104, &[0x68, 3, 0xf8, 0x57, 0, 0, 0, 49], "the header"),
        (104, &[1, 2, 3, 4, 0xff, 0xff, 0xff, 0xff], "the header"),
        (8, &[0, 0, 0, 0, 0, 0, 0, 200, 0, 0, 4, 0], "the header"),
        (8, &[0, 0, 0, 0, 0, 0, 0x0f, 0xff, 0, 0, 0, 9], "the header"),
    ] {
        let error = changed(at, bytes);
        assert!(error.contains(words), "{at}: {error}");
    }
}

#[test]
fn refuses_files_that_are_no_images() {
    for bytes in [vec![], vec![0; 100], vec![0; 1 << 16], b"QFI\xfb".to_vec()] {
        let error = open(&Platter::new(bytes)).err().unwrap().to_string();
        assert!(error.contains("no qcow2 header"), "{error}");
    }
}

#[test]
fn refuses_a_backing_file_that_nothing_allows() {
    let backing = Some(("base.raw", Some("raw")));
    let error = refusal(
        Builder {
            backing,
            ..Builder::default()
        },
        0,
        b"Q",
    );
    assert!(
        error.contains("backing file 'base.raw'") && error.contains("backing_files"),
        "{error}"
    );
}
