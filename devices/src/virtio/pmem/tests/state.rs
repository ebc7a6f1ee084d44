//! Patches and saved state.

use serde_json::json;

use super::*;
use crate::virtio::{Blob, UpdateError};

fn update(device: &mut Pmem, guest: &mut Guest<'_>, patch: serde_json::Value) -> Result<(), UpdateError> {
    device.update(patch, &mut guest.lend())
}

/// One flush in an hour.
fn limits() -> serde_json::Value {
    json!({"ops": {"size": 1, "refill_time": 3_600_000}})
}

#[test]
fn a_patch_may_change_limits_and_nothing_else() {
    let mem = testing::memory(MIB);
    let (mut device, mut guest) = (device(), Guest::new(&mem, false));
    update(&mut device, &mut guest, json!({"id": "pm"})).unwrap();
    let path = json!({"id": "pm", "path_on_host": "/x"});
    assert!(matches!(
        update(&mut device, &mut guest, path),
        Err(UpdateError::Json(_))
    ));
}

#[test]
fn what_is_beyond_the_limits_waits_for_its_time_or_for_a_patch() {
    let mem = testing::memory(MIB);
    let (mut device, mut guest) = (device(), Guest::new(&mem, false));
    device.activate(&mut guest.lend()).unwrap();
    let limited = json!({"id": "pm", "rate_limiter": limits()});
    update(&mut device, &mut guest, limited).unwrap();
    let flush = |device: &mut Pmem, guest: &mut Guest<'_>| {
        guest.offer(0);
        guest.kick(device).unwrap();
        device.quiesce(&mut guest.lend()).unwrap();
        guest.answer().is_some()
    };
    assert!(flush(&mut device, &mut guest) && !flush(&mut device, &mut guest));
    assert_eq!(device.metrics()["rate_limiter_throttled_events"], 1);

    let unlimited = json!({"id": "pm", "rate_limiter": {"ops": {"size": 0, "refill_time": 0}}});
    update(&mut device, &mut guest, unlimited).unwrap();
    let timer = *guest.recorder.watched.lock().unwrap().last().unwrap();
    device.on_event(timer.1, &mut guest.lend()).unwrap();
    device.quiesce(&mut guest.lend()).unwrap();
    assert!(guest.answer().is_some());
    assert_eq!(device.metrics()["rate_limiter_event_count"], 1);
}

#[test]
fn a_flush_costs_as_many_bytes_as_the_file_has() {
    let mem = testing::memory(MIB);
    let file = file(3 * MIB);
    let mut config = config(&file);
    let bytes = json!({"bandwidth": {"size": 3 << 20, "refill_time": 3_600_000}});
    config.rate_limiter = serde_json::from_value(bytes).unwrap();
    let (mut device, mut guest) = (config.build(&Ledger::default()).unwrap(), Guest::new(&mem, false));
    device.activate(&mut guest.lend()).unwrap();
    for _ in 0..2 {
        guest.offer(0);
        guest.kick(&mut device).unwrap();
        device.quiesce(&mut guest.lend()).unwrap();
    }
    assert!(guest.answer().is_some() && guest.answer().is_none());
}

#[test]
fn a_saved_device_is_loaded_by_one_of_the_same_size_and_kind_only() {
    let mut read_only = read_only_device();
    let mut larger = config(&file(4 * MIB)).build(&Ledger::default()).unwrap();

    device().load(device().save()).unwrap();

    let error = larger.load(device().save()).unwrap_err().to_string();
    assert!(
        error.contains("had 2097152 bytes at 0x100000000 and has 4194304"),
        "{error}"
    );
    let error = read_only.load(device().save()).unwrap_err().to_string();
    assert!(error.contains("read_only of pmem device 'pm'"), "{error}");
    assert!(device().load(Blob::new("pmem", 2, &())).is_err());
}
