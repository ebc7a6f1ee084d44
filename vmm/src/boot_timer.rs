//! The boot timer: a register that a guest's init writes to say that it is up (`--boot-timer`).

use std::sync::{Arc, Mutex};

use devices::bus::{Bus, BusDevice, BusError};

use crate::clock::now_us;
use crate::events::{Event, EventBus};
use crate::x86_64::layout;

/// The value that a guest writes.
const UP: u8 = 123;

struct BootTimer {
    start_us: u64,
    events: EventBus,
}

impl BusDevice for BootTimer {
    fn read(&mut self, _: u64, _: &mut [u8]) {}

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == 0 && data == [UP] {
            let boot_us = now_us().saturating_sub(self.start_us);
            log::info!("Guest-boot-time = {boot_us} us {} ms", boot_us / 1000);
            self.events.publish(&Event::BootTimer { boot_us });
        }
    }
}

/// Puts the timer, which counts from `start_us` of the monotonic clock, on the bus.
pub(crate) fn insert(mmio: &Bus, start_us: u64, events: &EventBus) -> Result<(), BusError> {
    let events = events.clone();
    let timer = BootTimer { start_us, events };
    mmio.insert(layout::BOOT_TIMER, 8, Arc::new(Mutex::new(timer)))
}
