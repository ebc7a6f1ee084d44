//! The boot timer: a register that a guest's init writes to say that it is up (`--boot-timer`).

use std::sync::{Arc, Mutex};

use devices::bus::{Bus, BusDevice, BusError};

use crate::clock::now_us;
use crate::x86_64::layout;

/// The value that a guest writes.
const UP: u8 = 123;

struct BootTimer {
    start_us: u64,
}

impl BusDevice for BootTimer {
    fn read(&mut self, _: u64, _: &mut [u8]) {}

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == 0 && data == [UP] {
            let micros = now_us().saturating_sub(self.start_us);
            log::info!("Guest-boot-time = {micros} us {} ms", micros / 1000);
        }
    }
}

/// Puts the timer, which counts from `start_us` of the monotonic clock, on the bus.
pub(crate) fn insert(mmio: &Bus, start_us: u64) -> Result<(), BusError> {
    mmio.insert(
        layout::BOOT_TIMER,
        8,
        Arc::new(Mutex::new(BootTimer { start_us })),
    )
}
