//! Times of the process, in microseconds.

use crate::args::Args;

/// The monotonic clock.
pub fn now_us() -> u64 {
    read(libc::CLOCK_MONOTONIC)
}

/// The time since 1970-01-01 00:00:00 UTC.
pub fn unix_us() -> u64 {
    read(libc::CLOCK_REALTIME)
}

/// Monotonic time since `start`, zero when there is none.
pub fn since_us(start: Option<u64>) -> u64 {
    start.map_or(0, |start| now_us().saturating_sub(start))
}

/// CPU time spent on the start: this process's since `--start-time-cpu-us`, and its parent's.
pub fn cpu_us(args: &Args) -> u64 {
    let own = args.start_time_cpu_us.map_or(0, |start| {
        read(libc::CLOCK_PROCESS_CPUTIME_ID).saturating_sub(start)
    });
    own + args.parent_cpu_time_us.unwrap_or(0)
}

fn read(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: needed because the standard library hides the clocks' values; the pointer is to a live value.
    unsafe { libc::clock_gettime(clock, &mut time) };
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds * 1_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0) / 1000
}
