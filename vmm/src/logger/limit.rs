//! [`RateLimit`]: at most so many messages of one place in the code in a while.
//!
//! It is asked on vCPU and io threads, so it takes neither locks nor memory.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use log::Record;

/// Messages of one place in a period.
pub(super) const BURST: u32 = 10;
/// The period.
pub(super) const PERIOD: Duration = Duration::from_secs(5);
/// Places; there are about fifty in the program. Those beyond the last are not limited.
const PLACES: usize = 128;

/// One place in the code.
struct Place {
    /// Address of the file's name and line; zero when the entry is free.
    key: AtomicU64,
    /// When the period began, in microseconds.
    start: AtomicU64,
    /// Messages in the period.
    count: AtomicU32,
    suppressed: AtomicU64,
}

impl Place {
    const fn free() -> Self {
        Self {
            key: AtomicU64::new(0),
            start: AtomicU64::new(0),
            count: AtomicU32::new(0),
            suppressed: AtomicU64::new(0),
        }
    }
}

/// What is to become of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is logged, after a line that says how many before it were not.
    Pass { suppressed: u64 },
    /// It is not.
    Suppress,
}

/// The limits of all places.
pub(super) struct RateLimit {
    places: [Place; PLACES],
    suppressed: AtomicU64,
}

impl RateLimit {
    pub(super) const fn new() -> Self {
        Self {
            places: [const { Place::free() }; PLACES],
            suppressed: AtomicU64::new(0),
        }
    }

    /// All messages that were suppressed so far.
    pub(super) fn total(&self) -> u64 {
        self.suppressed.load(Ordering::Relaxed)
    }

    /// Judges a message that comes at the time `now`, in microseconds of a clock that does not go back.
    pub(super) fn judge(&self, record: &Record<'_>, now: u64) -> Verdict {
        let Some(place) = self.place(key(record)) else {
            return Verdict::Pass { suppressed: 0 };
        };
        let start = place.start.load(Ordering::Relaxed);
        let period = u64::try_from(PERIOD.as_micros()).expect("seconds");
        let over = place.count.load(Ordering::Relaxed) == 0 || now.saturating_sub(start) >= period;
        // One of several threads begins the next period; the others count into it.
        if over
            && place
                .start
                .compare_exchange(start, now, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        {
            place.count.store(1, Ordering::Relaxed);
            let suppressed = place.suppressed.swap(0, Ordering::Relaxed);
            return Verdict::Pass { suppressed };
        }
        if place.count.fetch_add(1, Ordering::Relaxed) < BURST {
            return Verdict::Pass { suppressed: 0 };
        }
        // The counter must not come round.
        place.count.store(BURST, Ordering::Relaxed);
        place.suppressed.fetch_add(1, Ordering::Relaxed);
        self.suppressed.fetch_add(1, Ordering::Relaxed);
        Verdict::Suppress
    }

    /// Messages that were suppressed and that no line has told of yet.
    pub(super) fn take_untold(&self) -> u64 {
        let untold = self
            .places
            .iter()
            .map(|place| place.suppressed.swap(0, Ordering::Relaxed));
        untold.sum()
    }

    fn place(&self, key: u64) -> Option<&Place> {
        // The lines of a file are neighbours in the table.
        let hash = usize::try_from(key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32).unwrap_or(0);
        (0..PLACES)
            .map(|step| &self.places[hash.wrapping_add(step) % PLACES])
            .find(|place| {
                let claimed = place
                    .key
                    .compare_exchange(0, key, Ordering::Relaxed, Ordering::Relaxed);
                claimed.is_ok() || claimed == Err(key)
            })
    }
}

/// Names a place: no two have the same, as an address has 47 bits and no file 65,536 lines.
fn key(record: &Record<'_>) -> u64 {
    let file = record.file().map_or(1, |file| file.as_ptr().addr() as u64);
    file << 16 | u64::from(record.line().unwrap_or(0) & 0xffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASS: Verdict = Verdict::Pass { suppressed: 0 };
    const SECOND: u64 = 1_000_000;

    fn judge(limit: &RateLimit, line: u32, now: u64) -> Verdict {
        limit.judge(
            &Record::builder().file(Some("a.rs")).line(Some(line)).build(),
            now,
        )
    }

    #[test]
    fn lets_ten_messages_pass_and_tells_how_many_did_not() {
        let limit = RateLimit::new();
        for _ in 0..BURST {
            assert_eq!(judge(&limit, 1, SECOND), PASS);
        }
        for _ in 0..7 {
            assert_eq!(judge(&limit, 1, 5 * SECOND), Verdict::Suppress);
        }
        assert_eq!(judge(&limit, 1, 6 * SECOND), Verdict::Pass { suppressed: 7 });
        assert_eq!(judge(&limit, 1, 6 * SECOND), PASS);
        assert_eq!((limit.total(), limit.take_untold()), (7, 0));
    }

    #[test]
    fn each_place_has_its_own_limit() {
        let limit = RateLimit::new();
        for _ in 0..BURST + 1 {
            judge(&limit, 1, SECOND);
        }
        assert_eq!(judge(&limit, 2, SECOND), PASS);
        assert_eq!(judge(&limit, 1, SECOND), Verdict::Suppress);
        assert_eq!((limit.take_untold(), limit.take_untold()), (2, 0));
    }

    #[test]
    fn places_beyond_the_table_are_not_limited() {
        let limit = RateLimit::new();
        for line in 0..u32::try_from(PLACES).unwrap() {
            judge(&limit, line, SECOND);
        }
        for _ in 0..2 * BURST {
            assert_eq!(judge(&limit, 60_000, SECOND), PASS);
        }
        assert_eq!(judge(&limit, 5, SECOND), PASS);
    }

    #[test]
    fn threads_that_log_at_once_share_the_limit() {
        let limit = RateLimit::new();
        let passed = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        if judge(&limit, 1, SECOND) == PASS {
                            passed.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        let passed = u64::from(passed.load(Ordering::Relaxed));
        // Where a period begins, each of the other threads may pass one that it counted into the last one.
        assert!(
            (u64::from(BURST)..=u64::from(BURST) + 3).contains(&passed),
            "{passed}"
        );
        assert_eq!(passed + limit.total(), 400);
    }
}
