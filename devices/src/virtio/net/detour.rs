//! [`Detour`]: the metadata service's end of the interface. Frames for its address leave the way to the tap here, and
//! those that it sends come in beside those of the tap.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::backend::HEADER_LEN;
use crate::mmds::{self, Mmds, Stack};
use crate::random;
use crate::timer::Timer;
use crate::virtio::{Buffers, Clock};

/// The service, as this interface has it.
pub(super) struct Detour {
    stack: Stack,
    timer: Timer,
    time: Stopwatch,
    /// Something was done since the timer was set.
    stale: bool,
    frame: Vec<u8>,
}

impl Detour {
    pub(super) fn new(mmds: Arc<Mmds>) -> io::Result<Self> {
        let mut seed = [0; 8];
        random::fill(&mut seed)?;
        Ok(Self {
            stack: Stack::new(mmds, u64::from_ne_bytes(seed), Duration::ZERO),
            timer: Timer::new()?,
            time: Stopwatch::default(),
            stale: false,
            frame: Vec::new(),
        })
    }

    /// The timer to watch; when it expires, [`Detour::work`] is due.
    pub(super) fn timer_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Takes a frame of the guest if it is for the service.
    pub(super) fn take(&mut self, frame: &Buffers<'_>, clock: &dyn Clock) -> bool {
        let mut head = [0; mmds::HEAD_LEN];
        frame.read(HEADER_LEN, &mut head);
        if !mmds::is_for(self.stack.address(), &head) {
            return false;
        }
        // One byte more than the stack takes shows it that a frame is too long.
        let len = frame
            .len()
            .saturating_sub(HEADER_LEN)
            .min(mmds::MAX_FRAME_LEN + 1);
        self.frame.resize(len, 0);
        frame.read(HEADER_LEN, &mut self.frame);
        let now = self.time.read(clock.now());
        self.stack.receive(&self.frame, now);
        self.stale = true;
        true
    }

    /// Puts the next frame for the guest, with a header that says nothing, into `out`. Returns its length, or zero when
    /// there is none.
    pub(super) fn give(&mut self, out: &mut [u8], clock: &dyn Clock) -> usize {
        if !self.stack.has_frame() {
            return 0;
        }
        let now = self.time.read(clock.now());
        self.stale = true;
        self.stack.take_frame(now).map_or(0, |frame| {
            let len = HEADER_LEN + frame.len();
            out[..HEADER_LEN].fill(0);
            out[HEADER_LEN..len].copy_from_slice(&frame);
            len
        })
    }

    /// Does what is due.
    pub(super) fn work(&mut self, clock: &dyn Clock) {
        let now = self.time.read(clock.now());
        self.stack.work(now);
        self.stale = true;
    }

    /// Whether a frame waits for the guest.
    pub(super) fn has_frame(&self) -> bool {
        self.stack.has_frame()
    }

    /// Sets the timer to when something is due next.
    pub(super) fn set_timer(&mut self, clock: &dyn Clock) -> io::Result<()> {
        if !mem::take(&mut self.stale) {
            return Ok(());
        }
        let now = self.time.read(clock.now());
        match self.stack.next_work(now) {
            Some(delay) => self.timer.set(delay),
            None => self.timer.stop(),
        }
    }

    /// Stops the clock until something is done again.
    pub(super) fn pause(&mut self, clock: &dyn Clock) {
        self.time.stop(clock.now());
    }

    pub(super) fn reset(&mut self) {
        self.stack.reset();
        self.stale = true;
    }
}

/// Runs from the first look at it, and stands still while the machine is paused, so that a pause costs no connection.
#[derive(Default)]
struct Stopwatch {
    start: Option<Instant>,
    stopped: Option<Instant>,
}

impl Stopwatch {
    /// Stands still until it is read.
    fn stop(&mut self, now: Instant) {
        self.stopped.get_or_insert(now);
    }

    fn read(&mut self, now: Instant) -> Duration {
        let start = self.start.get_or_insert(now);
        if let Some(stopped) = self.stopped.take() {
            *start += now.saturating_duration_since(stopped);
        }
        now.saturating_duration_since(*start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_stands_still_from_a_stop_to_the_next_look() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut watch = Stopwatch::default();
        assert_eq!(watch.read(start), Duration::ZERO);
        assert_eq!(watch.read(after(5)), Duration::from_secs(5));
        watch.stop(after(10));
        watch.stop(after(20));
        assert_eq!(watch.read(after(3610)), Duration::from_secs(10));
        assert_eq!(watch.read(after(3611)), Duration::from_secs(11));
    }
}
