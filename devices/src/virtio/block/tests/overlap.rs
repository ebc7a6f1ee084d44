//! The asynchronous engine: requests that land later, and whatever comes before they do.

use std::os::fd::RawFd;

use serde_json::json;

use super::super::IoEngine;
use super::*;

/// The token of what tells that requests have landed.
const LANDED: u32 = 1;
const SECTORS: u64 = 64;

fn overlapping(image: &TempFile) -> Config {
    Config {
        io_engine: Some(IoEngine::Async),
        cache_type: CacheType::Writeback,
        ..config(image)
    }
}

/// Offers a request for one sector, with header, data and status at places of their own; no kick.
fn offer(guest: &mut Guest<'_>, kind: u32, sector: u64) {
    let header = HEADER + 0x1000 + 32 * sector;
    guest.header(header, kind, sector);
    guest.fill(header + 16, &[0xee]);
    let data = DATA + 512 * sector;
    let data = if kind == OUT {
        readable(data, 512)
    } else {
        writable(data, 512)
    };
    guest
        .driver
        .offer(&[readable(header, 16), data, writable(header + 16, 1)]);
}

fn status(guest: &Guest<'_>, sector: u64) -> u8 {
    guest.bytes(HEADER + 0x1000 + 32 * sector + 16, 1)[0]
}

fn ring_of(recorder: &Recorder) -> RawFd {
    let watched = recorder.watched.lock().unwrap();
    watched.iter().find(|(_, token)| *token == LANDED).unwrap().0
}

/// Waits for the next event of the ring and delivers it.
fn await_landing(guest: &mut Guest<'_>, device: &mut Block) {
    let mut fd = libc::pollfd {
        fd: ring_of(&guest.recorder),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: needed as std has no poll. One valid entry is passed, and the count is one.
    assert_eq!(unsafe { libc::poll(&mut fd, 1, 60_000) }, 1, "nothing lands");
    let mut io = testing::io(guest.mem, &mut guest.queues, &guest.recorder, guest.features);
    device.on_event(LANDED, &mut io).unwrap();
}

/// Takes answers until there are `count`.
fn await_answers(guest: &mut Guest<'_>, device: &mut Block, count: usize) {
    let mut answered = guest.answered();
    while answered < count {
        await_landing(guest, device);
        answered += guest.answered();
    }
    assert_eq!(answered, count);
}

fn quiesce(guest: &mut Guest<'_>, device: &mut Block) {
    let mut io = testing::io(guest.mem, &mut guest.queues, &guest.recorder, guest.features);
    device.quiesce(&mut io).unwrap();
}

fn setup<'m>(image: &TempFile, mem: &'m GuestMemory) -> (Block, Guest<'m>) {
    let mut device = overlapping(image).build().unwrap();
    let mut guest = Guest::new(mem);
    guest.activate(&mut device);
    (device, guest)
}

#[test]
fn writes_reads_and_flushes() {
    let (image, mem) = (image(64 * 512), testing::memory(1 << 20));
    let (mut device, mut guest) = setup(&image, &mem);
    for sector in 0..SECTORS {
        guest.fill(DATA + 512 * sector, &[0xa0; 512]);
        offer(&mut guest, OUT, sector);
    }
    guest.kick(&mut device).unwrap();
    await_answers(&mut guest, &mut device, 64);
    assert!(content(&image).iter().all(|byte| *byte == 0xa0));

    guest.fill(DATA, &[0; 64 * 512]);
    (0..SECTORS).for_each(|sector| offer(&mut guest, IN, sector));
    guest.kick(&mut device).unwrap();
    await_answers(&mut guest, &mut device, 64);
    assert_eq!(guest.bytes(DATA, 64 * 512), vec![0xa0; 64 * 512]);
    assert!((0..SECTORS).all(|sector| status(&guest, sector) == OK));

    offer(&mut guest, FLUSH, 0);
    guest.kick(&mut device).unwrap();
    await_answers(&mut guest, &mut device, 1);
    assert_eq!(status(&guest, 0), OK);
    let metrics = device.metrics();
    assert_eq!(metrics["write_count"], 64);
    assert_eq!(metrics["read_bytes"], 64 * 512);
    assert_eq!(metrics["flush_count"], 1);
}

