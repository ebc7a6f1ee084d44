use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use super::{
    A_DIVIDER_RESET, A_UPDATE_IN_PROGRESS, B_24_HOURS, B_BINARY, B_SET, CENTURY, DAY, DAY_OF_WEEK, HOURS,
    MINUTES, MONTH, Rtc, SECONDS, STATUS_A, STATUS_B, STATUS_C, STATUS_D, State, YEAR,
};
use crate::bus::BusDevice;

/// 2024-02-29 23:59:58 UTC, a Thursday.
const LEAP_EVENING: u64 = 1_709_251_198;

struct Cmos {
    rtc: Rtc,
    host_micros: Arc<AtomicU64>,
}

impl Cmos {
    fn at(seconds: u64) -> Self {
        let host_micros = Arc::new(AtomicU64::new(seconds * 1_000_000));
        let clock = host_micros.clone();
        let rtc = Rtc::with_clock(Box::new(move || {
            Duration::from_micros(clock.load(Ordering::Relaxed))
        }));
        Self { rtc, host_micros }
    }

    fn wait_micros(&self, micros: u64) {
        self.host_micros.fetch_add(micros, Ordering::Relaxed);
    }

    fn read(&mut self, register: u8) -> u8 {
        let mut data = [0];
        self.rtc.write(0, &[register]);
        self.rtc.read(1, &mut data);
        data[0]
    }

    fn write(&mut self, register: u8, value: u8) {
        self.rtc.write(0, &[register]);
        self.rtc.write(1, &[value]);
    }

    /// Century, year, month, day, hours, minutes, seconds as the registers show them.
    fn time(&mut self) -> [u8; 7] {
        [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS].map(|register| self.read(register))
    }

    /// The order of accesses in which Linux sets the clock.
    fn linux_sets(&mut self, time: [u8; 7]) {
        let control = self.read(STATUS_B);
        self.write(STATUS_B, control | B_SET);
        let frequency = self.read(STATUS_A);
        self.write(STATUS_A, frequency | 0x70);
        let [century, year, month, day, hours, minutes, seconds] = time;
        self.write(YEAR, year);
        self.write(MONTH, month);
        self.write(DAY, day);
        self.write(HOURS, hours);
        self.write(MINUTES, minutes);
        self.write(SECONDS, seconds);
        self.write(CENTURY, century);
        self.write(STATUS_B, control);
        self.write(STATUS_A, frequency);
    }
}

#[test]
fn shows_the_hosts_time_in_bcd_and_24_hours() {
    let mut cmos = Cmos::at(LEAP_EVENING);
    assert_eq!(cmos.time(), [0x20, 0x24, 0x02, 0x29, 0x23, 0x59, 0x58]);
    assert_eq!(cmos.read(DAY_OF_WEEK), 5);
    assert_eq!(cmos.read(STATUS_B), B_24_HOURS);
}

#[test]
fn rolls_over_a_leap_day() {
    let mut cmos = Cmos::at(LEAP_EVENING);
    cmos.wait_micros(2_000_000);
    assert_eq!(cmos.time(), [0x20, 0x24, 0x03, 0x01, 0, 0, 0]);
    assert_eq!(cmos.read(DAY_OF_WEEK), 6);
}

#[test]
fn shows_the_end_of_the_century() {
    let mut cmos = Cmos::at(4_102_444_799);
    assert_eq!(cmos.time(), [0x20, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59]);
    cmos.wait_micros(1_000_000);
    assert_eq!(cmos.time(), [0x21, 0x00, 0x01, 0x01, 0, 0, 0]);
}

#[test]
fn a_host_clock_beyond_the_year_9999_shows_the_last_second() {
    let mut cmos = Cmos::at(400_000_000_000);
    assert_eq!(cmos.time(), [0x99, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59]);
}

#[test]
fn binary_mode_shows_plain_numbers() {
    let mut cmos = Cmos::at(LEAP_EVENING);
    cmos.write(STATUS_B, B_24_HOURS | B_BINARY);
    assert_eq!(cmos.time(), [20, 24, 2, 29, 23, 59, 58]);
}

