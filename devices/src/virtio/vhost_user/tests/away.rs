//! A backend that dies, and perhaps returns.

use super::*;
use crate::virtio::vhost_user::GRACE;

const TIMER: u32 = 2;
const FAILED: u8 = 1;

/// A machine with three requests, of which the backend has answered those at these places before it died.
fn abandoned<'m>(mem: &'m GuestMemory, fake: &mut Fake, answered: &[usize]) -> (Machine<'m>, [u16; 3]) {
    fake.start();
    let mut machine = Machine::started(mem, fake);
    let heads = [0, 1, 2].map(|number| machine.request(number));
    for (position, place) in (0u16..).zip(answered) {
        machine.answer(position, heads[*place]);
    }
    machine.lose(fake);
    (machine, heads)
}

fn used_heads(machine: &mut Machine<'_>) -> Vec<u16> {
    std::iter::from_fn(|| machine.driver.used())
        .map(|(head, _)| head)
        .collect()
}

#[test]
fn what_an_orderly_backend_has_left_is_done_by_the_next_one() {
    let (mem, mut fake) = (shared_memory(), Fake::new());
    let (mut machine, _) = abandoned(&mem, &mut fake, &[0]);
    machine.event(TIMER);
    assert_eq!(machine.interrupts(), 0);
    fake.start();
    machine.event(TIMER);
    fake.with(|state| assert_eq!(state.bases[&0], 1));
    assert!(fake.is_kicked(0));
    assert_eq!((machine.status(1), machine.status(2)), (0xff, 0xff));
}

/// A backend that is back begins behind all requests: of three, the one that was not answered has failed.
fn assert_what_was_left_fails(machine: &mut Machine<'_>, fake: &mut Fake, heads: &[u16; 3]) {
    fake.start();
    machine.event(TIMER);
    fake.with(|state| assert_eq!(state.bases[&0], 3));
    assert_eq!(used_heads(machine), [heads[2], heads[0], heads[1]]);
    assert_eq!(
        [0, 1, 2].map(|number| machine.status(number)),
        [0xff, FAILED, 0xff]
    );
}

#[test]
fn what_a_backend_out_of_order_has_left_fails_and_nothing_else() {
    let (mem, mut fake) = (shared_memory(), Fake::new());
    let (mut machine, heads) = abandoned(&mem, &mut fake, &[2, 0]);
    assert_what_was_left_fails(&mut machine, &mut fake, &heads);
    assert_eq!(machine.interrupts(), 1);
}

#[test]
fn the_next_backend_gets_the_memory_of_what_was_in_flight() {
    let (mem, mut fake) = (shared_memory(), Fake::new());
    fake.with(|state| state.protocol |= 1 << 12);
    let (mut machine, _) = abandoned(&mem, &mut fake, &[2]);
    fake.with(|state| {
        assert!(state.requests.contains(&31) && state.requests.contains(&32));
        state.requests.clear();
    });
    fake.start();
    machine.event(TIMER);
    fake.with(|state| {
        assert!(!state.requests.contains(&31) && state.requests.contains(&32));
        assert_eq!(state.bases[&0], 1);
    });
    assert_eq!(machine.status(1), 0xff);
}

#[test]
fn memory_of_what_was_in_flight_is_of_no_use_to_a_backend_that_does_not_take_it() {
    let (mem, mut fake) = (shared_memory(), Fake::new());
    fake.with(|state| state.protocol |= 1 << 12);
    let (mut machine, heads) = abandoned(&mem, &mut fake, &[2, 0]);
    fake.with(|state| state.protocol &= !(1 << 12));
    assert_what_was_left_fails(&mut machine, &mut fake, &heads);
}

#[test]
fn requests_fail_after_a_while_and_work_again_when_the_backend_is_back() {
    let (mem, mut fake) = (shared_memory(), Fake::new());
    let (mut machine, heads) = abandoned(&mem, &mut fake, &[1]);
    machine.recorder.pass(GRACE - Duration::from_millis(1));
    machine.event(TIMER);
    assert_eq!(machine.status(0), 0xff);
    machine.recorder.pass(Duration::from_millis(1));
    machine.event(TIMER);
    assert_eq!(used_heads(&mut machine), [heads[1], heads[0], heads[2]]);
    assert_eq!(
        [0, 1, 2].map(|number| machine.status(number)),
        [FAILED, 0xff, FAILED]
    );
    assert!(machine.interrupts() > 0);

    assert!(machine.watches_kick());
    let late = machine.request(3);
    machine.event(0x200);
    assert_eq!(
        (used_heads(&mut machine), machine.status(3)),
        (vec![late], FAILED)
    );
    fake.start();
    machine.event(TIMER);
    fake.with(|state| assert_eq!((state.bases[&0], state.enabled.last()), (4, Some(&0))));
    assert!(!machine.watches_kick());
    machine.request(4);
    machine.event(0x200);
    assert_eq!(machine.status(4), 0xff);
}

#[test]
fn a_backend_that_was_lost_before_the_driver_was_ready_may_come_later() {
    let (mem, mut fake) = (shared_memory(), Fake::new());
    fake.start();
    let mut machine = Machine::new(&mem, &fake);
    fake.kill();
    machine.run(|device, io| device.activate(io));
    machine.request(0);
    fake.start();
    machine.event(TIMER);
    fake.with(|state| assert_eq!(state.bases[&0], 0));
    assert!(fake.is_kicked(0));
}

#[test]
fn another_disk_is_shown_and_one_that_lacks_features_is_not_taken() {
    let (mem, mut fake) = (shared_memory(), Fake::new());
    let (mut machine, _) = abandoned(&mem, &mut fake, &[0, 1, 2]);
    let features = fake.with(|state| {
        state.config[0] = 24;
        std::mem::replace(&mut state.features, 1 << 30 | 1 << 32)
    });
    fake.start();
    machine.event(TIMER);
    assert_eq!(machine.device.config_space()[0], 8);
    fake.with(|state| state.features = features);
    machine.event(TIMER);
    assert_eq!(machine.device.config_space()[0], 24);
    assert_eq!(
        machine.recorder.config.load(std::sync::atomic::Ordering::Relaxed),
        1
    );
}

#[test]
fn a_reset_while_the_backend_is_away_forgets_what_was_left() {
    let (mem, mut fake) = (shared_memory(), Fake::new());
    let (mut machine, _) = abandoned(&mem, &mut fake, &[2]);
    machine.device.end();
    machine.device.reset();
    let driver = Driver::new(&mem, 0x1000, QUEUE_SIZE);
    (machine.queues, machine.driver) = (vec![driver.queue(false)], driver);
    machine.run(|device, io| device.activate(io));
    fake.start();
    machine.event(TIMER);
    fake.with(|state| assert_eq!(state.bases[&0], 0));
    assert_eq!(machine.interrupts(), 0);
}

#[test]
fn rings_that_do_not_tell_what_is_left_make_the_device_need_a_reset() {
    let (mem, mut fake) = (shared_memory(), Fake::new());
    fake.start();
    let mut machine = Machine::started(&mem, &fake);
    machine.request(0);
    machine.answer(0, 7);
    machine.request(1);
    machine.lose(&mut fake);
    fake.start();
    let result = machine.call(|device, io| device.on_event(TIMER, io));
    assert!(result.is_err());
}
