use serde_json::json;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use vm_memory::GuestAddressSpace;

use super::*;
use crate::testing::{Driver, Inline, Recorder, memory, readable, recorder, writable};
use crate::virtio::echo::{Echo, Journal, QUEUE_SIZE};

const NEGOTIATING: u8 = status::ACKNOWLEDGE | status::DRIVER;
const NEGOTIATED: u8 = NEGOTIATING | status::FEATURES_OK;
const READY: u8 = NEGOTIATED | status::DRIVER_OK;
const RING: u64 = 0x1000;
const OTHER_RING: u64 = 0x2000;

struct Setup {
    slot: VirtioSlot,
    host: Arc<Inline>,
    irq: Arc<Recorder>,
    memory: SharedMemory,
}

fn setup() -> Setup {
    in_memory(SharedMemory::new(memory(0x10000)))
}

fn in_memory(memory: SharedMemory) -> Setup {
    with_device(Echo::new(), memory)
}

fn with_device(device: Echo, memory: SharedMemory) -> Setup {
    let (host, irq) = (Arc::<Inline>::default(), recorder());
    let slot = VirtioSlot::new(
        Box::new(device),
        Arc::clone(&irq) as Arc<dyn Irq>,
        memory.clone(),
        Arc::clone(&host) as Arc<dyn LaneHost>,
    );
    Setup {
        slot: slot.unwrap(),
        host,
        irq,
        memory,
    }
}

/// Goes as far as FEATURES_OK.
fn negotiate(slot: &mut VirtioSlot) {
    slot.set_status(NEGOTIATING);
    slot.driver.driver_features_select = 1;
    slot.set_driver_features(1);
    slot.set_status(NEGOTIATED);
}

/// Starts the device with queue 0 as the driver in `testing` lays it out.
fn start(setup: &mut Setup) {
    let memory = setup.memory.memory();
    let config = Driver::new(&memory, RING, QUEUE_SIZE).config();
    negotiate(&mut setup.slot);
    *setup.slot.queue_mut().unwrap() = config;
    setup.slot.set_status(READY);
}

#[test]
fn shows_the_offered_features_in_two_halves() {
    let mut slot = setup().slot;
    assert_eq!(slot.device_features(), 0x3000_0020);
    slot.driver.device_features_select = 1;
    assert_eq!(slot.device_features(), 1);
    slot.driver.device_features_select = 2;
    assert_eq!(slot.device_features(), 0);
}

#[test]
fn refuses_a_choice_of_features_that_it_did_not_offer() {
    let mut slot = setup().slot;
    slot.set_status(NEGOTIATING);
    slot.driver.driver_features_select = 1;
    slot.set_driver_features(0b11);
    slot.set_status(NEGOTIATED);
    assert_eq!(slot.status(), NEGOTIATING);
    slot.set_driver_features(0b01);
    slot.set_status(NEGOTIATED);
    assert_eq!(slot.status(), NEGOTIATED);
}

#[test]
fn refuses_a_driver_that_is_older_than_virtio_1() {
    let mut slot = setup().slot;
    slot.set_status(NEGOTIATING);
    slot.set_driver_features(1 << 5);
    slot.set_status(NEGOTIATED);
    assert_eq!(slot.status(), NEGOTIATING);
}

#[test]
fn fixes_the_features_with_features_ok() {
    let mut slot = setup().slot;
    negotiate(&mut slot);
    slot.driver.driver_features_select = 0;
    slot.set_driver_features(1 << 5);
    assert_eq!(slot.driver_features(), 0);
}

#[test]
fn lets_queues_be_changed_only_between_features_ok_and_driver_ok() {
    let mut setup = setup();
    assert!(setup.slot.queue_mut().is_none());
    negotiate(&mut setup.slot);
    assert!(setup.slot.queue_mut().is_some());
    setup.slot.driver.queue_select = 2;
    assert!(setup.slot.queue_mut().is_none() && setup.slot.queue().is_none());
    setup.slot.set_status(READY);
    setup.slot.driver.queue_select = 0;
    assert!(setup.slot.queue_mut().is_none() && setup.slot.queue().is_some());
}

#[test]
fn ignores_a_status_that_clears_bits() {
    let mut slot = setup().slot;
    slot.set_status(NEGOTIATING);
    slot.set_status(status::ACKNOWLEDGE);
    assert_eq!(slot.status(), NEGOTIATING);
}

#[test]
fn runs_the_device_from_driver_ok_to_reset() {
    let mut setup = setup();
    start(&mut setup);
    assert_eq!((setup.host.len(), setup.slot.status()), (1, READY));
    setup.slot.set_status(0);
    assert_eq!((setup.host.len(), setup.slot.status()), (0, 0));
    assert!(!setup.slot.queue().unwrap().ready);
    start(&mut setup);
    assert_eq!(setup.host.len(), 1);
}