#[test]
fn what_does_not_overlap_is_answered_at_once() {
    let (image, mem) = (image(512), testing::memory(1 << 20));
    let (mut device, mut guest) = setup(&image, &mem);
    for (kind, data, expected) in [
        (GET_ID, writable(DATA, 20), OK),
        (IN, writable(DATA, 511), IO_ERROR),
        (12, writable(DATA, 512), UNSUPPORTED),
        (DISCARD, readable(DATA, 16), OK),
        (WRITE_ZEROES, readable(DATA, 16), OK),
    ] {
        guest.fill(DATA, &[0; 16]);
        assert_eq!(guest.request(&mut device, kind, 0, &[data]).0, expected);
    }
    assert_eq!(guest.request(&mut device, OUT, 0, &[]), (OK, 1));
}

#[test]
fn a_read_behind_the_end_of_a_cut_image_fails_and_others_do_not() {
    let (image, mem) = (image(64 * 512), testing::memory(1 << 20));
    let (mut device, mut guest) = setup(&image, &mem);
    image.as_file().set_len(700).unwrap();
    [0, 1, 9]
        .into_iter()
        .for_each(|sector| offer(&mut guest, IN, sector));
    guest.kick(&mut device).unwrap();
    await_answers(&mut guest, &mut device, 3);
    assert_eq!(
        [0, 1, 9].map(|sector| status(&guest, sector)),
        [OK, IO_ERROR, IO_ERROR]
    );
    assert_eq!(device.metrics()["execute_fails"], 2);
}

#[test]
fn a_pause_answers_everything() {
    let (image, mem) = (image(64 * 512), testing::memory(1 << 20));
    let (mut device, mut guest) = setup(&image, &mem);
    for turn in 0..4 {
        guest.driver.set_used_event(64 * turn);
        (0..SECTORS).for_each(|sector| offer(&mut guest, OUT, sector));
        guest.kick(&mut device).unwrap();
        quiesce(&mut guest, &mut device);
        assert_eq!(guest.answered(), 64);
        assert!(guest.recorder.take_interrupts() > 0);
    }
    let state = device.save();
    drop(device);
    overlapping(&image).build().unwrap().load(state).unwrap();
}

#[test]
fn nothing_is_written_to_memory_after_a_reset() {
    let (image, mem) = (image(64 * 512), testing::memory(1 << 20));
    let (mut device, mut guest) = setup(&image, &mem);
    (0..SECTORS).for_each(|sector| offer(&mut guest, IN, sector));
    guest.kick(&mut device).unwrap();
    device.end();
    device.reset();
    guest.fill(DATA, &[0x5a; 64 * 512]);
    // The next driver finds an empty ring, and its requests are served.
    let mut next = Guest::new(&mem);
    next.activate(&mut device);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(next.bytes(DATA, 64 * 512), vec![0x5a; 64 * 512]);
    offer(&mut next, IN, 3);
    next.kick(&mut device).unwrap();
    await_answers(&mut next, &mut device, 1);
    assert_eq!(next.bytes(DATA + 3 * 512, 512), [4; 512]);
}

#[test]
fn a_swap_waits_for_what_goes_to_the_old_image() {
    let (old, new, mem) = (image(64 * 512), image(64 * 512), testing::memory(1 << 20));
    let (mut device, mut guest) = setup(&old, &mem);
    guest.fill(DATA, &[0x77; 64 * 512]);
    (0..SECTORS).for_each(|sector| offer(&mut guest, OUT, sector));
    guest.kick(&mut device).unwrap();
    let patch = json!({"drive_id": "data", "path_on_host": path(&new)});
    let mut io = testing::io(&mem, &mut guest.queues, &guest.recorder, guest.features);
    device.update(patch, &mut io).unwrap();
    assert_eq!(guest.answered(), 64);
    assert!(content(&old).iter().all(|byte| *byte == 0x77));
    assert_eq!(content(&new)[..512], [1; 512]);

    offer(&mut guest, OUT, 0);
    guest.kick(&mut device).unwrap();
    await_answers(&mut guest, &mut device, 1);
    assert_eq!(content(&new)[..512], [0x77; 512]);
}

