//! [`Timer`]: a descriptor that becomes readable after a while. It belongs to a device and is watched by its io loop.
//! [`Clock`]: what time it is, for devices whose tests decide that themselves.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

/// A timer of the monotonic clock.
///
/// It expires once each time it is set. Every expiration is a new readiness, and loops watch descriptors edge-triggered
/// ([`Watch::add`](crate::virtio::Watch::add)), so nobody reads it. (A periodic one would have to be read: until then the
/// kernel does not count its next period.)
#[derive(Debug)]
pub struct Timer(TimerFd);

impl Timer {
    /// A timer that is not set.
    pub fn new() -> io::Result<Self> {
        Ok(Self(TimerFd::new()?))
    }

    /// Expires once, after `delay`; at once when that is zero. What was set before is forgotten.
    pub fn set(&mut self, delay: Duration) -> io::Result<()> {
        // Zero would stop the timer.
        Ok(self.0.reset(delay.max(Duration::from_nanos(1)), None)?)
    }

    /// Expires no more.
    pub fn stop(&mut self) -> io::Result<()> {
        Ok(self.0.clear()?)
    }
}

/// Tells the time, which never goes back.
pub trait Clock {
    /// This moment.
    fn now(&self) -> Instant;
}

/// The host's monotonic clock.
pub struct HostClock;

impl Clock for HostClock {
    fn now(&self) -> Instant {
        Instant::now()
    }
}

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the descriptor becomes readable within `millis`.
    fn expires_within(timer: &Timer, millis: libc::c_int) -> bool {
        let mut fd = libc::pollfd {
            fd: timer.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: needed as std has no poll. One valid entry is passed, and the count is one.
        unsafe { libc::poll(&mut fd, 1, millis) == 1 }
    }

    #[test]
    fn expires_after_its_delay_and_not_when_stopped() {
        let mut timer = Timer::new().unwrap();
        assert!(!expires_within(&timer, 0));
        timer.set(Duration::ZERO).unwrap();
        assert!(expires_within(&timer, 10_000));
        timer.set(Duration::from_secs(1000)).unwrap();
        assert!(!expires_within(&timer, 0));
        timer.set(Duration::from_millis(1)).unwrap();
        assert!(expires_within(&timer, 10_000));
        timer.stop().unwrap();
        assert!(!expires_within(&timer, 0));
    }

    #[test]
    fn expires_anew_whenever_it_is_set_though_nobody_reads_it() {
        use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
        let (mut timer, epoll) = (Timer::new().unwrap(), Epoll::new().unwrap());
        let edge = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
        epoll.ctl(ControlOperation::Add, timer.as_raw_fd(), edge).unwrap();
        let mut events = [EpollEvent::default()];
        for _ in 0..3 {
            timer.set(Duration::from_millis(1)).unwrap();
            assert_eq!(epoll.wait(10_000, &mut events).unwrap(), 1);
            assert_eq!(epoll.wait(0, &mut events).unwrap(), 0);
        }
    }
}