#[test]
fn does_not_start_a_failed_device_or_one_without_features_ok() {
    let mut setup = setup();
    setup.slot.set_status(NEGOTIATING | status::DRIVER_OK);
    setup.slot.set_status(0);
    negotiate(&mut setup.slot);
    setup.slot.set_status(READY | status::FAILED);
    assert!(setup.host.is_empty());
}

#[test]
fn needs_a_reset_when_a_queue_is_set_up_wrongly() {
    let mut setup = setup();
    negotiate(&mut setup.slot);
    let queue = setup.slot.queue_mut().unwrap();
    (queue.size, queue.ready) = (3, true);
    setup.slot.set_status(READY);
    assert_eq!(setup.slot.status(), READY | status::NEEDS_RESET);
    assert_eq!(
        (setup.irq.config.load(Ordering::Relaxed), setup.host.len()),
        (1, 0)
    );
    setup.slot.set_status(0);
    assert_eq!(setup.slot.status(), 0);
}

#[test]
fn needs_a_reset_when_the_driver_breaks_a_running_queue() {
    let mut setup = setup();
    start(&mut setup);
    let memory = setup.memory.memory();
    Driver::new(&memory, RING, QUEUE_SIZE).set_avail_index(100);
    setup.host.event(0);
    assert_eq!(setup.slot.status(), READY | status::NEEDS_RESET);
    assert_eq!(setup.irq.config.load(Ordering::Relaxed), 1);
    start_again(&mut setup);
    assert_eq!(setup.slot.status(), READY);
}

#[test]
fn reports_why_a_device_needs_a_reset_once_until_the_reset() {
    let mut setup = setup();
    let reasons = Arc::<Mutex<Vec<String>>>::default();
    let seen = Arc::clone(&reasons);
    setup
        .slot
        .report_to(Box::new(move |reason| seen.lock().unwrap().push(reason.into())));
    let memory = setup.memory.memory();
    for _ in 0..2 {
        start(&mut setup);
        Driver::new(&memory, RING, QUEUE_SIZE).set_avail_index(100);
        setup.host.event(0);
        setup.host.event(0);
        setup.slot.set_status(0);
        Driver::new(&memory, RING, QUEUE_SIZE).set_avail_index(0);
    }
    let reasons = reasons.lock().unwrap();
    assert_eq!(reasons.len(), 2, "{reasons:?}");
    assert!(
        reasons[0].starts_with("the driver broke the virtqueue protocol: "),
        "{reasons:?}"
    );
}

fn start_again(setup: &mut Setup) {
    setup.slot.set_status(0);
    start(setup);
}

#[test]
fn tells_a_driver_of_a_new_configuration_space() {
    let mut setup = setup();
    setup.slot.update(json!("other")).unwrap();
    let told = |setup: &Setup| setup.irq.config.load(Ordering::Relaxed);
    assert_eq!((setup.slot.config_generation(), told(&setup)), (1, 0));
    start(&mut setup);
    setup.slot.update(json!("third")).unwrap();
    setup.slot.update(json!("third")).unwrap();
    assert_eq!((setup.slot.config_generation(), told(&setup)), (2, 1));
    let mut data = [0xff; 4];
    setup.slot.read_config(3, &mut data);
    assert_eq!(&data, b"rd\0\0");
    setup.slot.read_config(u64::MAX, &mut data);
    assert_eq!(data, [0; 4]);
}

/// What the registers show of the configuration space.
fn shown(slot: &VirtioSlot) -> [u8; 6] {
    let mut data = [0; 6];
    slot.read_config(0, &mut data);
    data
}

#[test]
fn lets_the_driver_write_what_the_device_takes() {
    let mut setup = setup();
    setup.slot.write_config(4, b"X");
    assert_eq!(&shown(&setup.slot), b"confXg");
    start(&mut setup);
    setup.slot.write_config(5, b"Y");
    setup.slot.write_config(0, b"ZZ");
    assert_eq!(&shown(&setup.slot), b"confXY");
    assert_eq!(setup.irq.config.load(Ordering::Relaxed), 0);
    setup.slot.set_status(0);
    assert_eq!(&shown(&setup.slot), b"confXY");
}

