//! Requests, one by one.

use super::*;

#[test]
fn blocks_are_plugged_up_to_what_is_requested() {
    let mem = testing::memory(MEMORY);
    let mut guest = Guest::new(&mem, 8);
    assert_eq!(guest.plug(0, 3), ACK);
    assert_eq!(guest.plug(3, 2), NACK);
    assert_eq!(guest.plug(3, 1), ACK);
    assert_eq!(guest.plug(4, 1), NACK);
    assert_eq!(
        (guest.field(PLUGGED), guest.status().plugged_size_mib),
        (8 * MIB, 8)
    );
    assert_eq!(guest.device.metrics()["plug_count"], 4);
    assert_eq!(guest.device.metrics()["plug_fails"], 2);
    assert_eq!(guest.device.metrics()["plug_bytes"], 8 * MIB);
}

#[test]
fn slots_are_there_while_a_block_in_them_is_plugged() {
    let mem = testing::memory(MEMORY);
    let mut guest = Guest::new(&mem, 1024);
    // A slot has 64 blocks.
    assert_eq!(guest.plug(63, 2), ACK);
    assert_eq!(guest.plug(60, 1), ACK);
    assert_eq!(guest.slots(), [0, 1]);

    assert_eq!(guest.unplug(63, 2), ACK);
    assert_eq!(guest.slots(), [0]);
    assert_eq!(guest.ledger.account().discarded, [(0, 126 * MIB..128 * MIB)]);

    assert_eq!(guest.unplug(60, 1), ACK);
    assert!(guest.slots().is_empty());
    assert_eq!(guest.device.metrics()["unplug_bytes"], 6 * MIB);
}

#[test]
fn what_is_plugged_or_unplugged_already_is_an_error() {
    let mem = testing::memory(MEMORY);
    let mut guest = Guest::new(&mem, 1024);
    assert_eq!(guest.plug(10, 4), ACK);
    assert_eq!(guest.plug(8, 3), ERROR);
    assert_eq!(guest.unplug(12, 3), ERROR);
    assert_eq!(guest.unplug(20, 1), ERROR);
    assert_eq!(guest.status().plugged_size_mib, 8);
    assert_eq!(guest.device.metrics()["unplug_fails"], 2);
}

#[test]
fn ranges_that_are_not_blocks_of_the_region_are_an_error() {
    let mem = testing::memory(MEMORY);
    let mut guest = Guest::new(&mem, 1024);
    for kind in [PLUG, UNPLUG, STATE] {
        assert_eq!(guest.ask(kind, 0, 0).0, ERROR);
        assert_eq!(guest.ask(kind, 510, 3).0, ERROR);
        assert_eq!(guest.ask(kind, 512, 1).0, ERROR);
        assert_eq!(guest.ask_at(kind, LEDGER_START + MIB, 1).0, ERROR);
        assert_eq!(guest.ask_at(kind, LEDGER_START - 2 * MIB, 1).0, ERROR);
        assert_eq!(guest.ask_at(kind, !(2 * MIB - 1), u16::MAX).0, ERROR);
    }
    assert_eq!(guest.device.metrics()["state_fails"], 6);
}

#[test]
fn the_state_of_blocks_is_told() {
    let mem = testing::memory(MEMORY);
    let mut guest = Guest::new(&mem, 1024);
    guest.plug(62, 4);
    assert_eq!(guest.ask(STATE, 62, 4), (ACK, 0));
    assert_eq!(guest.ask(STATE, 66, 100), (ACK, 1));
    assert_eq!(guest.ask(STATE, 60, 3), (ACK, 2));
}

#[test]
fn everything_can_be_unplugged_at_once() {
    let mem = testing::memory(MEMORY);
    let mut guest = Guest::new(&mem, 1024);
    guest.plug(0, 1);
    guest.plug(500, 12);
    guest.request_size(0).unwrap();
    assert_eq!(guest.field(USABLE), 1024 * MIB);

    assert_eq!(guest.ask_at(UNPLUG_ALL, 1, 0).0, ACK);

    assert!(guest.slots().is_empty());
    assert_eq!((guest.field(PLUGGED), guest.field(USABLE)), (0, 0));
    assert_eq!(guest.plug(0, 1), ERROR);
    assert_eq!(guest.device.metrics()["unplug_all_count"], 1);
    assert_eq!(guest.device.metrics()["unplug_bytes"], 26 * MIB);
}

