//! Saving and loading.

use super::*;
use crate::virtio::{Blob, StateError};

#[test]
fn goes_on_where_it_was_saved() {
    let mem = memory();
    let mut old = Guest::new(&mem, &full_config());
    old.patch(&Patch::Target(TargetPatch { amount_mib: 5 })).unwrap();
    old.patch(&Patch::StartHinting(StartHinting::default())).unwrap();
    old.device.write_config(4, &77u32.to_le_bytes());
    old.send(3, &2u32.to_le_bytes());
    let statistic = [4u16.to_le_bytes().as_slice(), &7u64.to_le_bytes()].concat();
    old.send(2, &statistic);

    let mut device = full_config().build().unwrap();
    device.load(old.device.save()).unwrap();
    assert_eq!(device.status(), old.device.status());
    assert_eq!(device.config_space(), old.device.config_space());
    assert_eq!(device.save(), old.device.save());

    // The new device has the driver's buffer, and its run goes on.
    old.device = device;
    old.run(|device, io| device.activate(io)).unwrap();
    old.run(|device, io| device.on_event(0, io)).unwrap();
    assert_eq!(old.used(2), Some((0, 0)));
    old.offer(3, &[writable(FIRST, 4096)]);
    assert_eq!(old.zeroed(1), [true]);
}

#[test]
fn refuses_a_held_buffer_that_cannot_be_and_other_fields() {
    let saved = |change: fn(&mut Value)| {
        let mut state = json!({
            "target_pages": 0, "actual_pages": 0, "statistics": {}, "held_statistics": null,
            "hinting": {"host_cmd": 0, "guest_cmd": null, "acknowledge_on_stop": false, "last_run": 0},
        });
        change(&mut state);
        full_config()
            .build()
            .unwrap()
            .load(Blob::new("balloon", 1, &state))
    };
    assert!(saved(|_| {}).is_ok());
    assert!(matches!(
        saved(|state| state["held_statistics"] = 256.into()),
        Err(StateError::Inconsistent { .. })
    ));
    assert!(matches!(
        saved(|state| state["more"] = 1.into()),
        Err(StateError::Malformed { .. })
    ));
}
