//! Limits of a drive. The recorder's clock stands still unless a test lets time pass.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::live::running;
use super::*;
use crate::testing::Inline;

/// A drive with these limits.
fn limited(image: &TempFile, limits: Value) -> Block {
    let rate_limiter = Some(serde_json::from_value(limits).unwrap());
    Config {
        rate_limiter,
        ..config(image)
    }
    .build()
    .unwrap()
}

fn per_second(size: u64) -> Value {
    json!({"size": size, "refill_time": 1000})
}

fn pass(guest: &Guest, millis: u64) {
    guest.recorder.pass(Duration::from_millis(millis));
}

/// Times held back, and events of the timer.
fn counts(device: &Block) -> (Value, Value) {
    let metrics = device.metrics();
    let get = |name: &str| metrics[name].clone();
    (
        get("rate_limiter_throttled_events"),
        get("rate_limiter_event_count"),
    )
}

#[test]
fn holds_reads_and_writes_back_until_their_bytes_have_come() {
    let (image, mem) = (image(8 * 512), testing::memory(1 << 20));
    let (mut device, mut guest) = (
        limited(&image, json!({"bandwidth": per_second(1024)})),
        Guest::new(&mem),
    );
    guest.activate(&mut device);
    guest.offer(IN, 1);
    guest.offer(OUT, 1);
    guest.offer(IN, 1);
    guest.drain(&mut device);
    assert_eq!(guest.answered(), 2);
    pass(&guest, 499);
    guest.expire(&mut device);
    assert_eq!(guest.answered(), 0);
    pass(&guest, 1);
    guest.expire(&mut device);
    assert_eq!(guest.answered(), 1);
    assert_eq!(counts(&device), (json!(2), json!(2)));
}

#[test]
fn every_valid_request_is_an_operation_and_an_invalid_one_is_none() {
    let (image, mem) = (image(512), testing::memory(1 << 20));
    let mut device = Config {
        cache_type: CacheType::Writeback,
        rate_limiter: serde_json::from_value(json!({"ops": per_second(3)})).unwrap(),
        ..config(&image)
    }
    .build()
    .unwrap();
    let mut guest = Guest::new(&mem);
    guest.activate(&mut device);
    for kind in [99, FLUSH, 99, GET_ID, IN, 99, IN, 99] {
        guest.offer(kind, 1);
    }
    guest.drain(&mut device);
    assert_eq!(guest.answered(), 6);
    pass(&guest, 334);
    guest.expire(&mut device);
    assert_eq!(guest.answered(), 2);
}

#[test]
fn a_kick_while_a_request_is_held_back_does_nothing() {
    let (image, mem) = (image(512), testing::memory(1 << 20));
    let (mut device, mut guest) = (limited(&image, json!({"ops": per_second(1)})), Guest::new(&mem));
    guest.activate(&mut device);
    guest.offer(IN, 1);
    guest.offer(IN, 1);
    guest.drain(&mut device);
    pass(&guest, 5000);
    guest.drain(&mut device);
    assert_eq!(guest.answered(), 1);
    guest.expire(&mut device);
    assert_eq!(guest.answered(), 1);
    guest.expire(&mut device);
    assert_eq!(counts(&device), (json!(1), json!(1)));
}

#[test]
fn a_request_above_the_bucket_goes_and_is_waited_for() {
    let (image, mem) = (image(8 * 512), testing::memory(1 << 20));
    let (mut device, mut guest) = (
        limited(&image, json!({"bandwidth": per_second(1024)})),
        Guest::new(&mem),
    );
    guest.activate(&mut device);
    guest.offer(IN, 8);
    guest.offer(IN, 1);
    guest.drain(&mut device);
    assert_eq!(guest.answered(), 1);
    pass(&guest, 3499);
    guest.expire(&mut device);
    assert_eq!(guest.answered(), 0);
    pass(&guest, 1);
    guest.expire(&mut device);
    assert_eq!(guest.answered(), 1);
}