#[test]
fn ignores_writes_that_end_behind_the_configuration_space() {
    let mut setup = setup();
    start(&mut setup);
    setup.slot.write_config(5, b"XY");
    setup.slot.write_config(6, b"X");
    setup.slot.write_config(u64::MAX, b"X");
    setup.slot.write_config(0, &[0; 9]);
    setup.slot.update(json!("longer than nine")).unwrap();
    setup.slot.write_config(4, &[0; 9]);
    let mut data = [0; 16];
    setup.slot.read_config(0, &mut data);
    assert_eq!(&data, b"longer than nine");
}

#[test]
fn refuses_a_malformed_patch_and_stays_as_it_is() {
    let mut setup = setup();
    start(&mut setup);
    assert!(matches!(setup.slot.update(json!(1)), Err(UpdateError::Json(_))));
    assert_eq!(setup.slot.config_generation(), 0);
}

#[test]
fn serves_what_came_while_it_was_paused() {
    let mut setup = setup();
    start(&mut setup);
    let memory = setup.memory.memory();
    let mut driver = Driver::new(&memory, RING, QUEUE_SIZE);
    setup.slot.pause();
    driver.offer(&[readable(0x4000, 4), writable(0x5000, 4)]);
    setup.host.event(0);
    assert_eq!(driver.used(), None);
    setup.slot.resume();
    assert_eq!(driver.used(), Some((0, 4)));
}

#[test]
fn goes_on_after_a_restore_with_what_was_offered_before() {
    let mut old = setup();
    start(&mut old);
    let memory = old.memory.memory();
    let mut driver = Driver::new(&memory, RING, QUEUE_SIZE);
    old.slot.pause();
    driver.offer(&[readable(0x4000, 4), writable(0x5000, 4)]);
    old.slot.kick(0);
    let state = old.slot.save();

    let mut new = in_memory(old.memory.clone());
    new.slot.load(state.clone()).unwrap();
    assert_eq!(new.slot.save(), state);
    new.host.event(0);
    assert_eq!(driver.used(), None);
    new.slot.resume();
    assert_eq!(driver.used(), Some((0, 4)));
    assert_eq!(new.slot.metrics(), json!({ "served": 1 }));
}

#[test]
fn refuses_a_running_state_whose_driver_is_not_ready() {
    let mut setup = setup();
    start(&mut setup);
    let mut state = setup.slot.save();
    state.driver.status = NEGOTIATED;
    let refused = in_memory(setup.memory.clone()).slot.load(state);
    assert!(matches!(refused, Err(StateError::Inconsistent { .. })));
}

#[test]
fn keeps_what_the_driver_wrote_before_the_features_were_agreed() {
    let mut setup = setup();
    let mut state = setup.slot.save();
    state.driver.features = 1 << 50;
    setup.slot.load(state.clone()).unwrap();
    assert_eq!(setup.slot.save(), state);
}

#[test]
fn refuses_a_state_with_other_queues_or_features() {
    let mut setup = setup();
    let state = setup.slot.save();
    let mut features = state.clone();
    features.driver.features = 1 << 50;
    features.driver.status = NEGOTIATED;
    assert!(matches!(
        setup.slot.load(features),
        Err(StateError::Inconsistent { .. })
    ));
    let mut queues = state.clone();
    queues.driver.queues.pop();
    assert!(matches!(
        setup.slot.load(queues),
        Err(StateError::Inconsistent { .. })
    ));
    let mut running = state;
    running.driver.status = READY;
    running.running = Some(Vec::new());
    assert!(matches!(
        setup.slot.load(running),
        Err(StateError::Inconsistent { .. })
    ));
}

/// A device that has a sibling for its second queue, both queues set up; and the sibling's journal.
fn start_twins(memory: &SharedMemory) -> (Setup, Journal) {
    let journal = Journal::default();
    let mut setup = with_device(Echo::twins(&journal), memory.clone());
    let memory = memory.memory();
    negotiate(&mut setup.slot);
    for (queue, base) in [RING, OTHER_RING].into_iter().enumerate() {
        setup.slot.driver.queue_select = u16::try_from(queue).unwrap();
        *setup.slot.queue_mut().unwrap() = Driver::new(&memory, base, QUEUE_SIZE).config();
    }
    setup.slot.set_status(READY);
    (setup, journal)
}

fn taken(journal: &Journal) -> Vec<&'static str> {
    std::mem::take(&mut journal.lock().unwrap())
}

