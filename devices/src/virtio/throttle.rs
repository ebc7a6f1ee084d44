//! [`Throttle`]: a rate limiter at work in a device, for all of its requests or for those of one direction.
//!
//! It looks at the clock once for a batch of requests, and its timer is set only while a request is held back: to the
//! moment at which that one can go. The request itself stays in its queue. An unlimited throttle costs a comparison.
//!
//! ```text
//! fn on_queue(..) {
//!     if self.throttle.is_holding() { return Ok(()) }
//!     self.throttle.begin(io.clock);
//!     while ring.pop(&mut chain)? {
//!         if !self.throttle.take(bytes) { ring.unpop(1); break }
//!         ..
//!     }
//!     self.throttle.settle(io.clock)
//! }
//! fn on_event(token, ..) { if self.throttle.release() { /* work on the queue as above */ } }
//! ```
//!
//! Beyond that a device calls [`Throttle::activate`], [`Throttle::reset`], and for changes [`Throttle::prepare`] and
//! [`Throttle::patch`]. An event that comes while the machine is paused is not lost: the lane replays it.
//!
//! Siblings of a device that are on other loops have a throttle each over one limiter, by [`Throttle::share`]: those that
//! hold something back take turns. Its lock is taken only where something is limited.

use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{DeviceError, Io, StateError, UpdateError};
use crate::rate_limiter::{self, RateLimiter, RateLimiterConfig, SharedLimiter, UserId};
use crate::timer::{Clock, Timer};

/// A rate limiter with its timer.
pub struct Throttle {
    limiter: Arc<Mutex<SharedLimiter>>,
    user: UserId,
    /// Whether anything is limited, known without the lock.
    limited: bool,
    /// The device's token for the timer.
    token: u32,
    /// Made when something is limited for the first time, and kept: its loop watches it.
    timer: Option<Timer>,
    /// The moment of this batch, when it matters.
    now: Option<Instant>,
    /// When the request that is held back can go.
    held_until: Option<Instant>,
}

impl Throttle {
    /// A throttle whose timer has this token of the device.
    pub fn new(limits: Option<&RateLimiterConfig>, token: u32) -> Self {
        let limiter = limits.map(RateLimiter::new).unwrap_or_default();
        Self {
            limited: limiter.limits_something(),
            limiter: Arc::new(SharedLimiter::new(limiter).into()),
            user: SharedLimiter::FIRST,
            token,
            timer: None,
            now: None,
            held_until: None,
        }
    }

    /// A throttle for a sibling, over the same limiter. It has its timer at once, so that it can follow any change.
    pub fn share(&self) -> std::io::Result<Self> {
        Ok(Self {
            limiter: Arc::clone(&self.limiter),
            user: self.lock().join(),
            limited: self.limited,
            token: self.token,
            timer: Some(Timer::new()?),
            now: None,
            held_until: None,
        })
    }

    /// Follows a change that was made by way of the throttle that this one was made from.
    pub fn refresh(&mut self) {
        let limited = self.lock().limits_something();
        self.limited = limited;
    }

    fn lock(&self) -> MutexGuard<'_, SharedLimiter> {
        self.limiter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches the timer, when there is a limit.
    pub fn activate(&mut self, io: &Io<'_>) -> Result<(), DeviceError> {
        if self.limited && self.timer.is_none() {
            self.timer = Some(Timer::new().map_err(failed("make the timer of a rate limiter"))?);
        }
        let Some(timer) = &self.timer else { return Ok(()) };
        let watched = io.watch.add(timer.as_raw_fd(), self.token);
        watched.map_err(failed("watch the timer of a rate limiter"))
    }

    /// Forgets what was held back. What was used up stays used up, or a guest could reset a limit away. The timer may
    /// still be set, but nobody watches it now, and a later event finds nothing held back.
    pub fn reset(&mut self) {
        self.held_until = None;
        self.lock().leave(self.user);
    }

    /// True while a request waits for its time. The timer's event will come; there is nothing to do until then.
    #[inline]
    pub fn is_holding(&self) -> bool {
        self.held_until.is_some()
    }

    /// Begins a batch of requests.
    #[inline]
    pub fn begin(&mut self, clock: &dyn Clock) {
        if self.limited {
            let now = clock.now();
            self.now = Some(now);
            self.lock().refill(now);
        }
    }

    /// Whether a request that moves `bytes` can go now, and is paid for. If not, nothing behind it can, and the batch
    /// ends.
    #[inline]
    pub fn take(&mut self, bytes: usize) -> bool {
        match self.now {
            None => true,
            Some(now) => self.take_at(bytes, now),
        }
    }

    fn take_at(&mut self, bytes: usize, now: Instant) -> bool {
        let bytes = u64::try_from(bytes).expect("a usize fits");
        let taken = self.lock().take(self.user, bytes, now);
        match taken {
            Ok(()) => true,
            Err(moment) => {
                self.held_until = Some(moment);
                false
            }
        }
    }