#[test]
fn twelve_hour_mode_marks_the_afternoon() {
    let mut cmos = Cmos::at(LEAP_EVENING);
    cmos.write(STATUS_B, 0);
    assert_eq!(cmos.read(HOURS), 0x91);
    cmos.wait_micros(2_000_000);
    assert_eq!(cmos.read(HOURS), 0x12);
    cmos.write(HOURS, 0x92);
    cmos.write(STATUS_B, B_24_HOURS);
    assert_eq!(cmos.read(HOURS), 0x12);
}

#[test]
fn linux_sees_a_working_clock() {
    let mut cmos = Cmos::at(LEAP_EVENING);
    assert_eq!(cmos.read(STATUS_A) & A_UPDATE_IN_PROGRESS, 0);
    assert_eq!(cmos.read(STATUS_D), 0x80);
    assert_eq!(cmos.read(STATUS_C), 0);
    cmos.write(STATUS_A, 0x26);
    cmos.write(STATUS_B, B_24_HOURS | 0x70);
    assert_eq!(cmos.read(STATUS_C), 0);
    assert_eq!(cmos.read(STATUS_B), B_24_HOURS | 0x70);
}

#[test]
fn update_in_progress_covers_the_end_of_each_second_only() {
    let mut cmos = Cmos::at(LEAP_EVENING);
    cmos.wait_micros(1_000_000 - 245);
    assert_eq!(cmos.read(STATUS_A), 0x26);
    cmos.wait_micros(1);
    assert_eq!(cmos.read(STATUS_A), 0xa6);
    cmos.wait_micros(243);
    assert_eq!(cmos.read(STATUS_A), 0xa6);
    cmos.wait_micros(1);
    assert_eq!(cmos.read(STATUS_A), 0x26);
}

#[test]
fn linux_sets_the_clock_and_it_goes_on_half_a_second_in() {
    let mut cmos = Cmos::at(LEAP_EVENING);
    cmos.wait_micros(123_456);
    cmos.linux_sets([0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59]);
    cmos.wait_micros(499_999);
    assert_eq!(cmos.time(), [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59]);
    cmos.wait_micros(1);
    assert_eq!(cmos.time(), [0x20, 0x00, 0x01, 0x01, 0, 0, 0]);
}

#[test]
fn the_clock_stands_still_while_it_is_set() {
    let mut cmos = Cmos::at(LEAP_EVENING);
    cmos.write(STATUS_B, B_24_HOURS | B_SET);
    cmos.wait_micros(5_999_999);
    assert_eq!(cmos.read(SECONDS), 0x58);
    assert_eq!(cmos.read(STATUS_A) & A_UPDATE_IN_PROGRESS, 0);
    cmos.write(STATUS_B, B_24_HOURS);
    assert_eq!(cmos.read(SECONDS), 0x58);
    cmos.wait_micros(1);
    assert_eq!(cmos.read(SECONDS), 0x59);
}

#[test]
fn holding_the_divider_in_reset_stops_the_clock() {
    let mut cmos = Cmos::at(LEAP_EVENING);
    cmos.write(STATUS_A, A_DIVIDER_RESET);
    cmos.wait_micros(10_000_000);
    assert_eq!(cmos.read(SECONDS), 0x58);
}

#[test]
fn a_field_can_be_set_on_the_running_clock() {
    let mut cmos = Cmos::at(LEAP_EVENING);
    cmos.write(MINUTES, 0x10);
    assert_eq!(cmos.time(), [0x20, 0x24, 0x02, 0x29, 0x23, 0x10, 0x58]);
}

#[test]
fn nonsense_in_every_time_register_is_survived() {
    let mut cmos = Cmos::at(LEAP_EVENING);
    cmos.linux_sets([0xff; 7]);
    assert_eq!(cmos.time(), [0x99, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59]);
    cmos.write(STATUS_B, B_BINARY);
    cmos.linux_sets([0xff; 7]);
    cmos.linux_sets([0; 7]);
    assert_eq!(cmos.read(YEAR), 0);
}

