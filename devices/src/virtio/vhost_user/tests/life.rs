//! A backend that stays: pauses, resets, changes.

use super::*;
use crate::virtio::UpdateError;

#[test]
fn a_pause_stops_the_backend_and_a_resume_goes_on_where_it_stood() {
    let (mem, mut fake) = (shared_memory(), Fake::new());
    fake.start();
    let mut machine = Machine::started(&mem, &fake);
    let head = machine.request(0);
    machine.answer(0, head);
    fake.with(|state| state.bases.insert(0, 1));
    machine.run(|device, io| device.quiesce(io));
    assert!(fake.with(|state| state.enabled.is_empty()));
    assert_eq!(machine.queues[0].next_available(), 1);

    machine.run(|device, io| device.on_queue(0, io));
    fake.with(|state| assert_eq!((state.bases[&0], state.enabled.as_slice()), (1, &[0][..])));
    assert!(fake.is_kicked(0));
    machine.run(|device, io| device.on_queue(0, io));
    assert_eq!(fake.with(|state| state.enabled.len()), 1);
}

#[test]
fn a_reset_stops_the_backend_and_it_runs_again_from_the_start() {
    let (mem, mut fake) = (shared_memory(), Fake::new());
    fake.start();
    let mut machine = Machine::started(&mem, &fake);
    fake.with(|state| state.bases.insert(0, 9));
    machine.device.end();
    machine.device.reset();
    assert!(fake.with(|state| state.enabled.is_empty()));
    machine.run(|device, io| device.activate(io));
    fake.with(|state| assert_eq!((state.bases[&0], state.enabled.len()), (0, 1)));
}

#[test]
fn a_backend_that_does_not_stop_is_left() {
    let (mem, mut fake) = (shared_memory(), Fake::new());
    fake.start();
    let mut machine = Machine::started(&mem, &fake);
    fake.with(|state| state.garbage = Some(vec![0; 12]));
    machine.device.end();
    machine.device.reset();
    fake.with(|state| state.garbage = None);
    machine.run(|device, io| device.activate(io));
    machine.event(2);
    eventually(|| fake.with(|state| state.enabled.len() == 1 || state.enabled.len() == 2));
    assert_eq!(machine.device.metrics()["activate_fails"], 0);
}

#[test]
fn the_backend_tells_of_a_new_size() {
    let (mem, mut fake) = (shared_memory(), Fake::new());
    fake.start();
    let mut machine = Machine::started(&mem, &fake);
    fake.with(|state| {
        state.config[0] = 16;
        let message = [2u32, 1, 0].map(u32::to_ne_bytes).concat();
        std::io::Write::write_all(state.channel.as_mut().unwrap(), &message).unwrap();
    });
    machine.event(1);
    let mut shown = [0];
    machine.recorder.space.read(0, &mut shown);
    assert_eq!((shown, machine.device.config_space()[0]), ([16], 16));
    assert_eq!(
        machine.recorder.config.load(std::sync::atomic::Ordering::Relaxed),
        1
    );
    assert!(machine.device.metrics()["config_change_time_us"].as_u64() > Some(0));
}

#[test]
fn a_backend_that_asks_for_what_was_not_agreed_on_is_left() {
    let (mem, mut fake) = (shared_memory(), Fake::new());
    fake.start();
    let mut machine = Machine::started(&mem, &fake);
    fake.with(|state| {
        let message = [3u32, 1, 0].map(u32::to_ne_bytes).concat();
        std::io::Write::write_all(state.channel.as_mut().unwrap(), &message).unwrap();
    });
    machine.event(1);
    let update = machine.call(|device, io| device.update(json!({"drive_id": "disk"}), io));
    assert!(matches!(update, Err(UpdateError::Host { .. })), "{update:?}");
}

#[test]
fn an_empty_patch_reads_the_configuration_and_any_other_is_refused() {
    let (mem, mut fake) = (shared_memory(), Fake::new());
    fake.start();
    let mut machine = Machine::started(&mem, &fake);
    fake.with(|state| state.config[0] = 32);
    machine
        .call(|device, io| device.update(json!({"drive_id": "disk"}), io))
        .unwrap();
    assert_eq!(machine.device.config_space()[0], 32);
    for patch in [
        json!({"drive_id": "disk", "path_on_host": "/x"}),
        json!({"drive_id": "disk", "rate_limiter": {}}),
    ] {
        let refused = machine.call(|device, io| device.update(patch, io));
        assert!(matches!(refused, Err(UpdateError::Refused(_))), "{refused:?}");
    }
}

#[test]
fn loads_what_it_saved_and_not_what_another_backend_has() {
    let mut fake = Fake::new();
    fake.start();
    let mut device = VhostUserBlock::new(&config(&fake)).unwrap();
    let saved = device.save();
    device.load(saved.clone()).unwrap();
    drop(device);
    fake.with(|state| state.config[0] = 9);
    let mut other = VhostUserBlock::new(&config(&fake)).unwrap();
    assert!(other.load(saved).is_err());
}
