//! The MC146818 real-time clock with its CMOS RAM, at ports 0x70 and 0x71.
//!
//! It gives the guest its first wall-clock time: the host's, in UTC, plus an offset once the guest has
//! set the clock. There are no alarm, periodic or update interrupts: their flags (register C) stay
//! clear, so the ACPI tables must give the clock no interrupt. The day of the week follows from the date.
//! Called on vCPU threads; the control thread saves and loads it.
//!
//! "Update in progress" is set for the last 244 µs of every second, as the chip does, so a guest that
//! sees it clear has that long to read all registers of one and the same second.

mod calendar;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use self::calendar::DateTime;
use super::{InvalidState, read_bytes, write_bytes};
use crate::bus::BusDevice;

/// Size of the register window, in ports.
pub const PORTS: u64 = 2;

/// Port 0x70 selects a register (bit 7 would mask NMIs, which there are none of).
const INDEX: u64 = 0;
/// Port 0x71 accesses it.
const VALUE: u64 = 1;

/// Registers and RAM together.
const CMOS_BYTES: usize = 128;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const DAY_OF_WEEK: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
/// Where the FADT says the century is.
pub const CENTURY: u8 = 0x32;

const A_UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// Both upper bits of the divider select hold the divider in reset.
const A_DIVIDER_RESET: u8 = 0b0110_0000;
/// A 32,768 Hz time base and a 1,024 Hz periodic rate, as firmware leaves it.
const A_DEFAULT: u8 = 0x26;
const B_SET: u8 = 1 << 7;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;
const D_VALID_RAM_AND_TIME: u8 = 1 << 7;
const HOURS_PM: u8 = 1 << 7;

const MICROS: i64 = 1_000_000;
const UPDATE_MICROS: i64 = 244;
/// The first update comes half a second after the divider leaves reset.
const AFTER_DIVIDER_RESET_MICROS: i64 = MICROS / 2;
/// More than what lies between any two times that the registers can hold.
const MAX_OFFSET_MICROS: i64 = 10_000 * 366 * 86_400 * MICROS;

/// Tells the time since 1970-01-01 00:00:00 UTC.
pub type Clock = Box<dyn Fn() -> Duration + Send>;

/// What a snapshot keeps. The time goes on while there is no machine.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct State {
    index: u8,
    cmos: Vec<u8>,
    /// The guest's time less the host's.
    offset_micros: i64,
    /// The time registers while the guest has stopped the clock to set it.
    stopped_at: Option<DateTime>,
}

/// The clock.
pub struct Rtc {
    state: State,
    clock: Clock,
}

impl Default for Rtc {
    fn default() -> Self {
        Self::new()
    }
}

impl Rtc {
    /// Makes a clock that follows the host's `CLOCK_REALTIME`.
    pub fn new() -> Self {
        Self::with_clock(Box::new(|| {
            SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
        }))
    }

    /// Makes a clock that follows `clock`.
    pub fn with_clock(clock: Clock) -> Self {
        let mut cmos = vec![0; CMOS_BYTES];
        cmos[usize::from(STATUS_A)] = A_DEFAULT;
        cmos[usize::from(STATUS_B)] = B_24_HOURS;
        Self {
            state: State {
                index: 0,
                cmos,
                offset_micros: 0,
                stopped_at: None,
            },
            clock,
        }
    }

    /// The state for a snapshot.
    pub fn save(&self) -> State {
        self.state.clone()
    }

    /// Takes over a saved state.
    ///
    /// # Errors
    /// Fails, and changes nothing, when `state` is not one that the clock can be in.
    pub fn load(&mut self, state: State) -> Result<(), InvalidState> {
        let check = |valid, field, value| InvalidState::unless(valid, "CMOS clock", field, value);
        check(
            usize::from(state.index) < CMOS_BYTES,
            "index",
            i64::from(state.index),
        )?;
        let length = state.cmos.len();
        check(
            length == CMOS_BYTES,
            "length of cmos",
            i64::try_from(length).unwrap_or(i64::MAX),
        )?;
        let offset = state.offset_micros;
        check(
            (-MAX_OFFSET_MICROS..=MAX_OFFSET_MICROS).contains(&offset),
            "offset_micros",
            offset,
        )?;
        let stopped = is_stopped(&state.cmos);
        check(
            stopped == state.stopped_at.is_some(),
            "stopped_at: set or not",
            i64::from(!stopped),
        )?;
        self.state = state;
        Ok(())
    }

    fn cmos(&self, register: u8) -> u8 {
        self.state.cmos[usize::from(register)]
    }

    fn host_micros(&self) -> i64 {
        i64::try_from((self.clock)().as_micros()).unwrap_or(i64::MAX)
    }

    /// The guest's time in microseconds since 1970.
    fn now_micros(&self) -> i64 {
        self.host_micros().saturating_add(self.state.offset_micros)
    }

