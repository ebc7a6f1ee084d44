use super::*;
use crate::virtio::{Irq, Vector};

/// Interrupts as the device's lane would.
fn raise(guest: &Guest, vector: Vector) {
    let irq = Arc::clone(&guest.function.lock().unwrap().irq);
    irq.raise(vector);
}

fn interrupt_status(guest: &Guest) -> bool {
    guest.config::<2>(6)[0] & 8 != 0
}

#[test]
fn uses_the_pin_without_msix_until_the_status_is_read() {
    let guest = Guest::new();
    raise(&guest, Vector::Queue(0));
    raise(&guest, Vector::Config);
    assert!(guest.pin() && interrupt_status(&guest));
    assert_eq!(guest.get(ISR_OFFSET), [3]);
    assert!(!guest.pin() && !interrupt_status(&guest));
    assert_eq!(guest.get(ISR_OFFSET), [0]);
}

#[test]
fn keeps_the_pin_released_while_intx_is_disabled() {
    let guest = Guest::new();
    guest.write_config(4, &[6, 4]);
    raise(&guest, Vector::Queue(1));
    assert!(!guest.pin() && interrupt_status(&guest));
    guest.write_config(4, &[6, 0]);
    assert!(guest.pin());
}

#[test]
fn releases_the_pin_with_a_reset() {
    let guest = Guest::new();
    raise(&guest, Vector::Queue(0));
    guest.set(20, &[0]);
    assert!(!guest.pin());
}

#[test]
fn moves_between_pin_and_messages_at_run_time() {
    let guest = Guest::new();
    raise(&guest, Vector::Queue(0));
    guest.enable_msix();
    assert!(!guest.pin());
    raise(&guest, Vector::Queue(0));
    assert_eq!(guest.sent(1), 1);
    guest.write_config(guest.capability(0x11, None) + 2, &[0, 0]);
    assert!(guest.pin());
    guest.get::<1>(ISR_OFFSET);
    raise(&guest, Vector::Queue(0));
    assert!(guest.pin());
    assert_eq!(guest.sent(1), 0);
}

#[test]
fn moves_a_message_that_was_held_back_to_the_pin() {
    let guest = Guest::new();
    guest.enable_msix();
    guest.set(TABLE_OFFSET + 16 + 12, &[1, 0, 0, 0]);
    raise(&guest, Vector::Queue(0));
    assert_eq!((guest.get(PBA_OFFSET), guest.pin()), ([0b10], false));
    guest.write_config(guest.capability(0x11, None) + 2, &[0, 0]);
    assert_eq!((guest.get(PBA_OFFSET), guest.pin()), ([0], true));
}

#[test]
fn sends_a_held_back_message_when_its_vector_is_unmasked() {
    let guest = Guest::new();
    guest.enable_msix();
    guest.set(TABLE_OFFSET + 16 + 12, &[1, 0, 0, 0]);
    raise(&guest, Vector::Queue(0));
    assert_eq!(guest.sent(1), 0);
    guest.set(TABLE_OFFSET + 16 + 12, &[0; 4]);
    assert_eq!(guest.sent(1), 1);
}

#[test]
fn answers_no_vector_to_one_that_it_does_not_have() {
    let guest = Guest::new();
    guest.enable_msix();
    guest.set(16, &[3, 0]);
    guest.set(26, &[200, 0]);
    assert_eq!((guest.get(16), guest.get(26)), ([0xff; 2], [0xff; 2]));
    raise(&guest, Vector::Queue(0));
    raise(&guest, Vector::Queue(7));
    assert_eq!((guest.sent(0), guest.sent(1), guest.pin()), (0, 0, false));
}

#[test]
fn routes_every_vector_once() {
    let guest = Guest::new();
    guest.enable_msix();
    guest.enable_msix();
    let routes = guest.router.0.lock().unwrap();
    assert_eq!(
        routes.iter().map(|(vector, _)| *vector).collect::<Vec<_>>(),
        [0, 1, 2]
    );
    assert_eq!(
        routes[2].1,
        MsiMessage {
            address: 0xfee0_0000,
            data: 0x42
        }
    );
}

#[test]
fn counts_interrupts_sent_or_held_back_and_new_routes() {
    let guest = Guest::new();
    guest.enable_msix();
    guest.enable_msix();
    raise(&guest, Vector::Queue(0));
    guest.set(TABLE_OFFSET + 16 + 12, &[1, 0, 0, 0]);
    raise(&guest, Vector::Queue(0));
    let counted = InterruptMetrics {
        triggers: 2,
        config_updates: 3,
    };
    assert_eq!(guest.function.lock().unwrap().interrupts(), counted);
}
