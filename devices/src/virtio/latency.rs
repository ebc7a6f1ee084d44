//! [`Latency`] and [`Histogram`]: how long things took.
//!
//! Recording is a few additions, without a clock: whoever records has measured already.

use std::time::Duration;

use serde::{Serialize, Serializer};

/// Buckets with a bound; one more takes what is beyond.
pub const BOUNDED: usize = 24;
/// The first bound is 2 to this in nanoseconds: about a microsecond. The last is about 8.6 seconds.
const FIRST_BOUND: u32 = 10;

/// Durations, counted by their order of magnitude.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Histogram {
    counts: [u64; BOUNDED + 1],
    sum_ns: u64,
}

impl Histogram {
    /// Counts a duration.
    pub fn record(&mut self, ns: u64) {
        self.counts[bucket(ns)] += 1;
        self.sum_ns = self.sum_ns.saturating_add(ns);
    }

    /// Counts what another one has counted.
    pub fn add(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.sum_ns = self.sum_ns.saturating_add(other.sum_ns);
    }

    /// Each bound in nanoseconds, and how many durations were at most that long.
    pub fn cumulative(&self) -> impl Iterator<Item = (u64, u64)> {
        let bounds = (0..).map(|bucket| 1 << (FIRST_BOUND + bucket));
        let counts = self.counts[..BOUNDED].iter().scan(0, |total, count| {
            *total += count;
            Some(*total)
        });
        bounds.zip(counts)
    }

    /// How many durations there were.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// All durations together, in nanoseconds.
    pub fn sum_ns(&self) -> u64 {
        self.sum_ns
    }
}

/// How long an operation took: shortest, longest, total, and the spread. Kept in nanoseconds, printed in microseconds
/// and without the spread, which [`VirtioDevice::histograms`](super::VirtioDevice::histograms) tells.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Latency {
    /// Shortest, in ns; zero when there was none.
    #[serde(rename = "min_us", serialize_with = "as_micros")]
    pub min_ns: u64,
    /// Longest, in ns.
    #[serde(rename = "max_us", serialize_with = "as_micros")]
    pub max_ns: u64,
    /// Each and all together.
    #[serde(rename = "sum_us", serialize_with = "sum_as_micros")]
    pub spread: Histogram,
}

impl Latency {
    /// Counts one operation.
    pub fn record(&mut self, time: Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.min_ns = if self.max_ns == 0 { ns } else { self.min_ns.min(ns) };
        self.max_ns = self.max_ns.max(ns);
        self.spread.record(ns);
    }
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes fields by reference"
)]
fn as_micros<S: Serializer>(ns: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(ns / 1000)
}

fn sum_as_micros<S: Serializer>(spread: &Histogram, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(spread.sum_ns / 1000)
}

/// The first bucket whose bound is not below `ns`.
fn bucket(ns: u64) -> usize {
    let doublings = u64::BITS - (ns.saturating_sub(1) >> FIRST_BOUND).leading_zeros();
    BOUNDED.min(doublings as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded(durations: &[u64]) -> Histogram {
        let mut histogram = Histogram::default();
        durations.iter().for_each(|ns| histogram.record(*ns));
        histogram
    }

    #[test]
    fn a_bound_belongs_to_its_bucket() {
        assert_eq!([0, 1, 1024].map(bucket), [0; 3]);
        assert_eq!([1025, 2048].map(bucket), [1; 2]);
        assert_eq!(bucket(2049), 2);
        let last = 1 << (FIRST_BOUND + 23);
        assert_eq!((bucket(last), bucket(last + 1)), (23, BOUNDED));
        assert_eq!(bucket(u64::MAX), BOUNDED);
    }

    #[test]
    fn counts_up_to_each_bound() {
        let histogram = recorded(&[10, 1000, 1500, 5_000_000_000, 60_000_000_000]);
        let cumulative: Vec<_> = histogram.cumulative().collect();
        assert_eq!(cumulative.len(), BOUNDED);
        assert_eq!(cumulative[0], (1024, 2));
        assert_eq!(cumulative[1], (2048, 3));
        assert_eq!(cumulative[21], (1 << 31, 3));
        assert_eq!(cumulative[23], (1 << 33, 4));
        assert_eq!((histogram.count(), histogram.sum_ns()), (5, 65_000_002_510));
    }

    #[test]
    fn adds_the_counts_of_another_one() {
        let mut sum = recorded(&[10, 1500]);
        sum.add(&recorded(&[20, 60_000_000_000]));
        assert_eq!(sum, recorded(&[10, 1500, 20, 60_000_000_000]));
    }

    #[test]
    fn a_latency_prints_microseconds_and_no_spread() {
        let mut latency = Latency::default();
        for ns in [3000, 1500, 9900] {
            latency.record(Duration::from_nanos(ns));
        }
        assert_eq!(
            serde_json::to_string(&latency).unwrap(),
            r#"{"min_us":1,"max_us":9,"sum_us":14}"#
        );
        assert_eq!(latency.spread.count(), 3);
    }

    #[test]
    fn a_sum_beyond_its_range_stays_at_the_end() {
        assert_eq!(recorded(&[u64::MAX, u64::MAX]).sum_ns(), u64::MAX);
    }
}