    fn now(&self) -> DateTime {
        match self.state.stopped_at {
            Some(time) => time,
            None => DateTime::from_unix(self.now_micros().div_euclid(MICROS)),
        }
    }

    /// Makes the clock go on from `time`, `micros` into its second.
    fn set_time(&mut self, time: DateTime, micros: i64) {
        let target = time.to_unix() * MICROS + micros;
        let offset = target.saturating_sub(self.host_micros());
        self.state.offset_micros = offset.clamp(-MAX_OFFSET_MICROS, MAX_OFFSET_MICROS);
    }

    fn read_register(&self) -> u8 {
        let register = self.state.index;
        match register {
            SECONDS | MINUTES | DAY_OF_WEEK | DAY | MONTH | YEAR | CENTURY => {
                self.encode(time_field(&self.now(), register))
            }
            HOURS => self.encode_hour(self.now().hour),
            STATUS_A => self.cmos(STATUS_A) | self.update_in_progress(),
            STATUS_C => 0,
            STATUS_D => D_VALID_RAM_AND_TIME,
            _ => self.cmos(register),
        }
    }

    fn write_register(&mut self, value: u8) {
        let register = self.state.index;
        match register {
            SECONDS | MINUTES | HOURS | DAY | MONTH | YEAR | CENTURY => self.write_time(register, value),
            STATUS_A => self.write_control(STATUS_A, value & !A_UPDATE_IN_PROGRESS),
            STATUS_B => self.write_control(STATUS_B, value),
            DAY_OF_WEEK | STATUS_C | STATUS_D => {}
            _ => self.state.cmos[usize::from(register)] = value,
        }
    }

    fn write_time(&mut self, register: u8, value: u8) {
        let mut time = self.now();
        match register {
            SECONDS => time.second = self.decode(value),
            MINUTES => time.minute = self.decode(value),
            HOURS => time.hour = self.decode_hour(value),
            DAY => time.day = self.decode(value),
            MONTH => time.month = self.decode(value),
            YEAR => time.year = self.decode(value),
            _ => time.century = self.decode(value),
        }
        if self.state.stopped_at.is_some() {
            self.state.stopped_at = Some(time);
        } else {
            self.set_time(time, self.now_micros().rem_euclid(MICROS));
        }
    }

    /// Writes status A or B, which stop and start the clock.
    fn write_control(&mut self, register: u8, value: u8) {
        let time = self.now();
        self.state.cmos[usize::from(register)] = value;
        match (is_stopped(&self.state.cmos), self.state.stopped_at) {
            (true, None) => self.state.stopped_at = Some(time),
            (false, Some(time)) => {
                let divider_was_reset = register == STATUS_A;
                let running = self.now_micros().rem_euclid(MICROS);
                self.state.stopped_at = None;
                self.set_time(
                    time,
                    if divider_was_reset {
                        AFTER_DIVIDER_RESET_MICROS
                    } else {
                        running
                    },
                );
            }
            _ => {}
        }
    }

    fn update_in_progress(&self) -> u8 {
        let left = MICROS - self.now_micros().rem_euclid(MICROS);
        if self.state.stopped_at.is_none() && left <= UPDATE_MICROS {
            A_UPDATE_IN_PROGRESS
        } else {
            0
        }
    }

    /// A number as the data mode of register B wants it: binary or two decimal digits.
    fn encode(&self, number: u8) -> u8 {
        if self.cmos(STATUS_B) & B_BINARY != 0 {
            number
        } else {
            ((number / 10 % 10) << 4) | (number % 10)
        }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.cmos(STATUS_B) & B_BINARY != 0 {
            value
        } else {
            (value >> 4) * 10 + (value & 0x0f)
        }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.cmos(STATUS_B) & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let pm = if hour >= 12 { HOURS_PM } else { 0 };
        let on_dial = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.encode(on_dial) | pm
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.cmos(STATUS_B) & B_24_HOURS != 0 {
            return self.decode(value);
        }
        let afternoon = if value & HOURS_PM != 0 { 12 } else { 0 };
        self.decode(value & !HOURS_PM) % 12 + afternoon
    }
}

impl BusDevice for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |port| match port {
            VALUE => self.read_register(),
            // The index register is write-only.
            _ => 0xff,
        });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |port, value| match port {
            INDEX => self.state.index = value & 0x7f,
            VALUE => self.write_register(value),
            _ => {}
        });
    }
}

fn is_stopped(cmos: &[u8]) -> bool {
    let divider_reset = cmos[usize::from(STATUS_A)] & A_DIVIDER_RESET == A_DIVIDER_RESET;
    divider_reset || cmos[usize::from(STATUS_B)] & B_SET != 0
}

fn time_field(time: &DateTime, register: u8) -> u8 {
    match register {
        SECONDS => time.second,
        MINUTES => time.minute,
        DAY_OF_WEEK => time.weekday(),
        DAY => time.day,
        MONTH => time.month,
        YEAR => time.year,
        _ => time.century,
    }
}

#[cfg(test)]
mod tests;