#[test]
fn memory_stays_while_requests_fly_though_its_owner_lets_go() {
    let image = image(64 * 512);
    let mut device = overlapping(&image).build().unwrap();
    let mem = testing::memory(1 << 20);
    let (_, region) = mem.remove_region(GuestAddress(0), 1 << 20).unwrap();
    let mut guest = Guest::new(&mem);
    guest.activate(&mut device);
    // What a worker of the kernel has to do takes it longer than the call that starts it.
    image.as_file().write_all(&[1; 64 * 512]).unwrap();
    (0..SECTORS).for_each(|sector| offer(&mut guest, FLUSH, sector));
    guest.kick(&mut device).unwrap();
    drop(guest);
    drop(mem);
    assert_eq!(Arc::strong_count(&region), 2);
    device.end();
    assert_eq!(Arc::strong_count(&region), 1);
}

#[test]
fn a_held_request_waits_while_others_land() {
    let (image, mem) = (image(64 * 512), testing::memory(1 << 20));
    let limits = json!({"ops": {"size": 2, "refill_time": 3_600_000}});
    let limits = serde_json::from_value(limits).unwrap();
    let mut device = Config {
        rate_limiter: Some(limits),
        ..overlapping(&image)
    }
    .build()
    .unwrap();
    let mut guest = Guest::new(&mem);
    guest.activate(&mut device);
    (0..3).for_each(|sector| offer(&mut guest, IN, sector));
    guest.kick(&mut device).unwrap();
    await_answers(&mut guest, &mut device, 2);
    guest.kick(&mut device).unwrap();
    quiesce(&mut guest, &mut device);
    assert_eq!(guest.answered(), 0);
    guest.recorder.pass(std::time::Duration::from_secs(7200));
    guest.expire(&mut device);
    await_answers(&mut guest, &mut device, 1);
}

#[test]
fn a_broken_chain_leaves_nothing_in_flight() {
    let (image, mem) = (image(64 * 512), testing::memory(1 << 20));
    let (mut device, mut guest) = setup(&image, &mem);
    offer(&mut guest, IN, 0);
    guest.driver.offer(&[readable(u64::MAX, 16), writable(DATA, 513)]);
    assert!(matches!(guest.kick(&mut device), Err(DeviceError::Queue(_))));
    guest.fill(DATA, &[0x5a; 512]);
    device.end();
    device.reset();
    assert_eq!(guest.bytes(DATA, 512), [0x5a; 512]);
}

#[test]
fn one_head_offered_without_end_does_not_overfill_the_engine() {
    let (image, mem) = (image(64 * 512), testing::memory(1 << 20));
    let (mut device, mut guest) = setup(&image, &mem);
    offer(&mut guest, IN, 0);
    let mut answered = 0;
    for _ in 0..20 {
        (0..200).for_each(|_| guest.driver.offer_head(0));
        guest.drain(&mut device);
        quiesce(&mut guest, &mut device);
        answered += guest.answered();
        guest.drain(&mut device);
    }
    assert!(answered >= 200, "{answered}");
    quiesce(&mut guest, &mut device);
}

#[test]
fn a_driver_without_flush_has_durable_writes() {
    let (image, mem) = (image(64 * 512), testing::memory(1 << 20));
    let (mut device, mut guest) = setup(&image, &mem);
    guest.features = feature::COMMON;
    offer(&mut guest, OUT, 0);
    guest.kick(&mut device).unwrap();
    await_answers(&mut guest, &mut device, 1);
    assert_eq!(
        (status(&guest, 0), content(&image)[..512] == [0; 512]),
        (OK, true)
    );
}

