//! Finding a backend and agreeing with it.

use std::thread;

use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::*;
use crate::virtio::vhost_user::OpenError;

fn refusal(fake: &Fake) -> OpenError {
    VhostUserBlock::new(&config(fake)).err().unwrap()
}

fn cause(error: &OpenError) -> String {
    std::error::Error::source(error)
        .map(ToString::to_string)
        .unwrap_or_default()
}

#[test]
fn shows_what_the_backend_has_and_the_driver_may_use() {
    let mut fake = Fake::new();
    fake.start();
    let plain = VhostUserBlock::new(&config(&fake)).unwrap();
    assert_eq!(plain.config_space()[0], 8);
    assert_eq!(plain.info().features, feature::COMMON | 1 << 6);
    drop(plain);
    let writeback = Config {
        cache_type: crate::virtio::block::CacheType::Writeback,
        ..config(&fake)
    };
    let device = VhostUserBlock::new(&writeback).unwrap();
    assert_eq!(device.info().features, feature::COMMON | 1 << 6 | 1 << 9);
    assert!(device.metrics()["init_time_us"].as_u64() > Some(0));
}

#[test]
fn has_as_many_queues_as_the_config_says_if_the_backend_has_them() {
    let mut fake = Fake::new();
    fake.with(|state| (state.queues, state.features) = (4, state.features | 1 << 12));
    fake.start();
    let with = |queues| {
        VhostUserBlock::new(&Config {
            queues: Some(queues),
            ..config(&fake)
        })
    };
    let device = with(4).unwrap();
    assert_eq!(
        (device.info().queue_sizes.len(), device.config_space()[34]),
        (4, 4)
    );
    assert_eq!(device.info().features & 1 << 12, 1 << 12);
    drop(device);
    let error = with(5).err().unwrap();
    assert_eq!(cause(&error), "it has 4 queues, and the drive asks for 5");
}

#[test]
fn says_when_nobody_listens() {
    let fake = Fake::new();
    assert!(matches!(refusal(&fake), OpenError::Connect { .. }));
}

#[test]
fn refuses_a_backend_that_lacks_what_is_needed() {
    for (features, protocol, words) in [
        (1 << 32, 1 << 9, "no protocol features"),
        (1 << 32 | 1 << 30, 1 << 3, "no configuration space"),
        (1 << 30, 1 << 9, "older than virtio 1.0"),
    ] {
        let mut fake = Fake::new();
        fake.with(|state| (state.features, state.protocol) = (features, protocol));
        fake.start();
        let error = refusal(&fake);
        assert!(cause(&error).contains(words), "{words}: {}", cause(&error));
    }
}

#[test]
fn a_backend_that_talks_nonsense_is_refused() {
    let header = |request: u32, flags: u32, size: u32| [request, flags, size].map(u32::to_ne_bytes).concat();
    for garbage in [
        header(7, 5, 8),
        header(1, 1, 8),
        header(1, 4, 8),
        header(1, 5, u32::MAX),
        [header(1, 5, 3), vec![0; 3]].concat(),
    ] {
        let mut fake = Fake::new();
        fake.with(|state| state.garbage = Some(garbage.clone()));
        fake.start();
        assert!(
            matches!(refusal(&fake), OpenError::Unsuitable { .. }),
            "{garbage:?}"
        );
    }
}

#[test]
fn a_backend_that_says_nothing_is_not_waited_for_without_end() {
    let mut fake = Fake::new();
    fake.with(|state| state.silent = true);
    fake.start();
    let before = Instant::now();
    assert!(matches!(
        refusal(&fake),
        OpenError::Unsuitable { .. } | OpenError::Connect { .. }
    ));
    assert!(before.elapsed() < Duration::from_secs(20));
}

#[test]
fn gives_the_backend_the_queue_and_its_descriptors() {
    let (mem, mut fake) = (shared_memory(), Fake::new());
    fake.start();
    let mut machine = Machine::started(&mem, &fake);
    fake.with(|state| {
        assert_eq!((state.bases[&0], state.enabled.as_slice()), (0, &[0][..]));
        assert_eq!(state.driver_features, feature::VERSION_1 | 1 << 30);
        assert!(state.requests.contains(&5));
    });
    assert!(fake.is_kicked(0));
    machine.kicks[0].write(1).unwrap();
    assert!(fake.is_kicked(0) && !fake.is_kicked(0));
    assert!(
        machine
            .recorder
            .watched
            .lock()
            .unwrap()
            .iter()
            .any(|(_, token)| *token == 0x100)
    );
    fake.call(0);
    machine.event(0x100);
    assert_eq!(machine.interrupts(), 1);
}

#[test]
fn private_memory_is_nothing_for_a_backend() {
    let (mem, mut fake) = (crate::testing::memory(0x10000), Fake::new());
    fake.start();
    let machine = Machine::started(&mem, &fake);
    assert_eq!(machine.device.metrics()["activate_fails"], 1);
    assert!(fake.with(|state| state.enabled.is_empty()));
}

extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

#[test]
fn waits_on_for_the_backend_when_something_interrupts() {
    let mut fake = Fake::new();
    fake.start();
    let (config, state) = (config(&fake), Arc::clone(&fake.state));
    register_signal_handler(SIGRTMIN() + 7, ignore).unwrap();
    // It answers nothing as long as its state is taken.
    let held = state.lock().unwrap();
    let waiting = thread::spawn(move || VhostUserBlock::new(&config).map(drop));
    for _ in 0..50 {
        thread::sleep(Duration::from_millis(1));
        waiting.kill(SIGRTMIN() + 7).unwrap();
    }
    drop(held);
    waiting.join().unwrap().unwrap();
}
