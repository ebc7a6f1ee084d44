//! Saved state.

use serde_json::Value;

use super::*;
use crate::virtio::{Blob, StateError};

const ALL: u64 = 1024 * MIB;

/// Loads this state into a new device; gives the device's host, too.
fn load(state: &Value) -> (Result<(), StateError>, Mem, Ledger) {
    let ledger = Ledger::default();
    let mut device = config().build(&ledger).unwrap();
    let loaded = device.load(Blob::new("memory_hotplug", 1, state));
    (loaded, device, ledger)
}

fn refused(state: &Value) -> String {
    let (loaded, device, ledger) = load(state);
    assert!(ledger.account().slots.is_empty());
    assert_eq!(device.status()["plugged_size_mib"], 0);
    loaded.unwrap_err().to_string()
}

#[test]
fn a_saved_device_goes_on_where_it_was() {
    let mem = testing::memory(MEMORY);
    let mut guest = Guest::new(&mem, 512);
    guest.plug(3, 2);
    guest.plug(63, 2);
    guest.plug(200, 1);
    let ledger = Ledger::default();
    let mut other = config().build(&ledger).unwrap();

    other.load(guest.device.save()).unwrap();

    assert_eq!(other.status(), guest.device.status());
    assert_eq!(other.config_space(), guest.device.config_space());
    assert_eq!(ledger.account().slots, guest.ledger.account().slots);
    assert_eq!(
        serde_json::to_value(other.save()).unwrap(),
        serde_json::to_value(guest.device.save()).unwrap()
    );
}

#[test]
fn a_state_that_cannot_be_is_refused_and_leaves_no_memory() {
    let state = |requested: u64, usable: u64, plugged: Value| json!({"start": LEDGER_START, "requested": requested, "usable": usable, "plugged": plugged});
    assert!(load(&state(ALL, ALL, json!([[0, 512]]))).0.is_ok());
    assert!(refused(&state(ALL, ALL, json!([[0, 513]]))).contains("outside the usable region"));
    assert!(refused(&state(ALL, ALL, json!([[511, u64::MAX]]))).contains("not in order"));
    assert!(refused(&state(ALL, ALL, json!([[8, 2], [9, 1]]))).contains("not in order"));
    assert!(refused(&state(ALL, ALL, json!([[8, 0]]))).contains("not in order"));
    assert!(refused(&state(ALL, 0, json!([]))).contains("more memory"));
    assert!(refused(&state(2 * ALL, 2 * ALL, json!([]))).contains("more usable"));
    assert!(refused(&state(MIB, ALL, json!([]))).contains("whole blocks"));
    let elsewhere = json!({"start": 0, "requested": 0, "usable": 0, "plugged": []});
    assert!(refused(&elsewhere).contains("was at 0x0"));
    assert!(refused(&json!({"start": 0})).contains("malformed"));
}

#[test]
fn a_host_without_memory_refuses_a_state_with_some() {
    let ledger = Ledger::default();
    ledger.account().bad_slot = Some(1);
    let mut device = config().build(&ledger).unwrap();
    let state =
        json!({"start": LEDGER_START, "requested": ALL, "usable": ALL, "plugged": [[0, 1], [60, 100]]});
    let error = device.load(Blob::new("memory_hotplug", 1, &state)).unwrap_err();
    assert!(error.to_string().contains("no memory"), "{error}");
    assert!(ledger.account().slots.is_empty());
}