fn in_memory(len: u64) -> TempFile {
    let image = TempFile::new_in(std::path::Path::new("/dev/shm")).unwrap();
    image.as_file().set_len(len).unwrap();
    image
}

#[test]
fn a_request_that_comes_alone_to_an_image_in_memory_is_answered_at_once() {
    let (image, mem) = (in_memory(64 * 512), testing::memory(1 << 20));
    let (mut device, mut guest) = setup(&image, &mem);
    for (kind, sector) in [(OUT, 1), (FLUSH, 2), (IN, 3)] {
        offer(&mut guest, kind, sector);
        guest.kick(&mut device).unwrap();
        assert_eq!((guest.answered(), status(&guest, sector)), (1, OK));
    }
    (0..SECTORS).for_each(|sector| offer(&mut guest, OUT, sector));
    guest.kick(&mut device).unwrap();
    await_answers(&mut guest, &mut device, 64);
}

#[test]
fn a_notification_of_nothing_is_counted() {
    let (image, mem) = (image(64 * 512), testing::memory(1 << 20));
    let (mut device, mut guest) = setup(&image, &mem);
    offer(&mut guest, IN, 0);
    guest.kick(&mut device).unwrap();
    await_answers(&mut guest, &mut device, 1);
    assert_eq!(device.metrics()["no_avail_buffer"], 0);
    guest.kick(&mut device).unwrap();
    assert_eq!(device.metrics()["no_avail_buffer"], 1);
}

/// Offers flushes as an honest driver may, until the engine takes no more; returns how many were offered in all.
fn fill_engine(guest: &mut Guest<'_>, device: &mut Block, image: &TempFile) -> u16 {
    guest.header(HEADER, FLUSH, 0);
    let (mut offered, mut answered) = (0u16, 0u16);
    while device.metrics()["io_engine_throttled_events"] == 0 {
        // Something to flush, so that it takes the host a while.
        image.as_file().write_all(&[1; 4096]).unwrap();
        let room = 256 - offered.wrapping_sub(answered);
        for _ in 0..room {
            guest
                .driver
                .offer_indirect(0x30000, &[readable(HEADER, 16), writable(STATUS, 1)]);
        }
        offered = offered.wrapping_add(room);
        guest.kick(device).unwrap();
        answered = answered.wrapping_add(u16::try_from(guest.answered()).unwrap());
    }
    offered
}

#[test]
fn a_full_engine_is_told_of_what_comes_after() {
    let (image, other, mem) = (image(64 * 512), image(64 * 512), testing::memory(1 << 20));
    let (mut device, mut guest) = setup(&image, &mem);
    let offered = fill_engine(&mut guest, &mut device, &image);
    // All that is in flight lands here, and no event comes of it.
    let patch = json!({"drive_id": "data", "path_on_host": path(&other)});
    let mut io = testing::io(&mem, &mut guest.queues, &guest.recorder, guest.features);
    device.update(patch, &mut io).unwrap();
    assert_eq!(io.again, None);
    // The driver notifies when it passes this index.
    assert_eq!(guest.driver.notify_wish().1, offered);
}

#[test]
fn a_run_of_what_does_not_overlap_ends_in_time() {
    let (image, mem) = (in_memory(64 << 20), testing::memory(1 << 20));
    let (mut device, mut guest) = setup(&image, &mem);
    // The most sectors in a request, which the file system has to be sent.
    guest.header(HEADER, WRITE_ZEROES, 0);
    guest.fill(DATA, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0x80, 0, 0, 0, 0, 0, 0]);
    for _ in 0..100 {
        guest.driver.offer_indirect(
            0x30000,
            &[readable(HEADER, 16), readable(DATA, 16), writable(STATUS, 1)],
        );
    }
    assert_eq!(guest.kick(&mut device).unwrap(), Some(0));
    let first = guest.answered();
    assert!((1..100).contains(&first), "{first}");
    guest.drain(&mut device);
    assert_eq!(first + guest.answered(), 100);
}
