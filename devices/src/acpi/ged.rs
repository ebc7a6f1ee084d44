//! The Generic Event Device and the sleep registers of a hardware-reduced ACPI machine, at I/O port 0x600.
//!
//! | port | register | access |
//! |---|---|---|
//! | 0..4 | pending events, one bit per [`Event`] | reading clears what was read |
//! | 4 | sleep control (ACPI 6.5 §4.8.3.7) | write `SLP_EN` with the type of S5 to power off |
//! | 5 | sleep status (ACPI 6.5 §4.8.3.7) | `WAK_STS`, write 1 to clear |
//!
//! The control thread raises events; the interrupt makes the guest's `_EVT` method read the pending
//! events and notify the objects concerned. Its line is asserted while events are pending, so that a guest which was
//! not listening when one came learns of it when it does. The bus calls the registers on vCPU threads.

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::interrupt_line::LevelLine;
use crate::legacy::{InvalidState, read_bytes, write_bytes};

/// Size of the register window, in ports.
pub const PORTS: u64 = 6;
/// Port of the sleep control register, for the FADT.
pub const SLEEP_CONTROL: u64 = 4;
/// Port of the sleep status register, for the FADT.
pub const SLEEP_STATUS: u64 = 5;
/// The sleep type that powers off, for the DSDT's `\_S5` object.
pub const SLEEP_TYPE_S5: u8 = 5;

/// The four byte lanes of the pending events.
const LAST_PENDING: u64 = 3;

const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_BITS: u8 = 0b111 << SLEEP_TYPE_SHIFT;
const SLEEP_ENABLE: u8 = 1 << 5;
const WAKE_STATUS: u8 = 1 << 7;

/// What the guest can be told. The value is the bit in the pending events, as the DSDT's `_EVT` knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Event {
    /// The power button was pressed: shut down.
    PowerButton = 1 << 0,
    /// A PCI slot has news, see [`super::pci_hotplug`].
    PciHotplug = 1 << 1,
}

impl Event {
    const ALL: u32 = Self::PowerButton.bit() | Self::PciHotplug.bit();

    /// The event's bit among the pending events.
    pub const fn bit(self) -> u32 {
        self as u32
    }
}

/// Counters since the device was made.
#[derive(Serialize, Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Metrics {
    /// Events raised by the host.
    pub event_count: u64,
    /// Requests of the guest to power off.
    pub poweroff_count: u64,
    /// Requests for a sleep state that the machine does not have, and writes to read-only registers.
    pub ignored_count: u64,
    /// Failures to signal the power-off to the host.
    pub error_count: u64,
}

/// What a snapshot keeps.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct State {
    pending: u32,
    sleep_control: u8,
    sleep_status: u8,
}

/// The event device with the sleep registers.
pub struct Ged {
    state: State,
    metrics: Metrics,
    line: Box<dyn LevelLine>,
    poweroff: EventFd,
}

impl Ged {
    /// Makes a device with nothing pending. It drives `line`, and writes `poweroff` when the guest enters S5.
    pub fn new(line: Box<dyn LevelLine>, poweroff: EventFd) -> Self {
        let state = State {
            pending: 0,
            sleep_control: 0,
            sleep_status: 0,
        };
        Self {
            state,
            metrics: Metrics::default(),
            line,
            poweroff,
        }
    }

    /// Tells the guest of `event`.
    pub fn raise(&mut self, event: Event) {
        self.metrics.event_count += 1;
        self.state.pending |= event.bit();
        self.line.set(true);
    }

    /// The counters.
    pub fn metrics(&self) -> Metrics {
        self.metrics
    }

    /// The state for a snapshot.
    pub fn save(&self) -> State {
        self.state.clone()
    }

    /// Takes over a saved state, and asserts the line if events were pending.
    ///
    /// # Errors
    /// Fails, and changes nothing, when `state` is not one that the device can be in.
    pub fn load(&mut self, state: State) -> Result<(), InvalidState> {
        let check = |valid, field, value| InvalidState::unless(valid, "ACPI event device", field, value);
        check(state.pending & !Event::ALL == 0, "pending", state.pending)?;
        let control = state.sleep_control;
        check(control & !SLEEP_TYPE_BITS == 0, "sleep_control", control.into())?;
        let status = state.sleep_status;
        check(status & !WAKE_STATUS == 0, "sleep_status", status.into())?;
        self.state = state;
        self.line.set(self.state.pending != 0);
        Ok(())
    }

    /// Reads one byte lane of the pending events and clears it.
    fn take_pending(&mut self, lane: u64) -> u8 {
        let mut lanes = self.state.pending.to_le_bytes();
        let taken = usize::try_from(lane)
            .ok()
            .and_then(|lane| lanes.get_mut(lane))
            .map(std::mem::take);
        self.state.pending = u32::from_le_bytes(lanes);
        if self.state.pending == 0 {
            self.line.set(false);
        }
        taken.unwrap_or(0)
    }

    fn write_sleep_control(&mut self, value: u8) {
        // SLP_EN reads as zero.
        self.state.sleep_control = value & SLEEP_TYPE_BITS;
        if value & SLEEP_ENABLE == 0 {
            return;
        }
        if (value & SLEEP_TYPE_BITS) >> SLEEP_TYPE_SHIFT != SLEEP_TYPE_S5 {
            self.metrics.ignored_count += 1;
            return;
        }
        self.metrics.poweroff_count += 1;
        if let Err(error) = self.poweroff.write(1) {
            self.metrics.error_count += 1;
            log::error!("ACPI event device: failed to signal the guest's power-off: {error}");
        }
    }
}

impl BusDevice for Ged {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |port| match port {
            0..=LAST_PENDING => self.take_pending(port),
            SLEEP_CONTROL => self.state.sleep_control,
            SLEEP_STATUS => self.state.sleep_status,
            _ => 0xff,
        });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |port, value| match port {
            SLEEP_CONTROL => self.write_sleep_control(value),
            SLEEP_STATUS => self.state.sleep_status &= !(value & WAKE_STATUS),
            _ => self.metrics.ignored_count += 1,
        });
    }
}

#[cfg(test)]
mod tests;
