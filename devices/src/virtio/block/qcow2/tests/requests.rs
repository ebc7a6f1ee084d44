//! Requests on images that are good.

use super::*;

#[test]
fn an_empty_image_reads_as_zeros() {
    let image = open(&Platter::new(Builder::default().build())).unwrap();
    assert_eq!(image.size(), 1 << 20);
    assert_eq!(get(&image, 512, 20_000).unwrap(), vec![0; 20_000]);
}

#[test]
fn keeps_what_is_written_across_a_close() {
    let platter = Platter::new(Builder::default().build());
    let image = open(&platter).unwrap();
    put(&image, 3 * 512, &stamped(1, 9 * 512)).unwrap();
    put(&image, 4096, &stamped(2, 512)).unwrap();
    drop(image);
    assert_eq!(Report::of(&platter.bytes()), Report::default());
    let image = open(&platter).unwrap();
    let mut expected = vec![0; 16 * 512];
    expected[3 * 512..12 * 512].copy_from_slice(&stamped(1, 9 * 512));
    expected[4096..4608].copy_from_slice(&stamped(2, 512));
    assert_eq!(get(&image, 0, 16 * 512).unwrap(), expected);
}

#[test]
fn zeros_in_a_new_cluster_at_the_end_make_the_file_longer() {
    let platter = Platter::new(Builder::default().build());
    let image = open(&platter).unwrap();
    // What comes with the first cluster of a table does not lie behind the second.
    put(&image, 0, &stamped(1, 512)).unwrap();
    image.write_zeroes(200_192..200_704, false).unwrap();
    image.sync().unwrap();
    assert_eq!(Report::of(&platter.bytes()), Report::default());
    assert_eq!(get(&image, 199_680, 4096).unwrap(), vec![0; 4096]);
}

#[test]
fn writes_no_table_before_a_flush_and_all_with_it() {
    let platter = Platter::new(Builder::default().build());
    let image = open(&platter).unwrap();
    put(&image, 0, &stamped(1, 4096)).unwrap();
    let before = platter.bytes();
    assert_eq!(Report::of(&before), Report::default());
    assert_eq!(
        get(&open(&Platter::new(before)).unwrap(), 0, 4096).unwrap(),
        vec![0; 4096]
    );
    image.sync().unwrap();
    let after = platter.bytes();
    assert_eq!(Report::of(&after), Report::default());
    let flushed = open(&Platter::new(after)).unwrap();
    assert_eq!(get(&flushed, 0, 4096).unwrap(), stamped(1, 4096));
}

#[test]
fn without_flushes_all_is_in_the_file_at_the_end_of_a_run() {
    let platter = Platter::new(Builder::default().build());
    let image = open_with(&platter, false, false).unwrap();
    put(&image, 0, &stamped(1, 4096)).unwrap();
    image.settle().unwrap();
    let other = open(&Platter::new(platter.bytes())).unwrap();
    assert_eq!(get(&other, 0, 4096).unwrap(), stamped(1, 4096));
}

#[test]
fn a_read_only_image_is_never_written() {
    let mut bytes = Builder::default().build();
    // Bitmaps, which only matter to who writes.
    bytes[95] = 1;
    let platter = Platter::new(bytes.clone());
    let image = open_with(&platter, true, true).unwrap();
    assert_eq!(get(&image, 0, 512).unwrap(), vec![0; 512]);
    assert!(put(&image, 0, &[1; 512]).is_err());
    image.sync().unwrap();
    drop(image);
    assert_eq!(platter.bytes(), bytes);
}