    /// Ends a batch: sets the timer when a request is held back.
    #[inline]
    pub fn settle(&mut self, clock: &dyn Clock) -> Result<(), DeviceError> {
        self.now = None;
        match self.held_until {
            None => Ok(()),
            Some(moment) => self.set_timer(moment.saturating_duration_since(clock.now())),
        }
    }

    fn set_timer(&mut self, delay: Duration) -> Result<(), DeviceError> {
        let timer = self.timer.as_mut().expect("a limit has made the timer");
        timer
            .set(delay)
            .map_err(failed("set the timer of a rate limiter"))
    }

    /// Takes the timer's event; true when something was held back and can be tried again.
    pub fn release(&mut self) -> bool {
        self.held_until.take().is_some()
    }

    /// Does all that can fail of a change to `limits`; [`Throttle::patch`] then makes it. What is held back is tried
    /// again after that, at once.
    pub fn prepare(&mut self, limits: Option<&RateLimiterConfig>, io: &Io<'_>) -> Result<(), UpdateError> {
        let host = |op: &str| {
            let op = op.to_owned();
            |source| UpdateError::Host { op, source }
        };
        if self.timer.is_none() && limits.is_some_and(RateLimiterConfig::is_effective) {
            let timer = Timer::new().map_err(host("make the timer of a rate limiter"))?;
            let watched = io.watch.add(timer.as_raw_fd(), self.token);
            watched.map_err(host("watch the timer of a rate limiter"))?;
            self.timer = Some(timer);
        }
        match &mut self.timer {
            Some(timer) if self.held_until.is_some() && limits.is_some() => timer
                .set(Duration::ZERO)
                .map_err(host("set the timer of a rate limiter")),
            _ => Ok(()),
        }
    }

    /// Changes the limits as the user's patch says.
    pub fn patch(&mut self, limits: Option<&RateLimiterConfig>) {
        if let Some(limits) = limits {
            self.lock().patch(limits);
            self.refresh();
        }
    }

    /// What is left of the limits, for a snapshot.
    pub fn save(&self) -> rate_limiter::State {
        self.lock().save(Instant::now())
    }

    /// Takes over what was left; nothing changes when it does not belong to these limits.
    pub fn load(&mut self, kind: &'static str, state: rate_limiter::State) -> Result<(), StateError> {
        let inconsistent = |error: rate_limiter::StateError| StateError::Inconsistent {
            kind,
            what: error.to_string(),
        };
        self.lock().load(state).map_err(inconsistent)
    }
}

