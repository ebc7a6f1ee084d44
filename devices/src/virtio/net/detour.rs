//! [`Detour`]: the metadata service's end of the interface. Frames for its address leave the way to the tap here, and
//! those that it sends come in beside those of the tap.
//!
//! The parts of a card with several pairs of queues have it together: whichever of them has room takes its frames in.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::backend::HEADER_LEN;
use crate::mmds::{self, Mmds, Now, Stack};
use crate::random;
use crate::timer::Timer;
use crate::virtio::{Buffers, Clock};

/// The service, as this interface has it.
#[derive(Clone)]
pub(super) struct Detour(Arc<Shared>);

/// What can be asked without the lock is for the way of all other frames.
struct Shared {
    address: Ipv4Addr,
    /// A frame waits for the guest.
    has_frame: AtomicBool,
    /// Something was done since the timer was set.
    stale: AtomicBool,
    service: Mutex<Service>,
}

struct Service {
    mmds: Arc<Mmds>,
    stack: Stack,
    timer: Timer,
    time: Stopwatch,
    frame: Vec<u8>,
}

impl Service {
    fn now(&mut self, clock: &dyn Clock) -> Now {
        let now = clock.now();
        Now {
            interface: self.time.read(now),
            tokens: self.mmds.age(now),
        }
    }
}

impl Detour {
    pub(super) fn new(mmds: Arc<Mmds>) -> io::Result<Self> {
        let mut seed = [0; 8];
        random::fill(&mut seed)?;
        let stack = Stack::new(Arc::clone(&mmds), u64::from_ne_bytes(seed), Duration::ZERO);
        Ok(Self(Arc::new(Shared {
            address: stack.address(),
            has_frame: false.into(),
            stale: false.into(),
            service: Mutex::new(Service {
                mmds,
                stack,
                timer: Timer::new()?,
                time: Stopwatch::default(),
                frame: Vec::new(),
            }),
        })))
    }

    /// The timer to watch; when it expires, [`Detour::work`] is due.
    pub(super) fn timer_fd(&self) -> RawFd {
        self.lock().timer.as_raw_fd()
    }

    /// Takes a frame of the guest if it is for the service.
    pub(super) fn take(&self, frame: &Buffers<'_>, clock: &dyn Clock) -> bool {
        let mut head = [0; mmds::HEAD_LEN];
        frame.read(HEADER_LEN, &mut head);
        if !mmds::is_for(self.0.address, &head) {
            return false;
        }
        // One byte more than the stack takes shows it that a frame is too long.
        let len = frame
            .len()
            .saturating_sub(HEADER_LEN)
            .min(mmds::MAX_FRAME_LEN + 1);
        self.change(|service| {
            service.frame.resize(len, 0);
            frame.read(HEADER_LEN, &mut service.frame);
            let now = service.now(clock);
            service.stack.receive(&service.frame, now);
        });
        true
    }

    /// Puts the next frame for the guest, with a header that says nothing, into `out`. Returns its length, or zero when
    /// there is none.
    pub(super) fn give(&self, out: &mut [u8], clock: &dyn Clock) -> usize {
        if !self.has_frame() {
            return 0;
        }
        self.change(|service| {
            let now = service.now(clock);
            service.stack.take_frame(now).map_or(0, |frame| {
                let len = HEADER_LEN + frame.len();
                out[..HEADER_LEN].fill(0);
                out[HEADER_LEN..len].copy_from_slice(&frame);
                len
            })
        })
    }

    /// Does what is due.
    pub(super) fn work(&self, clock: &dyn Clock) {
        self.change(|service| {
            let now = service.now(clock);
            service.stack.work(now);
        });
    }

    /// Whether a frame waits for the guest.
    pub(super) fn has_frame(&self) -> bool {
        self.0.has_frame.load(Ordering::Acquire)
    }

    /// Sets the timer to when something is due next.
    pub(super) fn set_timer(&self, clock: &dyn Clock) -> io::Result<()> {
        if !self.0.stale.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut service = self.lock();
        self.0.stale.store(false, Ordering::Release);
        let now = service.time.read(clock.now());
        match service.stack.next_work(now) {
            Some(delay) => service.timer.set(delay),
            None => service.timer.stop(),
        }
    }

    /// Stops the clock until something is done again.
    pub(super) fn pause(&self, clock: &dyn Clock) {
        self.lock().time.stop(clock.now());
    }

    pub(super) fn reset(&self) {
        self.change(|service| service.stack.reset());
    }

    fn change<R>(&self, work: impl FnOnce(&mut Service) -> R) -> R {
        let mut service = self.lock();
        let result = work(&mut service);
        self.0
            .has_frame
            .store(service.stack.has_frame(), Ordering::Release);
        self.0.stale.store(true, Ordering::Release);
        result
    }

    fn lock(&self) -> MutexGuard<'_, Service> {
        self.0.service.lock().unwrap_or_else(PoisonError::into_inner)
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