#[test]
fn looks_at_no_clock_and_makes_no_timer_without_limits() {
    let (image, mem) = (image(512), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    guest.activate(&mut device);
    guest.offer(IN, 1);
    guest.drain(&mut device);
    assert_eq!(guest.answered(), 1);
    assert!(guest.recorder.watched.lock().unwrap().is_empty());
    assert!(!guest.recorder.was_asked_for_time());
}

#[test]
fn a_reset_forgets_what_is_held_back_and_not_what_was_used_up() {
    let (image, mem) = (image(512), testing::memory(1 << 20));
    let (mut device, mut guest) = (limited(&image, json!({"ops": per_second(1)})), Guest::new(&mem));
    guest.activate(&mut device);
    guest.offer(IN, 1);
    guest.offer(IN, 1);
    guest.drain(&mut device);
    assert_eq!(guest.answered(), 1);
    device.reset();
    guest.activate(&mut device);
    guest.drain(&mut device);
    assert_eq!((guest.answered(), counts(&device).0), (0, json!(2)));
}

fn patch(guest: &mut Guest, device: &mut Block, patch: Value) -> bool {
    let mut io = testing::io(guest.mem, &mut guest.queues, &guest.recorder, guest.features);
    device.update(patch, &mut io).is_ok()
}

#[test]
fn a_patch_lifts_a_limit_and_sets_what_was_held_back_going() {
    let (image, mem) = (image(512), testing::memory(1 << 20));
    let (mut device, mut guest) = (limited(&image, json!({"ops": per_second(1)})), Guest::new(&mem));
    guest.activate(&mut device);
    (0..3).for_each(|_| guest.offer(IN, 1));
    guest.drain(&mut device);
    assert_eq!(guest.answered(), 1);
    let lift = json!({"drive_id": "data", "rate_limiter": {"ops": {"size": 0, "refill_time": 0}}});
    assert!(patch(&mut guest, &mut device, lift));
    assert!(is_readable(guest.recorder.watched.lock().unwrap()[0].0));
    guest.expire(&mut device);
    assert_eq!(guest.answered(), 2);
}

#[test]
fn a_patch_limits_a_running_drive_and_keeps_the_other_bucket() {
    let (image, mem) = (image(512), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    guest.activate(&mut device);
    let bandwidth = json!({"drive_id": "data", "rate_limiter": {"bandwidth": per_second(512)}});
    assert!(patch(&mut guest, &mut device, bandwidth));
    assert_eq!(guest.recorder.watched.lock().unwrap().len(), 1);
    (0..2).for_each(|_| guest.offer(IN, 1));
    guest.drain(&mut device);
    assert_eq!(guest.answered(), 1);
    let ops = json!({"drive_id": "data", "rate_limiter": {"ops": per_second(9)}});
    assert!(patch(&mut guest, &mut device, ops));
    guest.expire(&mut device);
    assert_eq!(guest.answered(), 0);
    pass(&guest, 1000);
    guest.expire(&mut device);
    assert_eq!(guest.answered(), 1);
}

#[test]
fn a_patch_with_a_bad_part_changes_nothing() {
    let (image, mem) = (image(512), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&image), Guest::new(&mem));
    guest.activate(&mut device);
    let limits = json!({"ops": per_second(1)});
    let no_image = json!({"drive_id": "data", "path_on_host": "/no-such-image", "rate_limiter": limits});
    assert!(!patch(&mut guest, &mut device, no_image));
    let negative = json!({"drive_id": "data", "rate_limiter": {"ops": {"size": -1, "refill_time": 1}}});
    assert!(!patch(&mut guest, &mut device, negative));
    (0..9).for_each(|_| guest.offer(IN, 1));
    guest.drain(&mut device);
    assert_eq!(guest.answered(), 9);
}

#[test]
fn a_restored_drive_has_no_new_burst() {
    let (image, mem) = (image(512), testing::memory(1 << 20));
    let limits = json!({"ops": {"size": 1, "one_time_burst": 2, "refill_time": 3_600_000}});
    let (mut before, mut guest) = (limited(&image, limits.clone()), Guest::new(&mem));
    guest.activate(&mut before);
    (0..3).for_each(|_| guest.offer(IN, 1));
    guest.kick(&mut before).unwrap();
    assert_eq!(guest.answered(), 3);

    let state = before.save();
    drop(before);
    let mut after = limited(&image, limits);
    after.load(state.clone()).unwrap();
    guest.activate(&mut after);
    guest.offer(IN, 1);
    guest.kick(&mut after).unwrap();
    assert_eq!(guest.answered(), 0);
    drop(after);
    assert!(device(&image).load(state).is_err());
}

proptest! {
    /// Whatever is asked and whenever: the limits hold at every moment, and in the end everything is answered.
    #[test]
    fn limits_hold_and_starve_nobody(steps in proptest::collection::vec((1..8u32, 0..400u64), 1..20)) {
        let (image, mem) = (image(8 * 512), testing::memory(1 << 20));
        let limits = json!({"bandwidth": per_second(4096), "ops": per_second(5)});
        let (mut device, mut guest) = (limited(&image, limits), Guest::new(&mem));
        guest.activate(&mut device);
        let (mut offered, mut answered, mut time) = (Vec::new(), 0, 0);
        let rests = std::iter::repeat_n((0, 1000), steps.len());
        for (sectors, millis) in steps.iter().copied().chain(rests) {
            if sectors > 0 {
                guest.offer(IN, sectors);
                offered.push(u64::from(sectors) * 512);
                guest.drain(&mut device);
            }
            pass(&guest, millis);
            time += millis;
            guest.expire(&mut device);
            answered += guest.answered();
            let bytes: u64 = offered[..answered].iter().sum();
            prop_assert!(bytes * 1000 <= 4096 * (1000 + time));
            prop_assert!(answered as u64 * 1000 <= 5 * (1000 + time));
        }
        prop_assert_eq!(answered, offered.len());
    }
}

/// The event of the limiter's timer, as lanes see it.
const TIMER_EVENT: u32 = 1 << 16;

#[test]
fn an_event_lost_in_a_pause_is_made_up_for_on_resume() {
    let (image, mem) = (image(512), testing::memory(1 << 20));
    let device = limited(&image, json!({"ops": {"size": 1, "refill_time": 1}}));
    let host = Arc::<Inline>::default();
    let slot = running(device, &mem, testing::recorder(), host.clone());
    let mut guest = Guest::new(&mem);
    guest.offer(IN, 1);
    guest.offer(IN, 1);
    host.event(0);
    slot.pause();
    std::thread::sleep(Duration::from_millis(2));
    host.event(TIMER_EVENT);
    let before = guest.answered();
    slot.resume();
    assert_eq!((before, guest.answered()), (1, 1));
}

/// Whether the descriptor becomes readable within some seconds.
fn is_readable(fd: RawFd) -> bool {
    let mut fd = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: needed as std has no poll. One valid entry is passed, and the count is one.
    unsafe { libc::poll(&mut fd, 1, 10_000) == 1 }
}