#[test]
fn zeros_and_discarded_ranges_read_as_zeros_and_free_their_clusters() {
    for version in [2, 3] {
        let builder = Builder {
            version,
            ..Builder::default()
        };
        let platter = Platter::new(builder.build());
        let image = open(&platter).unwrap();
        put(&image, 0, &stamped(1, 10 * 4096)).unwrap();
        image.write_zeroes(512..2 * 4096 + 512, true).unwrap();
        image.write_zeroes(4 * 4096 - 512..6 * 4096, false).unwrap();
        image.sync().unwrap();
        let mut expected = stamped(1, 10 * 4096);
        expected[512..2 * 4096 + 512].fill(0);
        expected[4 * 4096 - 512..6 * 4096].fill(0);
        assert_eq!(get(&image, 0, 10 * 4096).unwrap(), expected, "version {version}");
        image.discard(7 * 4096..9 * 4096).unwrap();
        put(&image, 20 * 4096, &stamped(2, 3 * 4096)).unwrap();
        image.sync().unwrap();
        assert_eq!(
            Report::of(&platter.bytes()),
            Report::default(),
            "version {version}"
        );
        assert_eq!(get(&image, 20 * 4096, 3 * 4096).unwrap(), stamped(2, 3 * 4096));
        assert_eq!(get(&image, 9 * 4096, 4096).unwrap(), stamped(1, 4096));
    }
}

#[test]
fn discards_do_not_gather_tables_without_end() {
    let builder = Builder {
        cluster_bits: 16,
        size: 256 << 30,
        ..Builder::default()
    };
    let platter = Platter::new(builder.build());
    let image = open(&platter).unwrap();
    for gib in 0..256 {
        image.discard(gib << 30..(gib + 1) << 30).unwrap();
    }
    // Each made two tables of 64 KiB.
    assert!(platter.bytes().len() > 24 << 20);
}

#[test]
fn random_requests_do_what_they_do_on_a_plain_disk() {
    for (cluster_bits, refcount_order) in [(9, 6), (9, 4), (12, 0), (16, 4), (12, 1), (12, 5)] {
        let builder = Builder {
            cluster_bits,
            refcount_order,
            size: 3 << 20,
            ..Builder::default()
        };
        let platter = Platter::new(builder.build());
        let mut image = open(&platter).unwrap();
        let mut random = Random::new(u64::from(cluster_bits) * 8 + 1);
        let mut disk = vec![0; 3 << 20];
        for stamp in 1..400 {
            let start = random.index(6000);
            let len = (1 + random.index(80)).min(6144 - start) * 512;
            let range = start * 512..start * 512 + len;
            match random.below(10) {
                0 => {
                    image
                        .write_zeroes(range.start as u64..range.end as u64, stamp % 2 == 0)
                        .unwrap();
                    disk[range].fill(0);
                }
                1 => image.sync().unwrap(),
                2 => {
                    drop(image);
                    assert_eq!(Report::of(&platter.bytes()), Report::default());
                    image = open(&platter).unwrap();
                }
                3 | 4 => assert_eq!(get(&image, range.start as u64, len).unwrap(), disk[range]),
                _ => {
                    put(&image, range.start as u64, &stamped(stamp, len)).unwrap();
                    disk[range].copy_from_slice(&stamped(stamp, len));
                }
            }
        }
        assert!(
            get(&image, 0, 3 << 20).unwrap() == disk,
            "clusters of 2^{cluster_bits}"
        );
        drop(image);
        assert_eq!(Report::of(&platter.bytes()), Report::default());
    }
}

#[test]
fn an_error_of_the_host_leaves_the_image_whole_and_the_rest_for_later() {
    let platter = Platter::new(Builder::default().build());
    let image = open(&platter).unwrap();
    put(&image, 0, &stamped(1, 8192)).unwrap();
    platter.fill(Some(0));
    assert!(put(&image, 1 << 16, &stamped(2, 4096)).is_err());
    assert!(image.sync().is_err());
    assert_eq!(Report::of(&platter.bytes()).errors, [""; 0]);
    platter.fill(None);
    put(&image, 1 << 17, &stamped(3, 4096)).unwrap();
    image.sync().unwrap();
    assert_eq!(Report::of(&platter.bytes()).errors, [""; 0]);
    let image = open(&Platter::new(platter.bytes())).unwrap();
    assert_eq!(get(&image, 0, 8192).unwrap(), stamped(1, 8192));
    assert_eq!(get(&image, 1 << 16, 4096).unwrap(), vec![0; 4096]);
    assert_eq!(get(&image, 1 << 17, 4096).unwrap(), stamped(3, 4096));
}