#[test]
fn each_sibling_serves_its_own_queue_in_its_own_lane() {
    let memory = SharedMemory::new(memory(0x10000));
    let (setup, journal) = start_twins(&memory);
    let plain = memory.memory();
    let (mut one, mut two) = (
        Driver::new(&plain, RING, QUEUE_SIZE),
        Driver::new(&plain, OTHER_RING, QUEUE_SIZE),
    );
    assert_eq!((setup.host.len(), taken(&journal)), (2, vec!["activate"]));
    one.offer(&[readable(0x4000, 4), writable(0x5000, 4)]);
    setup.host.event(0);
    assert_eq!(
        (one.used(), two.used(), taken(&journal)),
        (Some((0, 4)), None, vec![])
    );
    two.offer(&[readable(0x4000, 4), writable(0x5000, 4)]);
    setup.host.event(1);
    assert_eq!((two.used(), taken(&journal)), (Some((0, 4)), vec!["queue 1"]));
    assert_eq!(setup.slot.metrics(), json!({ "served": 2 }));
    assert_eq!(setup.slot.status(), READY);
}

#[test]
fn a_reset_brings_all_siblings_back_and_they_run_again() {
    let memory = SharedMemory::new(memory(0x10000));
    let (mut setup, journal) = start_twins(&memory);
    setup.slot.set_status(0);
    assert_eq!(
        (setup.host.len(), taken(&journal)),
        (0, vec!["activate", "reset"])
    );
    start(&mut setup);
    assert_eq!((setup.host.len(), taken(&journal)), (2, vec!["activate"]));
    drop(setup);
    assert_eq!(taken(&journal), ["reset"]);
}

#[test]
fn a_change_finds_the_siblings_at_rest_and_reaches_them() {
    let memory = SharedMemory::new(memory(0x10000));
    let (mut setup, journal) = start_twins(&memory);
    taken(&journal);
    setup.slot.update(json!("other!")).unwrap();
    assert_eq!(taken(&journal), ["quiesce", "refresh", "queue 1"]);
    assert_eq!(
        (&shown(&setup.slot), setup.slot.config_generation()),
        (b"other!", 1)
    );
    assert!(setup.slot.update(json!(1)).is_err());
    assert_eq!(taken(&journal), ["quiesce", "queue 1"]);

    setup.slot.pause();
    assert_eq!(taken(&journal), ["quiesce"]);
    setup.slot.update(json!("third!")).unwrap();
    assert_eq!(taken(&journal), ["refresh"]);
    setup.slot.resume();
    assert_eq!(taken(&journal), ["queue 1"]);

    setup.slot.set_status(0);
    taken(&journal);
    setup.slot.update(json!("fourth")).unwrap();
    assert_eq!(taken(&journal), ["refresh"]);
}

#[test]
fn a_broken_queue_of_one_sibling_stops_all_of_them() {
    let memory = SharedMemory::new(memory(0x10000));
    let (setup, _) = start_twins(&memory);
    let plain = memory.memory();
    let mut one = Driver::new(&plain, RING, QUEUE_SIZE);
    Driver::new(&plain, OTHER_RING, QUEUE_SIZE).set_avail_index(100);
    setup.host.event(1);
    assert_eq!(setup.slot.status(), READY | status::NEEDS_RESET);
    one.offer(&[readable(0x4000, 4), writable(0x5000, 4)]);
    setup.host.event(0);
    assert_eq!(one.used(), None);
}

#[test]
fn a_restore_has_the_queues_of_all_siblings() {
    let memory = SharedMemory::new(memory(0x10000));
    let (old, _) = start_twins(&memory);
    let plain = memory.memory();
    let mut drivers = [RING, OTHER_RING].map(|base| Driver::new(&plain, base, QUEUE_SIZE));
    for driver in &mut drivers {
        driver.offer(&[readable(0x4000, 4), writable(0x5000, 4)]);
    }
    old.host.event(1);
    old.slot.pause();
    let state = old.slot.save();

    let journal = Journal::default();
    let mut new = with_device(Echo::twins(&journal), memory.clone());
    new.slot.load(state.clone()).unwrap();
    assert_eq!(
        (new.slot.save(), taken(&journal)),
        (state, vec!["refresh", "activate"])
    );
    new.slot.resume();
    assert_eq!(drivers.each_mut().map(|driver| driver.used()), [Some((0, 4)); 2]);
    assert_eq!(drivers.each_mut().map(|driver| driver.used()), [None; 2]);
}

#[test]
fn a_device_that_runs_is_told_of_memory_even_while_it_is_paused() {
    let memory = SharedMemory::new(memory(0x10000));
    let (mut setup, journal) = start_twins(&memory);
    taken(&journal);
    setup.slot.memory_changed();
    assert_eq!(taken(&journal), ["memory"]);
    setup.slot.pause();
    setup.slot.memory_changed();
    assert_eq!(taken(&journal), ["quiesce", "memory"]);
    setup.slot.set_status(0);
    setup.slot.memory_changed();
    assert_eq!(taken(&journal), ["reset"]);
}
