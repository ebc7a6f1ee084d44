//! Flushes and what a driver can do wrong with them.

use super::*;

const FLUSH: u32 = 0;
const FAILED: u32 = u32::MAX;

fn activated<'m>(mem: &'m GuestMemory, event_idx: bool) -> (Pmem, Guest<'m>) {
    let (mut device, mut guest) = (device(), Guest::new(mem, event_idx));
    device.activate(&mut guest.lend()).unwrap();
    (device, guest)
}

#[test]
fn answers_a_flush_when_it_is_done_and_not_before() {
    let mem = testing::memory(MIB);
    let (mut device, mut guest) = activated(&mem, false);
    let head = guest.offer(FLUSH);
    guest.kick(&mut device).unwrap();
    assert_eq!((guest.answer(), guest.interrupts()), (None, 0));

    guest.flushed(&mut device);

    assert_eq!(guest.answer(), Some((head, 4, 0)));
    assert_eq!(guest.interrupts(), 1);
    assert_eq!(device.metrics()["queue_event_count"], 1);
    assert_eq!(device.metrics()["event_fails"], 0);
    assert_eq!(device.histograms()[0].1.count(), 1);
}

#[test]
fn one_flush_answers_all_that_were_there_when_it_began() {
    let mem = testing::memory(MIB);
    let (mut device, mut guest) = activated(&mem, true);
    let heads = [guest.offer(FLUSH), guest.offer(FLUSH)];
    guest.kick(&mut device).unwrap();
    let late = guest.offer(FLUSH);
    guest.kick(&mut device).unwrap();

    guest.flushed(&mut device);

    let answered = [guest.answer(), guest.answer()].map(|answer| answer.unwrap().0);
    assert_eq!((answered, guest.answer()), (heads, None));
    device.quiesce(&mut guest.lend()).unwrap();
    assert_eq!(guest.answer().map(|answer| answer.0), Some(late));
}

#[test]
fn a_pause_waits_for_the_flush_and_leaves_the_rest_for_later() {
    let mem = testing::memory(MIB);
    let (mut device, mut guest) = activated(&mem, false);
    guest.offer(FLUSH);
    guest.kick(&mut device).unwrap();
    guest.offer(FLUSH);

    device.quiesce(&mut guest.lend()).unwrap();

    assert!(guest.answer().is_some() && guest.answer().is_none());
    guest.kick(&mut device).unwrap();
    device.quiesce(&mut guest.lend()).unwrap();
    assert!(guest.answer().is_some());
}

#[test]
fn a_reset_forgets_the_flush_that_was_running() {
    let mem = testing::memory(MIB);
    let (mut device, mut guest) = activated(&mem, false);
    guest.offer(FLUSH);
    guest.kick(&mut device).unwrap();
    device.reset();

    let mut guest = Guest::new(&mem, false);
    device.activate(&mut guest.lend()).unwrap();
    guest.flushed(&mut device);
    assert_eq!(guest.answer(), None);
    let head = guest.offer(FLUSH);
    guest.kick(&mut device).unwrap();
    device.quiesce(&mut guest.lend()).unwrap();
    assert_eq!(guest.answer(), Some((head, 4, 0)));
}

#[test]
fn a_read_only_device_fails_every_flush_at_once() {
    let mem = testing::memory(MIB);
    let (mut device, mut guest) = (read_only_device(), Guest::new(&mem, true));
    device.activate(&mut guest.lend()).unwrap();
    let heads = [guest.offer(FLUSH), guest.offer(FLUSH)];

    assert!(!guest.kick(&mut device).unwrap());

    let answers = [guest.answer(), guest.answer()];
    assert_eq!(answers, heads.map(|head| Some((head, 4, FAILED))));
    assert_eq!(device.metrics()["event_fails"], 2);
}

#[test]
fn unknown_and_short_requests_are_answered_with_failure() {
    let mem = testing::memory(MIB);
    let (mut device, mut guest) = activated(&mem, false);
    let unknown = guest.offer(1);
    guest.kick(&mut device).unwrap();
    device.quiesce(&mut guest.lend()).unwrap();
    assert_eq!(guest.answer(), Some((unknown, 4, FAILED)));

    let short = guest.offer_raw(&[readable(REQUEST, 3), writable(RESPONSE, 4)]);
    let no_room = guest.offer_raw(&[readable(REQUEST, 4), writable(RESPONSE, 1)]);
    let nothing = guest.offer_raw(&[]);
    guest.kick(&mut device).unwrap();
    device.quiesce(&mut guest.lend()).unwrap();
    assert_eq!(guest.answer().map(|a| (a.0, a.1)), Some((short, 4)));
    assert_eq!(guest.answer().map(|a| (a.0, a.1)), Some((no_room, 1)));
    assert_eq!(guest.answer().map(|a| (a.0, a.1)), Some((nothing, 0)));
}

#[test]
fn a_request_outside_memory_breaks_the_queue() {
    let mem = testing::memory(MIB);
    let (mut device, mut guest) = activated(&mem, false);
    guest.offer_raw(&[readable(1 << 40, 4)]);
    guest.kick(&mut device).unwrap();
    assert!(device.quiesce(&mut guest.lend()).is_err());
    assert_eq!(device.metrics()["event_fails"], 1);
}
