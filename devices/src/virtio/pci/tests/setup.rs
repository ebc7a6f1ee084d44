use serde_json::json;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::testing::{readable, writable};

#[test]
fn looks_like_a_modern_virtio_function() {
    let guest = Guest::new();
    assert_eq!(guest.config(0), [0xf4, 0x1a, 0x42, 0x10]);
    assert_eq!(guest.config(8), [1, 0, 0x80, 0x01]);
    let notify = guest.capability(9, Some(cap::NOTIFY));
    assert_eq!(guest.config(notify + 8), 0u32.to_le_bytes());
    assert_eq!(guest.config(notify + 16), [4, 0, 0, 0]);
    let common = guest.capability(9, Some(cap::COMMON));
    assert_eq!(guest.config(common + 12), [56, 0, 0, 0]);
    let device = guest.capability(9, Some(cap::DEVICE));
    assert_eq!(
        (guest.config(device + 8), guest.config(device + 12)),
        ([0, 0x20, 0, 0], [6, 0, 0, 0])
    );
    assert_eq!(guest.config(guest.capability(0x11, None)), [0x11, 0x4c, 2, 0]);
}

#[test]
fn serves_a_driver_from_probe_to_interrupt() {
    let guest = Guest::new();
    guest.negotiate();
    guest.enable_msix();
    guest.set_up_queue();
    guest.set(20, &[READY]);
    let memory = guest.memory.memory();
    memory.write_slice(b"ping", GuestAddress(0x4000)).unwrap();
    let mut driver = Driver::new(&memory, RING, QUEUE_SIZE);
    driver.offer(&[readable(0x4000, 4), writable(0x5000, 4)]);
    guest.notify_at(0);
    assert_eq!(
        guest.function.lock().unwrap().slot().kicks()[0].read().unwrap(),
        1
    );
    guest.host.event(0);
    let mut answer = [0; 4];
    memory.read_slice(&mut answer, GuestAddress(0x5000)).unwrap();
    assert_eq!((driver.used(), &answer), (Some((0, 4)), b"ping"));
    assert_eq!((guest.sent(0), guest.sent(1), guest.sent(2)), (0, 1, 0));
    assert!(!guest.pin());
    assert_eq!(guest.get(ISR_OFFSET), [0]);
}

#[test]
fn gives_each_queue_a_notification_address_that_configuration_space_reaches() {
    let guest = Guest::new();
    guest.set(22, &[1, 0]);
    assert_eq!(guest.get(30), [1, 0]);
    guest.notify_at(4);
    guest.notify_at(400);
    let mut function = guest.function.lock().unwrap();
    let kicks = function.slot().kicks();
    assert!(kicks[0].read().is_err());
    assert_eq!(kicks[1].read().unwrap(), 1);
}

#[test]
fn forgets_the_driver_with_a_reset_and_starts_again() {
    let guest = Guest::new();
    guest.start();
    guest.enable_msix();
    guest.set(20, &[0]);
    assert_eq!((guest.status(), guest.host.len()), (0, 0));
    assert_eq!(
        (guest.get(16), guest.get(26), guest.get(28)),
        ([0xff; 2], [0xff; 2], [0; 2])
    );
    guest.start();
    assert_eq!(guest.host.len(), 1);
}

#[test]
fn is_reset_when_it_may_master_the_bus_no_more() {
    let guest = Guest::new();
    guest.start();
    guest.enable_msix();
    // Registers and interrupts off and on again touch nothing.
    guest.write_config(4, &[4, 4]);
    guest.write_config(4, &[6, 0]);
    assert_eq!((guest.status(), guest.host.len()), (READY, 1));
    guest.write_config(4, &[2, 0]);
    assert_eq!((guest.status(), guest.host.len()), (0, 0));
    assert_eq!((guest.get(16), guest.get(26)), ([0xff; 2], [0xff; 2]));
    guest.write_config(4, &[6, 0]);
    guest.start();
    assert_eq!(guest.host.len(), 1);
}

#[test]
fn shows_that_features_were_refused() {
    let guest = Guest::new();
    guest.set(20, &[NEGOTIATING]);
    guest.set(8, &1u32.to_le_bytes());
    guest.set(12, &3u32.to_le_bytes());
    guest.set(20, &[NEGOTIATED]);
    assert_eq!(guest.status(), NEGOTIATING);
}

#[test]
fn needs_a_reset_after_a_broken_queue() {
    let guest = Guest::new();
    guest.start();
    guest.enable_msix();
    let memory = guest.memory.memory();
    Driver::new(&memory, RING, QUEUE_SIZE).set_avail_index(100);
    guest.host.event(0);
    assert_eq!(guest.status(), READY | status::NEEDS_RESET);
    assert_eq!((guest.sent(0), guest.sent(1)), (1, 0));
}

#[test]
fn needs_a_reset_after_an_invalid_queue_size() {
    let guest = Guest::new();
    guest.negotiate();
    guest.set_up_queue();
    guest.set(24, &[3, 0]);
    assert_eq!(guest.get(24), [3, 0]);
    guest.set(20, &[READY]);
    assert_eq!(guest.status(), READY | status::NEEDS_RESET);
}

#[test]
fn tells_of_a_new_configuration_space() {
    let guest = Guest::new();
    guest.enable_msix();
    guest.set(20, &[status::ACKNOWLEDGE | status::DRIVER]);
    let [generation] = guest.get(21);
    guest
        .function
        .lock()
        .unwrap()
        .slot()
        .update(json!("fresh"))
        .unwrap();
    assert_eq!(guest.get(21), [generation + 1]);
    assert_eq!(&guest.get(DEVICE_OFFSET), b"fresh\0\0\0");
    assert_eq!((guest.sent(0), guest.get(ISR_OFFSET)), (1, [2]));
}

#[test]
fn goes_on_after_a_restore() {
    let old = Guest::new();
    old.start();
    old.enable_msix();
    let memory = old.memory.memory();
    let mut driver = Driver::new(&memory, RING, QUEUE_SIZE);
    old.function.lock().unwrap().slot().pause();
    driver.offer(&[readable(0x4000, 4), writable(0x5000, 4)]);
    let json = serde_json::to_string(&old.function.lock().unwrap().save()).unwrap();

    let new = Guest::restored(old.memory.clone(), |function| {
        function.load(serde_json::from_str(&json).unwrap()).unwrap();
        assert_eq!(serde_json::to_string(&function.save()).unwrap(), json);
    });
    new.function.lock().unwrap().slot().resume();
    assert_eq!(
        (driver.used(), new.sent(1), new.status()),
        (Some((0, 4)), 1, READY)
    );
    assert_eq!(new.router.0.lock().unwrap().len(), 3);
}

#[test]
fn refuses_a_state_with_a_vector_that_it_does_not_have() {
    let guest = Guest::new();
    let json = serde_json::to_value(guest.function.lock().unwrap().save()).unwrap();
    let mut bad = json.clone();
    bad["interrupts"]["queue_vectors"][0] = json!(3);
    let (.., mut function) = parts(&guest.memory);
    let refused = function.load(serde_json::from_value(bad).unwrap());
    assert!(matches!(refused, Err(StateError::Inconsistent { .. })));
}