#[test]
fn a_host_without_memory_is_busy_and_nothing_changes() {
    let mem = testing::memory(MEMORY);
    let mut guest = Guest::new(&mem, 1024);
    guest.ledger.account().bad_slot = Some(2);
    assert_eq!(guest.plug(0, 192), BUSY);
    assert!(guest.slots().is_empty());
    assert_eq!(guest.plug(0, 128), ACK);
    assert_eq!(guest.plug(128, 1), BUSY);
    assert_eq!(guest.slots(), [0, 1]);
}

#[test]
fn memory_that_the_host_does_not_take_back_stays_plugged() {
    let mem = testing::memory(MEMORY);
    let mut guest = Guest::new(&mem, 1024);
    guest.plug(0, 128);
    guest.ledger.account().refuse = true;
    assert_eq!(guest.unplug(1, 127), BUSY);
    assert_eq!(guest.ask(STATE, 0, 128), (ACK, 0));
    assert_eq!(guest.slots(), [0, 1]);
    assert_eq!(guest.device.metrics()["unplug_discard_fails"], 1);
    // A whole slot goes by unmapping it, which cannot fail.
    assert_eq!(guest.unplug(64, 64), ACK);
    assert_eq!(guest.slots(), [0]);
}

#[test]
fn unknown_and_short_requests_are_an_error() {
    let mem = testing::memory(MEMORY);
    let mut guest = Guest::new(&mem, 1024);
    assert_eq!(guest.ask(4, 0, 1).0, ERROR);
    guest
        .driver
        .offer(&[readable(REQUEST, 23), writable(RESPONSE, 10)]);
    guest.kick().unwrap();
    assert_eq!(guest.driver.used().map(|used| used.1), Some(10));
    assert_eq!(mem.read_obj::<u16>(GuestAddress(RESPONSE)).unwrap(), ERROR);
    assert_eq!(guest.device.metrics()["queue_event_fails"], 2);
}

#[test]
fn a_response_is_cut_to_the_room_for_it() {
    let mem = testing::memory(MEMORY);
    let mut guest = Guest::new(&mem, 1024);
    guest.ask(STATE, 0, 1);
    guest
        .driver
        .offer(&[readable(REQUEST, 24), writable(RESPONSE, 1)]);
    guest.driver.offer(&[readable(REQUEST, 24)]);
    guest.kick().unwrap();
    let written = [guest.driver.used(), guest.driver.used()].map(|used| used.unwrap().1);
    assert_eq!(written, [1, 0]);
}

#[test]
fn many_requests_take_several_turns() {
    let mem = testing::memory(MEMORY);
    let mut guest = Guest::new(&mem, 1024);
    guest.ask(STATE, 0, 1);
    for _ in 0..8 {
        guest.driver.offer(&[writable(RESPONSE, 10)]);
    }
    assert_eq!(guest.kick().unwrap(), Some(0));
    assert_eq!(guest.kick().unwrap(), None);
}

#[test]
fn a_driver_that_breaks_the_queue_leaves_the_sizes_right() {
    let mem = testing::memory(MEMORY);
    let mut guest = Guest::new(&mem, 1024);
    guest.ask(STATE, 0, 1);
    mem.write_obj(PLUG, GuestAddress(REQUEST)).unwrap();
    guest
        .driver
        .offer(&[readable(REQUEST, 24), writable(RESPONSE, 10)]);
    guest.driver.offer(&[readable(1 << 40, 24)]);
    assert!(guest.kick().is_err());
    assert_eq!(guest.field(PLUGGED), 2 * MIB);
    assert_eq!(guest.device.metrics()["queue_event_fails"], 1);
}