fn failed(op: &'static str) -> impl Fn(std::io::Error) -> DeviceError {
    move |source| DeviceError::Host { op, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, Recorder};

    const HOUR: Duration = Duration::from_secs(3600);

    fn one_an_hour() -> RateLimiterConfig {
        serde_json::from_str(r#"{"ops":{"size":1,"refill_time":3600000}}"#).unwrap()
    }

    /// Time until the timer expires; zero when it is not set.
    fn timer_left(throttle: &Throttle) -> Duration {
        let zero = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let mut left = libc::itimerspec {
            it_interval: zero,
            it_value: zero,
        };
        let fd = throttle.timer.as_ref().unwrap().as_raw_fd();
        // SAFETY: needed as no wrapper tells what is left. The kernel writes one value to a place that lives longer.
        assert_eq!(unsafe { libc::timerfd_gettime(fd, &mut left) }, 0);
        Duration::from_secs(u64::try_from(left.it_value.tv_sec).unwrap())
    }

    fn activated(throttle: &mut Throttle, recorder: &Recorder) {
        let mem = testing::memory(0x1000);
        let io = testing::io(&mem, &mut [], recorder, 0);
        throttle.activate(&io).unwrap();
    }

    #[test]
    fn the_timer_is_set_only_while_something_is_held_back() {
        let recorder = testing::recorder();
        let mut throttle = Throttle::new(Some(&one_an_hour()), 7);
        activated(&mut throttle, &recorder);
        throttle.begin(&*recorder);
        assert!(throttle.take(1));
        throttle.settle(&*recorder).unwrap();
        assert_eq!(
            (throttle.is_holding(), timer_left(&throttle)),
            (false, Duration::ZERO)
        );

        throttle.begin(&*recorder);
        assert!(!throttle.take(1));
        throttle.settle(&*recorder).unwrap();
        let left = timer_left(&throttle);
        assert!(
            throttle.is_holding() && left > HOUR / 2 && left <= HOUR,
            "{left:?}"
        );
        assert!(throttle.release() && !throttle.release());
    }

    #[test]
    fn the_timer_counts_from_the_moment_at_which_it_is_set() {
        let recorder = testing::recorder();
        let mut throttle = Throttle::new(Some(&one_an_hour()), 7);
        activated(&mut throttle, &recorder);
        throttle.begin(&*recorder);
        assert!(throttle.take(1) && !throttle.take(1));
        recorder.pass(HOUR - Duration::from_secs(60));
        throttle.settle(&*recorder).unwrap();
        assert!(timer_left(&throttle) <= Duration::from_secs(60));
    }

    #[test]
    fn siblings_share_what_a_limit_lets_through_and_follow_its_changes() {
        let recorder = testing::recorder();
        let mut first = Throttle::new(Some(&one_an_hour()), 7);
        let mut second = first.share().unwrap();
        for throttle in [&mut first, &mut second] {
            activated(throttle, &recorder);
            throttle.begin(&*recorder);
        }
        assert!(second.take(1) && !first.take(1) && !second.take(1));
        let off = serde_json::from_str(r#"{"ops":{"size":0,"refill_time":1}}"#).unwrap();
        first.patch(Some(&off));
        second.refresh();
        for throttle in [&mut first, &mut second] {
            throttle.settle(&*recorder).unwrap();
            throttle.begin(&*recorder);
            assert!(throttle.take(1) && throttle.take(1));
        }
        first.patch(Some(&one_an_hour()));
        second.refresh();
        for throttle in [&mut first, &mut second] {
            throttle.begin(&*recorder);
        }
        assert!(first.take(1) && !second.take(1));
        second.settle(&*recorder).unwrap();
        assert!(timer_left(&second) > HOUR / 2);
    }

    /// Two siblings over a bucket of `size` bytes, which fills up in a second, and in which nothing is left.
    fn siblings(size: u64, recorder: &Recorder) -> (Throttle, Throttle) {
        let limits = format!(r#"{{"bandwidth":{{"size":{size},"refill_time":1000}}}}"#);
        let limits: RateLimiterConfig = serde_json::from_str(&limits).unwrap();
        let mut first = Throttle::new(Some(&limits), 7);
        let mut second = first.share().unwrap();
        activated(&mut first, recorder);
        activated(&mut second, recorder);
        assert!(went(&mut first, usize::try_from(size).unwrap(), recorder));
        (first, second)
    }

    /// Whether a request can go now, as a device finds out.
    fn went(throttle: &mut Throttle, bytes: usize, recorder: &Recorder) -> bool {
        if throttle.held_until.is_some_and(|moment| moment > recorder.now()) {
            return false;
        }
        throttle.release();
        throttle.begin(recorder);
        let went = throttle.take(bytes);
        throttle.settle(recorder).unwrap();
        went
    }

    #[test]
    fn a_large_request_goes_though_a_sibling_has_small_ones_all_the_time() {
        let recorder = testing::recorder();
        let (mut large, mut small) = siblings(1000, &recorder);
        assert!(!went(&mut large, 900, &recorder));
        let mut count = 0;
        for _ in 0..90 {
            recorder.pass(Duration::from_millis(10));
            count += u32::from(went(&mut small, 10, &recorder));
        }
        assert_eq!(count, 0);
        // The small one may well come first: its tokens are not those of the large one.
        recorder.pass(Duration::from_millis(10));
        assert!(went(&mut small, 10, &recorder) && went(&mut large, 900, &recorder));
        assert!(!went(&mut small, 10, &recorder));
    }

    #[test]
    fn a_sibling_that_is_reset_or_does_not_come_keeps_nobody_waiting() {
        let recorder = testing::recorder();
        let (mut gone, mut other) = siblings(1000, &recorder);
        assert!(!went(&mut gone, 900, &recorder));
        gone.reset();
        recorder.pass(Duration::from_millis(10));
        assert!(went(&mut other, 10, &recorder));

        assert!(!went(&mut gone, 900, &recorder) && !went(&mut other, 10, &recorder));
        recorder.pass(Duration::from_millis(910));
        assert!(went(&mut other, 10, &recorder));
    }

    #[test]
    fn a_request_that_has_changed_while_it_was_held_back_pays_as_it_is() {
        let recorder = testing::recorder();
        let (mut first, _second) = siblings(1000, &recorder);
        assert!(!went(&mut first, 10, &recorder));
        recorder.pass(Duration::from_millis(10));
        assert!(!went(&mut first, 500, &recorder));
        recorder.pass(Duration::from_millis(500));
        assert!(went(&mut first, 500, &recorder));
    }

    #[test]
    fn a_timer_is_watched_once_it_is_needed_and_on_every_activation() {
        let (recorder, mem) = (testing::recorder(), testing::memory(0x1000));
        let mut throttle = Throttle::new(None, 7);
        activated(&mut throttle, &recorder);
        let io = testing::io(&mem, &mut [], &recorder, 0);
        let disabled = serde_json::from_str(r#"{"ops":{"size":0,"refill_time":1}}"#).unwrap();
        throttle.prepare(Some(&disabled), &io).unwrap();
        assert!(throttle.timer.is_none() && recorder.watched.lock().unwrap().is_empty());

        throttle.prepare(Some(&one_an_hour()), &io).unwrap();
        throttle.prepare(Some(&one_an_hour()), &io).unwrap();
        let fd = throttle.timer.as_ref().unwrap().as_raw_fd();
        assert_eq!(*recorder.watched.lock().unwrap(), [(fd, 7)]);
        throttle.reset();
        activated(&mut throttle, &recorder);
        assert_eq!(recorder.watched.lock().unwrap().len(), 2);
    }
}
