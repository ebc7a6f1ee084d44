use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Event, Ged, Metrics, SLEEP_CONTROL, SLEEP_STATUS};
use crate::bus::BusDevice;
use crate::interrupt_line::LevelLine;

const SLEEP_ENABLE_S5: u8 = 0x34;

#[derive(Default)]
struct Wire(AtomicBool);

impl LevelLine for Arc<Wire> {
    fn set(&self, asserted: bool) {
        self.0.store(asserted, Ordering::SeqCst);
    }
}

struct Machine {
    ged: Ged,
    wire: Arc<Wire>,
    poweroff: EventFd,
}

impl Machine {
    fn new() -> Self {
        let wire = Arc::<Wire>::default();
        let poweroff = EventFd::new(EFD_NONBLOCK).unwrap();
        let ged = Ged::new(Box::new(Arc::clone(&wire)), poweroff.try_clone().unwrap());
        Self { ged, wire, poweroff }
    }

    fn interrupts(&self) -> bool {
        self.wire.0.load(Ordering::SeqCst)
    }

    fn pending(&mut self) -> u32 {
        let mut data = [0; 4];
        self.ged.read(0, &mut data);
        u32::from_le_bytes(data)
    }

    fn read(&mut self, port: u64) -> u8 {
        let mut data = [0];
        self.ged.read(port, &mut data);
        data[0]
    }
}

#[test]
fn events_are_pending_and_interrupt_until_they_are_read() {
    let mut machine = Machine::new();
    assert!(!machine.interrupts());
    machine.ged.raise(Event::PowerButton);
    machine.ged.raise(Event::PciHotplug);
    assert!(machine.interrupts());
    assert_eq!(machine.pending(), 3);
    assert!(!machine.interrupts());
    assert_eq!(machine.pending(), 0);
}

#[test]
fn reading_another_byte_lane_leaves_the_event_pending() {
    let mut machine = Machine::new();
    machine.ged.raise(Event::PowerButton);
    assert_eq!((machine.read(1), machine.interrupts()), (0, true));
    assert_eq!((machine.read(0), machine.interrupts()), (1, false));
}

#[test]
fn sleep_enable_with_type_5_powers_off() {
    let mut machine = Machine::new();
    machine.ged.write(SLEEP_CONTROL, &[SLEEP_ENABLE_S5]);
    assert_eq!(machine.poweroff.read().unwrap(), 1);
    assert_eq!(machine.ged.metrics().poweroff_count, 1);
    assert_eq!(machine.read(SLEEP_CONTROL), 0x14);
}

#[test]
fn a_sleep_type_without_enable_does_nothing() {
    let mut machine = Machine::new();
    machine.ged.write(SLEEP_CONTROL, &[0x14]);
    assert!(machine.poweroff.read().is_err());
    assert_eq!(machine.ged.metrics(), Metrics::default());
}

#[test]
fn other_sleep_states_are_ignored_and_counted() {
    let mut machine = Machine::new();
    machine.ged.write(SLEEP_CONTROL, &[0x20 | (3 << 2)]);
    assert!(machine.poweroff.read().is_err());
    assert_eq!(machine.ged.metrics().ignored_count, 1);
}

#[test]
fn linux_clears_the_wake_status_before_it_sleeps() {
    let mut machine = Machine::new();
    let mut saved = serde_json::to_value(machine.ged.save()).unwrap();
    saved["sleep_status"] = json!(0x80);
    machine.ged.load(serde_json::from_value(saved).unwrap()).unwrap();
    machine.ged.write(SLEEP_STATUS, &[0x00]);
    assert_eq!(machine.read(SLEEP_STATUS), 0x80);
    machine.ged.write(SLEEP_STATUS, &[0x80]);
    assert_eq!(machine.read(SLEEP_STATUS), 0x00);
}

#[test]
fn writes_to_pending_events_are_ignored_and_counted() {
    let mut machine = Machine::new();
    machine.ged.raise(Event::PowerButton);
    machine.ged.write(0, &[0xff; 4]);
    assert_eq!(machine.pending(), 1);
    assert_eq!(machine.ged.metrics().ignored_count, 4);
}

#[test]
fn a_saved_event_is_raised_again_after_restore() {
    let mut machine = Machine::new();
    machine.ged.raise(Event::PowerButton);
    let saved = serde_json::to_string(&machine.ged.save()).unwrap();

    let mut restored = Machine::new();
    restored.ged.load(serde_json::from_str(&saved).unwrap()).unwrap();
    assert!(restored.interrupts());
    assert_eq!(restored.pending(), 1);
}

fn refused_field(field: &str, value: u32) -> &'static str {
    let mut machine = Machine::new();
    let mut saved = serde_json::to_value(machine.ged.save()).unwrap();
    saved[field] = json!(value);
    machine
        .ged
        .load(serde_json::from_value(saved).unwrap())
        .unwrap_err()
        .field
}

#[test]
fn impossible_states_are_refused() {
    assert_eq!(refused_field("pending", 0x8000_0000), "pending");
    assert_eq!(refused_field("sleep_control", 0x20), "sleep_control");
    assert_eq!(refused_field("sleep_status", 1), "sleep_status");
}
