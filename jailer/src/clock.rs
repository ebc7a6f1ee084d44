//! What the start has cost so far.

use rustix::time::{ClockId, clock_gettime};

/// Times in microseconds.
#[derive(Debug, Clone, Copy)]
pub struct Start {
    /// When the jailer started, by the monotonic clock.
    pub monotonic_us: u64,
    /// CPU time of the jailer.
    pub cpu_us: u64,
}

impl Start {
    /// The jailer starts now.
    pub fn now() -> Self {
        Self {
            monotonic_us: read(ClockId::Monotonic),
            cpu_us: 0,
        }
    }

    /// With the CPU time used until now.
    pub fn with_cpu_time(self) -> Self {
        Self {
            cpu_us: read(ClockId::ProcessCPUTime),
            ..self
        }
    }
}

fn read(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    let whole = |number: i64| u64::try_from(number).unwrap_or(0);
    whole(time.tv_sec) * 1_000_000 + whole(time.tv_nsec) / 1000
}