#[test]
fn ram_keeps_what_the_guest_writes() {
    let mut cmos = Cmos::at(0);
    assert_eq!(cmos.read(0x0f), 0);
    cmos.write(0x0f, 0x0a);
    cmos.write(0x7f, 0x55);
    assert_eq!((cmos.read(0x0f), cmos.read(0x7f)), (0x0a, 0x55));
}

#[test]
fn read_only_status_ignores_writes() {
    let mut cmos = Cmos::at(0);
    cmos.write(STATUS_C, 0xff);
    cmos.write(STATUS_D, 0x00);
    assert_eq!((cmos.read(STATUS_C), cmos.read(STATUS_D)), (0x00, 0x80));
}

#[test]
fn the_nmi_mask_is_no_part_of_the_index() {
    let mut cmos = Cmos::at(LEAP_EVENING);
    assert_eq!(cmos.read(0x80 | YEAR), 0x24);
}

#[test]
fn a_word_write_sets_index_and_value() {
    let mut cmos = Cmos::at(0);
    cmos.rtc.write(0, &[0x40, 0x99]);
    assert_eq!(cmos.read(0x40), 0x99);
    let mut data = [0; 2];
    cmos.rtc.read(0, &mut data);
    assert_eq!(data, [0xff, 0x99]);
}

#[test]
fn every_day_of_four_centuries_survives_the_round_trip() {
    use super::calendar::DateTime;
    let first = -11_676_096_000; // 1600-01-01
    let days = (0..146_097).map(|day| first + day * 86_400);
    let changed = days
        .filter(|seconds| DateTime::from_unix(*seconds).to_unix() != *seconds)
        .count();
    assert_eq!(changed, 0);
}

#[test]
fn a_saved_clock_keeps_the_guests_offset_and_catches_up_with_the_host() {
    let mut cmos = Cmos::at(LEAP_EVENING);
    cmos.write(HOURS, 0x22);
    cmos.write(0x40, 0x77);
    let saved = serde_json::to_string(&cmos.rtc.save()).unwrap();

    let mut restored = Cmos::at(LEAP_EVENING + 60);
    restored.rtc.load(serde_json::from_str(&saved).unwrap()).unwrap();
    assert_eq!(restored.time(), [0x20, 0x24, 0x02, 0x29, 0x23, 0x00, 0x58]);
    assert_eq!(restored.read(0x40), 0x77);
}

#[test]
fn a_clock_saved_while_being_set_is_still_stopped() {
    let mut cmos = Cmos::at(LEAP_EVENING);
    cmos.write(STATUS_B, B_24_HOURS | B_SET);
    let mut restored = Cmos::at(LEAP_EVENING + 60);
    restored.rtc.load(cmos.rtc.save()).unwrap();
    assert_eq!(restored.read(SECONDS), 0x58);
    restored.write(STATUS_B, B_24_HOURS);
    assert_eq!(restored.time(), [0x20, 0x24, 0x02, 0x29, 0x23, 0x59, 0x58]);
}

fn refused_field(field: &str, value: Value) -> &'static str {
    let mut saved = serde_json::to_value(Rtc::new().save()).unwrap();
    saved[field] = value;
    let state: State = serde_json::from_value(saved).unwrap();
    Rtc::new().load(state).unwrap_err().field
}

#[test]
fn impossible_states_are_refused() {
    assert_eq!(refused_field("index", json!(128)), "index");
    assert_eq!(refused_field("cmos", json!([1, 2])), "length of cmos");
    assert_eq!(refused_field("offset_micros", json!(i64::MIN)), "offset_micros");
    let stopped = serde_json::to_value(super::DateTime::from_unix(0)).unwrap();
    assert_eq!(refused_field("stopped_at", stopped), "stopped_at: set or not");
}
