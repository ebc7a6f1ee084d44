//! Discard and write-zeroes requests (virtio 1.2 §5.2.6).

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::MetadataExt;

use serde_json::{Value, json};

use super::*;

const UNMAP: u32 = 1;
const MIB: usize = 1 << 20;

/// A segment as the driver writes it.
fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [
        &sector.to_le_bytes()[..],
        &sectors.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

/// Sends a request with these bytes of data; returns the status.
fn send(guest: &mut Guest<'_>, device: &mut Block, kind: u32, data: &[u8]) -> u8 {
    guest.fill(DATA, data);
    let len = u32::try_from(data.len()).unwrap();
    let (status, written) = guest.request(device, kind, 0, &[readable(DATA, len)]);
    assert_eq!(written, 1);
    status
}

/// Bytes that the image takes on the host's disk.
fn allocated(image: &TempFile) -> u64 {
    image.as_file().sync_all().unwrap();
    image.as_path().metadata().unwrap().blocks() * 512
}

/// A file in a tmpfs, which punches holes but cannot zero ranges in place.
fn in_memory(content: &[u8]) -> (File, String) {
    // SAFETY: needed as std has no memfd. The name is a C string.
    let fd = unsafe { libc::memfd_create(c"disk".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: needed to own the new descriptor, which nobody else has.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(content).unwrap();
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    (file, path)
}

#[test]
fn a_discard_gives_space_back_and_keeps_the_size() {
    let (image, mem) = (image(4 * MIB), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    let before = allocated(&image);
    let range = segment(2048, 4096, 0);
    assert_eq!(send(&mut guest, &mut device, DISCARD, &range), OK);
    assert_eq!(before - allocated(&image), 2 * MIB as u64);
    let after = content(&image);
    assert_eq!(after.len(), 4 * MIB);
    assert!(after[..MIB].iter().all(|byte| *byte != 0));
    assert!(after[MIB..3 * MIB].iter().all(|byte| *byte == 0));
    assert!(after[3 * MIB..].iter().all(|byte| *byte != 0));
    assert_eq!(device.histograms()[3].1.count(), 1);
}

#[test]
fn zeros_take_space_unless_the_driver_lets_them_go() {
    let (image, mem) = (image(4 * MIB), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    let before = allocated(&image);
    assert_eq!(
        send(&mut guest, &mut device, WRITE_ZEROES, &segment(1, 2048, 0)),
        OK
    );
    assert!(allocated(&image) >= before);
    let after = content(&image);
    assert_eq!(after[..512], [1; 512]);
    assert!(after[512..][..MIB].iter().all(|byte| *byte == 0));
    assert_ne!(after[512 + MIB], 0);

    let unmapped = segment(4096, 4096, UNMAP);
    assert_eq!(send(&mut guest, &mut device, WRITE_ZEROES, &unmapped), OK);
    assert!(before - allocated(&image) >= 2 * MIB as u64);
    assert!(content(&image)[2 * MIB..].iter().all(|byte| *byte == 0));
    assert_eq!(device.histograms()[4].1.count(), 2);
}

#[test]
fn zeros_are_written_where_the_file_system_cannot_make_them() {
    let (mut whole, mem) = (vec![7; 200 << 10], testing::memory(1 << 20));
    let (file, path) = in_memory(&whole);
    let mut device = Config {
        path_on_host: Some(path.clone()),
        ..config(&image(512))
    }
    .build()
    .unwrap();
    let mut guest = Guest::new(&mem);
    let range = segment(3, 300, 0);
    assert_eq!(send(&mut guest, &mut device, WRITE_ZEROES, &range), OK);
    whole[3 * 512..303 * 512].fill(0);
    assert!(std::fs::read(&path).unwrap() == whole);
    drop(file);
}

#[test]
fn an_empty_range_does_nothing() {
    let (image, mem) = (image(1024), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    for kind in [DISCARD, WRITE_ZEROES] {
        for sector in [0, 2] {
            assert_eq!(send(&mut guest, &mut device, kind, &segment(sector, 0, 0)), OK);
        }
    }
    assert_eq!(content(&image)[512..], [2; 512]);
}

#[test]
fn refuses_ranges_that_are_not_on_the_disk_or_too_long() {
    let (image, mem) = (image(1024), testing::memory(1 << 20));
    image.as_file().set_len(2 << 30).unwrap();
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    let end = (2 << 30) / 512;
    for (kind, range) in [
        (DISCARD, segment(end, 1, 0)),
        (DISCARD, segment(end - 1, 2, 0)),
        (DISCARD, segment(u64::MAX, 1, 0)),
        (DISCARD, segment(u64::MAX / 512, u32::MAX, 0)),
        (DISCARD, segment(0, (1 << 21) + 1, 0)),
        (WRITE_ZEROES, segment(end - 1, 2, UNMAP)),
        (WRITE_ZEROES, segment(0, (1 << 15) + 1, 0)),
        (WRITE_ZEROES, segment(0, u32::MAX, UNMAP)),
    ] {
        assert_eq!(send(&mut guest, &mut device, kind, &range), IO_ERROR, "{range:?}");
    }
    assert!(content_begins_as_it_was(&image));
    assert_eq!(device.metrics()["invalid_reqs_count"], 8);
}

#[test]
fn refuses_unknown_flags_and_another_number_of_segments() {
    let (image, mem) = (image(1024), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    for (kind, flags) in [(DISCARD, UNMAP), (DISCARD, 2), (WRITE_ZEROES, 2 | UNMAP)] {
        let range = segment(0, 1, flags);
        assert_eq!(send(&mut guest, &mut device, kind, &range), UNSUPPORTED);
    }
    let whole = segment(0, 1, 0);
    for data in [&[][..], &whole[..15], &[&whole[..], &whole[..]].concat()] {
        for kind in [DISCARD, WRITE_ZEROES] {
            assert_eq!(send(&mut guest, &mut device, kind, data), IO_ERROR);
        }
    }
    assert!(content_begins_as_it_was(&image));
}

#[test]
fn a_read_only_drive_has_neither() {
    let (image, mem) = (image(1024), testing::memory(1 << 20));
    let (mut device, mut guest) = (read_only(&image), Guest::new(&mem));
    assert_eq!(device.info().features & (1 << 13 | 1 << 14), 0);
    assert!(device.config_space()[24..].iter().all(|byte| *byte == 0));
    for kind in [DISCARD, WRITE_ZEROES] {
        let range = segment(0, 1, 0);
        assert_eq!(send(&mut guest, &mut device, kind, &range), UNSUPPORTED);
    }
    assert!(content_begins_as_it_was(&image));
}

/// Sends this until its limit holds it back; returns how many were answered.
fn answered_within(limiter: &Value, kind: u32, data: &[u8]) -> usize {
    let (image, mem) = (image(1024), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    let patch = json!({"drive_id": "data", "rate_limiter": limiter});
    let mut io = testing::io(&mem, &mut guest.queues, &guest.recorder, guest.features);
    device.update(patch, &mut io).unwrap();
    guest.header(HEADER, kind, 0);
    guest.fill(DATA, data);
    for _ in 0..4 {
        guest
            .driver
            .offer(&[readable(HEADER, 16), readable(DATA, 16), writable(STATUS, 1)]);
    }
    guest.drain(&mut device);
    assert_eq!(device.metrics()["rate_limiter_throttled_events"], 1);
    guest.answered()
}

#[test]
fn a_discard_counts_as_one_operation_of_no_bytes() {
    let limits = json!({"ops": {"size": 2, "refill_time": 3_600_000}, "bandwidth": {"size": 1, "refill_time": 3_600_000}});
    assert_eq!(answered_within(&limits, DISCARD, &segment(0, 2, 0)), 2);
}

#[test]
fn zeros_count_as_the_bytes_that_they_fill() {
    let limits = json!({"bandwidth": {"size": 3072, "refill_time": 3_600_000}});
    assert_eq!(answered_within(&limits, WRITE_ZEROES, &segment(0, 2, UNMAP)), 3);
}

fn content_begins_as_it_was(image: &TempFile) -> bool {
    let mut begin = [0; 1024];
    std::os::unix::fs::FileExt::read_exact_at(image.as_file(), &mut begin, 0).unwrap();
    begin == [[1; 512], [2; 512]].concat()[..]
}
