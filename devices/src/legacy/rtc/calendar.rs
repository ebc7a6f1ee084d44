//! Seconds since 1970 to the fields of the clock's registers and back (UTC, Gregorian, no leap seconds).

use serde::{Deserialize, Serialize};

const DAY_SECONDS: i64 = 86_400;
/// Days in 400 years, after which the calendar repeats.
const DAYS_IN_400_YEARS: i64 = 146_097;
/// Days from 0000-03-01 to 1970-01-01. Years counted from March have their leap day last.
const MARCH_0_TO_1970: i64 = 719_468;
/// 0000-01-01 and 9999-12-31 23:59:59: what century and year can say.
const FIRST_SECOND: i64 = -62_167_219_200;
const LAST_SECOND: i64 = 253_402_300_799;

/// The time as the registers hold it. A guest may write any number into any field.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub(super) struct DateTime {
    pub(super) second: u8,
    pub(super) minute: u8,
    pub(super) hour: u8,
    /// From 1.
    pub(super) day: u8,
    /// From 1.
    pub(super) month: u8,
    /// Of the century.
    pub(super) year: u8,
    /// The first two digits of the year.
    pub(super) century: u8,
}

impl DateTime {
    /// The fields of a time in seconds since 1970, or the nearest that the fields can say.
    pub(super) fn from_unix(seconds: i64) -> Self {
        let seconds = seconds.clamp(FIRST_SECOND, LAST_SECOND);
        let in_day = seconds.rem_euclid(DAY_SECONDS);
        let (year, month, day) = date(seconds.div_euclid(DAY_SECONDS));
        Self {
            second: small(in_day % 60),
            minute: small(in_day / 60 % 60),
            hour: small(in_day / 3_600),
            day: small(day),
            month: small(month),
            year: small(year % 100),
            century: small(year / 100),
        }
    }

    /// Seconds since 1970. A field beyond its range counts on into the next larger one.
    pub(super) fn to_unix(self) -> i64 {
        let in_day = i64::from(self.hour) * 3_600 + i64::from(self.minute) * 60 + i64::from(self.second);
        self.days() * DAY_SECONDS + in_day
    }

    /// The day of the week; 1 is Sunday.
    pub(super) fn weekday(self) -> u8 {
        // 1970-01-01 was a Thursday.
        small((self.days() + 4).rem_euclid(7) + 1)
    }

    /// Days since 1970.
    fn days(self) -> i64 {
        let months = i64::from(self.month) - 1;
        let year = i64::from(self.century) * 100 + i64::from(self.year) + months.div_euclid(12);
        let month = months.rem_euclid(12) + 1;
        let march_year = if month > 2 { year } else { year - 1 };
        let leap_days = march_year.div_euclid(4) - march_year.div_euclid(100) + march_year.div_euclid(400);
        let day_of_year = days_before((month + 9) % 12) + i64::from(self.day) - 1;
        march_year * 365 + leap_days + day_of_year - MARCH_0_TO_1970
    }
}

/// Year, month and day of the month for days since 1970.
fn date(days: i64) -> (i64, i64, i64) {
    let days = days + MARCH_0_TO_1970;
    let cycle = days.div_euclid(DAYS_IN_400_YEARS);
    let in_cycle = days.rem_euclid(DAYS_IN_400_YEARS);
    // Takes the leap days (one in 1,461 days, none in 36,524 but in 146,097) out of the count.
    let year = (in_cycle - in_cycle / 1_460 + in_cycle / 36_524 - in_cycle / 146_096) / 365;
    let day_of_year = in_cycle - (year * 365 + year / 4 - year / 100);
    let march_month = (day_of_year * 5 + 2) / 153;
    let day = day_of_year - days_before(march_month) + 1;
    let january = march_month >= 10;
    let month = if january { march_month - 9 } else { march_month + 3 };
    (cycle * 400 + year + i64::from(january), month, day)
}

/// Days of a year from March that lie before its `month` (0 is March): the months go 31, 30, 31, 30, 31.
fn days_before(month: i64) -> i64 {
    (month * 153 + 2) / 5
}

/// A number that its computation keeps below 100.
fn small(number: i64) -> u8 {
    u8::try_from(number).expect("a calendar field is between 0 and 99")
}
