//! [`VcpuMetrics`]: what one vCPU thread counts.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde_json::{Value, json};

use crate::x86_64::tsc;

/// Counters of one vCPU. Its thread alone writes them, so that no write locks the bus; the control thread reads them.
#[derive(Debug, Default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct VcpuMetrics {
    pub exit_io_in: Exits,
    pub exit_io_out: Exits,
    pub exit_mmio_read: Exits,
    pub exit_mmio_write: Exits,
    pub failures: Count,
    pub kvmclock_ctrl_fails: Count,
}

/// A number that one thread increments.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Adds to it; on the owning thread only.
    pub fn add(&self, number: u64) {
        self.0.store(self.get().wrapping_add(number), Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Exits of one kind, and how long they were served, in ticks of the TSC: reading it costs a fraction of a clock.
#[derive(Debug, Default)]
pub struct Exits {
    count: Count,
    sum: Count,
    /// Zero when there was none.
    min: AtomicU64,
    max: AtomicU64,
}

impl Exits {
    /// Counts an exit before it is served, so that whoever sees its effect sees the count; on the owning thread only.
    pub fn begin(&self) {
        self.count.add(1);
    }

    /// Times an exit that came at `start` and has been served; on the owning thread only.
    pub fn end(&self, start: u64) {
        let ticks = tsc().wrapping_sub(start).max(1);
        self.sum.add(ticks);
        if ticks > self.max.load(Ordering::Relaxed) {
            self.max.store(ticks, Ordering::Relaxed);
        }
        // Zero, the start, wraps to the largest number.
        if ticks - 1 < self.min.load(Ordering::Relaxed).wrapping_sub(1) {
            self.min.store(ticks, Ordering::Relaxed);
        }
    }

    fn durations(&self, rate: &TickRate) -> Value {
        json!({
            "min_us": rate.micros(self.min.load(Ordering::Relaxed)),
            "max_us": rate.micros(self.max.load(Ordering::Relaxed)),
            "sum_us": rate.micros(self.sum.get()),
        })
    }
}

impl VcpuMetrics {
    /// The counters as JSON.
    pub fn to_json(&self, rate: &TickRate) -> Value {
        json!({
            "exit_io_in": self.exit_io_in.count.get(),
            "exit_io_out": self.exit_io_out.count.get(),
            "exit_mmio_read": self.exit_mmio_read.count.get(),
            "exit_mmio_write": self.exit_mmio_write.count.get(),
            "failures": self.failures.get(),
            "kvmclock_ctrl_fails": self.kvmclock_ctrl_fails.get(),
            "exit_io_in_agg": self.exit_io_in.durations(rate),
            "exit_io_out_agg": self.exit_io_out.durations(rate),
            "exit_mmio_read_agg": self.exit_mmio_read.durations(rate),
            "exit_mmio_write_agg": self.exit_mmio_write.durations(rate),
        })
    }
}

/// How fast the TSC ticks, found by comparing it with the clock since a moment.
#[derive(Debug, Clone, Copy)]
pub struct TickRate {
    tsc: u64,
    time: Instant,
}

impl TickRate {
    /// Compares from now on.
    pub fn start() -> Self {
        Self {
            tsc: tsc(),
            time: Instant::now(),
        }
    }

    fn micros(&self, ticks: u64) -> u64 {
        if ticks == 0 {
            return 0;
        }
        let passed = u128::from(tsc().wrapping_sub(self.tsc).max(1));
        let micros = u128::from(ticks) * self.time.elapsed().as_nanos() / passed / 1000;
        u64::try_from(micros).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_shortest_the_longest_and_the_sum() {
        let (exits, now) = (Exits::default(), tsc());
        let hour = 1 << 44;
        for start in [now.wrapping_sub(hour), now, now.wrapping_sub(2 * hour)] {
            exits.begin();
            exits.end(start);
        }
        let (min, max) = (
            exits.min.load(Ordering::Relaxed),
            exits.max.load(Ordering::Relaxed),
        );
        assert!(min > 0 && min < hour, "{min}");
        assert!((2 * hour..3 * hour).contains(&max), "{max}");
        assert!((3 * hour..4 * hour).contains(&exits.sum.get()));
        assert_eq!(exits.count.get(), 3);
    }

    #[test]
    fn a_second_of_ticks_is_a_million_microseconds() {
        let rate = TickRate::start();
        std::thread::sleep(std::time::Duration::from_millis(20));
        let ticks = tsc().wrapping_sub(rate.tsc);
        let (micros, real) = (rate.micros(ticks), rate.time.elapsed().as_micros());
        assert!(micros > 0 && u128::from(micros) <= real, "{micros} of {real}");
    }
}
