//! Single requests and batches of them.

use super::*;

#[test]
fn reads_the_sectors_that_are_asked_for() {
    let (image, mem) = (image(8 * 512), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    let answer = guest.request(&mut device, IN, 2, &[writable(DATA, 1024)]);
    assert_eq!(answer, (OK, 1025));
    assert_eq!(guest.bytes(DATA, 1024), [vec![3; 512], vec![4; 512]].concat());
    assert_eq!(guest.recorder.take_interrupts(), 1);
}

#[test]
fn writes_the_sectors_that_are_given_and_no_others() {
    let (image, mem) = (image(8 * 512), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    let mut expected = content(&image);
    expected[512..1536].fill(0xaa);
    guest.fill(DATA, &[0xaa; 1024]);
    let answer = guest.request(
        &mut device,
        OUT,
        1,
        &[readable(DATA, 512), readable(DATA + 512, 512)],
    );
    assert_eq!(answer, (OK, 1));
    assert_eq!(content(&image), expected);
}

#[test]
fn scatters_a_read_over_pieces_of_any_length() {
    let (image, mem) = (image(2 * 512), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    let pieces = [
        writable(DATA, 1),
        writable(DATA + 0x1000, 600),
        writable(DATA + 0x2000, 423),
    ];
    assert_eq!(guest.request(&mut device, IN, 0, &pieces), (OK, 1025));
    assert_eq!(guest.bytes(DATA + 0x1000, 512)[510..], [1, 2]);
    assert_eq!(guest.bytes(DATA + 0x2000, 424)[421..], [2, 2, 0]);
}

#[test]
fn takes_a_header_split_over_descriptors_and_joined_with_data() {
    let (image, mem) = (image(2 * 512), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    guest.header(DATA - 16, OUT, 1);
    guest.fill(DATA, &[0xbb; 512]);
    let pieces = [
        readable(DATA - 16, 3),
        readable(DATA - 13, 20),
        readable(DATA + 7, 505),
        writable(STATUS, 1),
    ];
    assert_eq!(guest.send(&mut device, &pieces), (OK, 1));
    assert_eq!(content(&image)[512..], [0xbb; 512]);
}

#[test]
fn takes_a_status_byte_that_shares_a_descriptor_with_data() {
    let (image, mem) = (image(2 * 512), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    guest.header(HEADER, IN, 1);
    let pieces = [readable(HEADER, 16), writable(STATUS - 512, 513)];
    assert_eq!(guest.send(&mut device, &pieces), (OK, 513));
    assert_eq!(guest.bytes(STATUS - 512, 512), [2; 512]);
}

#[test]
fn takes_an_indirect_request() {
    let (image, mem) = (image(2 * 512), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    guest.header(HEADER, IN, 0);
    let pieces = [readable(HEADER, 16), writable(DATA, 512), writable(STATUS, 1)];
    guest.driver.offer_indirect(0x30000, &pieces);
    assert_eq!(guest.finish(&mut device), (OK, 513));
    assert_eq!(guest.bytes(DATA, 512), [1; 512]);
}

#[test]
fn gives_the_drive_id_padded_with_zeros() {
    let (image, mem) = (image(512), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    guest.fill(DATA, &[0xff; 20]);
    assert_eq!(
        guest.request(&mut device, GET_ID, 0, &[writable(DATA, 20)]),
        (OK, 21)
    );
    assert_eq!(guest.bytes(DATA, 20), *b"data\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn cuts_a_long_drive_id_at_a_character() {
    let (image, mem) = (image(512), testing::memory(1 << 20));
    let mut long = config(&image);
    long.drive_id = "nineteen_characters\u{e9}".into();
    let (mut device, mut guest) = (long.build().unwrap(), Guest::new(&mem));
    assert_eq!(
        guest.request(&mut device, GET_ID, 0, &[writable(DATA, 20)]),
        (OK, 21)
    );
    assert_eq!(guest.bytes(DATA, 20), *b"nineteen_characters\0");
}

#[test]
fn refuses_a_short_buffer_for_the_id() {
    let (image, mem) = (image(512), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    assert_eq!(
        guest.request(&mut device, GET_ID, 0, &[writable(DATA, 19)]),
        (IO_ERROR, 1)
    );
}

#[test]
fn flushes_with_writeback_only() {
    let (image, mem) = (image(512), testing::memory(1 << 20));
    let (mut safe, mut guest) = (flushing(&image), Guest::new(&mem));
    assert_eq!(guest.request(&mut safe, FLUSH, 0, &[]), (OK, 1));
    assert_eq!(safe.metrics()["flush_count"], 1);
    assert_eq!(safe.info().features & F_FLUSH, F_FLUSH);

    drop(safe);
    let mut quick = device(&image);
    assert_eq!(guest.request(&mut quick, FLUSH, 0, &[]), (UNSUPPORTED, 1));
    assert_eq!(quick.info().features & F_FLUSH, 0);
}

#[test]
fn writes_through_for_a_driver_that_takes_no_flush() {
    let (image, mem) = (image(512), testing::memory(1 << 20));
    let (mut device, mut guest) = (flushing(&image), Guest::new(&mem));
    guest.features = feature::COMMON;
    assert_eq!(
        guest.request(&mut device, OUT, 0, &[readable(DATA, 512)]),
        (OK, 1)
    );
    assert_eq!(content(&image), [0; 512]);
}

#[test]
fn answers_an_unknown_type_as_unsupported() {
    let (image, mem) = (image(512), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    assert_eq!(
        guest.request(&mut device, 12, 0, &[writable(DATA, 512)]),
        (UNSUPPORTED, 1)
    );
    assert_eq!(device.metrics()["invalid_reqs_count"], 1);
}

#[test]
fn rejects_write_to_read_only_disk() {
    let (image, mem) = (image(512), testing::memory(1 << 20));
    let (mut device, mut guest) = (read_only(&image), Guest::new(&mem));
    assert_eq!(device.info().features & 1 << 5, 1 << 5);
    assert_eq!(
        guest.request(&mut device, OUT, 0, &[readable(DATA, 512)]),
        (IO_ERROR, 1)
    );
    assert_eq!(
        guest.request(&mut device, IN, 0, &[writable(DATA, 512)]),
        (OK, 513)
    );
    assert_eq!(content(&image), [1; 512]);
}

#[test]
fn rejects_requests_that_reach_behind_the_end() {
    let (image, mem) = (image(4 * 512), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    let mut read = |sector, len| guest.request(&mut device, IN, sector, &[writable(DATA, len)]);
    assert_eq!(read(3, 512), (OK, 513));
    assert_eq!(read(3, 1024), (IO_ERROR, 1));
    assert_eq!(read(4, 512), (IO_ERROR, 1));
    assert_eq!(read(u64::MAX, 512), (IO_ERROR, 1));
    assert_eq!(read(u64::MAX / 512 + 2, 512), (IO_ERROR, 1));
    let write = guest.request(&mut device, OUT, 4, &[readable(DATA, 512)]);
    assert_eq!(write, (IO_ERROR, 1));
    assert_eq!(content(&image).len(), 4 * 512);
    assert_eq!(device.metrics()["invalid_reqs_count"], 5);
}

#[test]
fn rejects_data_that_are_not_whole_sectors() {
    let (image, mem) = (image(4 * 512), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    assert_eq!(
        guest.request(&mut device, IN, 0, &[writable(DATA, 511)]),
        (IO_ERROR, 1)
    );
    assert_eq!(
        guest.request(&mut device, OUT, 0, &[readable(DATA, 513)]),
        (IO_ERROR, 1)
    );
}

#[test]
fn a_request_without_data_succeeds_and_moves_nothing() {
    let (image, mem) = (image(512), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    assert_eq!(guest.request(&mut device, IN, 1, &[]), (OK, 1));
    assert_eq!(guest.request(&mut device, OUT, 0, &[]), (OK, 1));
    assert_eq!(content(&image), [1; 512]);
}

#[test]
fn rejects_a_short_header() {
    let (image, mem) = (image(512), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    guest.header(HEADER, IN, 0);
    let pieces = [readable(HEADER, 15), writable(DATA, 512), writable(STATUS, 1)];
    assert_eq!(guest.send(&mut device, &pieces), (IO_ERROR, 1));
}

#[test]
fn gives_a_request_without_a_status_byte_back_undone() {
    let (image, mem) = (image(512), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    guest.header(HEADER, OUT, 0);
    let (_, written) = guest.send(&mut device, &[readable(HEADER, 16), readable(DATA, 512)]);
    assert_eq!(written, 0);
    assert_eq!(content(&image), [1; 512]);
    assert_eq!(device.metrics()["invalid_reqs_count"], 1);
}

#[test]
fn fails_a_read_behind_the_end_of_an_image_that_was_cut() {
    let (image, mem) = (image(4 * 512), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    image.as_file().set_len(700).unwrap();
    assert_eq!(
        guest.request(&mut device, IN, 0, &[writable(DATA, 1024)]),
        (IO_ERROR, 1)
    );
    assert_eq!(
        guest.request(&mut device, IN, 0, &[writable(DATA, 512)]),
        (OK, 513)
    );
    assert_eq!(device.metrics()["execute_fails"], 1);
}

#[test]
fn answers_a_batch_with_one_interrupt() {
    let (image, mem) = (image(16 * 512), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    for sector in 0..16 {
        let at = HEADER + 0x1000 + 32 * sector;
        guest.header(at, IN, sector);
        let data = DATA + 512 * sector;
        guest
            .driver
            .offer(&[readable(at, 16), writable(data, 512), writable(at + 16, 1)]);
    }
    guest.driver.set_used_event(15);
    guest.drain(&mut device);
    assert_eq!(guest.recorder.take_interrupts(), 1);
    assert_eq!(std::iter::from_fn(|| guest.driver.used()).count(), 16);
    assert_eq!(guest.bytes(DATA, 16 * 512), content(&image));
}

#[test]
fn leaves_the_rest_of_a_long_batch_for_a_later_turn() {
    let (image, mem) = (image(512), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    guest.header(HEADER, IN, 0);
    for _ in 0..200 {
        guest
            .driver
            .offer_indirect(0x30000, &[readable(HEADER, 16), writable(DATA, 513)]);
    }
    assert!(guest.drain(&mut device) >= 2);
    assert_eq!(std::iter::from_fn(|| guest.driver.used()).count(), 200);
    let metrics = device.metrics();
    assert_eq!(metrics["read_count"], 200);
    assert!(metrics["remaining_reqs_count"].as_u64().unwrap() >= 72);
}

#[test]
fn publishes_the_answers_that_came_before_a_broken_chain() {
    let (image, mem) = (image(512), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    guest.header(HEADER, IN, 0);
    guest.driver.offer(&[readable(HEADER, 16), writable(DATA, 513)]);
    guest.driver.offer(&[readable(u64::MAX, 16), writable(DATA, 513)]);
    assert!(matches!(guest.kick(&mut device), Err(DeviceError::Queue(_))));
    assert!(guest.driver.used().is_some());
    assert_eq!(guest.recorder.take_interrupts(), 1);
    assert_eq!(device.metrics()["event_fails"], 1);
}

#[test]
fn counts_bytes_requests_and_times() {
    let (image, mem) = (image(4 * 512), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    guest.request(&mut device, IN, 0, &[writable(DATA, 1024)]);
    guest.request(&mut device, OUT, 0, &[readable(DATA, 512)]);
    guest.kick(&mut device).unwrap();
    let metrics = device.metrics();
    assert_eq!(
        (&metrics["read_bytes"], &metrics["read_count"]),
        (&1024.into(), &1.into())
    );
    assert_eq!(
        (&metrics["write_bytes"], &metrics["write_count"]),
        (&512.into(), &1.into())
    );
    assert_eq!(metrics["no_avail_buffer"], 1);
    assert_eq!(metrics["queue_event_count"], 3);
    assert_eq!(metrics["read_agg"]["min_us"], metrics["read_agg"]["sum_us"]);
    assert!(metrics.get("flush_agg").is_none());
    let counts: Vec<_> = device
        .histograms()
        .iter()
        .map(|(name, spread)| (*name, spread.count()))
        .collect();
    assert_eq!(
        counts,
        [
            ("read", 1),
            ("write", 1),
            ("flush", 0),
            ("discard", 0),
            ("write_zeroes", 0)
        ]
    );
}
