//! [`Unplugs`]: requests to detach a device that wait for the guest to let go of it.
//!
//! Owned by the control thread, which goes on serving requests meanwhile.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use devices::virtio::DeviceKind;
use serde::Deserialize;
use vmm_sys_util::timerfd::TimerFd;

use crate::api::Call;

/// How a device is to be detached: the optional body of a `DELETE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UnplugConfig {
    /// How long the guest has, in milliseconds.
    pub timeout_ms: u32,
    /// True to take the device away without asking the guest.
    pub force: bool,
}

impl Default for UnplugConfig {
    fn default() -> Self {
        Self {
            timeout_ms: 5000,
            force: false,
        }
    }
}

/// What happens to a device that the guest does not let go of in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Otherwise {
    /// It stays, and the request fails.
    Keep,
    /// It is taken away.
    TakeAway,
}

/// A device that the guest was asked to let go of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unplug {
    /// What it is.
    pub kind: DeviceKind,
    /// Which one.
    pub id: String,
    /// When the guest must have answered.
    pub deadline: Instant,
    /// What then.
    pub otherwise: Otherwise,
}

impl Unplug {
    /// Waits from now on.
    pub fn new(kind: DeviceKind, id: &str, timeout_ms: u32, otherwise: Otherwise) -> Self {
        Self {
            kind,
            id: id.into(),
            deadline: Instant::now() + Duration::from_millis(timeout_ms.into()),
            otherwise,
        }
    }
}

/// The waiting requests, with the timer of the next deadline.
pub struct Unplugs {
    waiting: Vec<(Unplug, Call)>,
    timer: TimerFd,
}

impl Unplugs {
    /// Nothing waits.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            waiting: Vec::new(),
            timer: TimerFd::new()?,
        })
    }

    /// Signalled when a deadline has passed.
    pub fn timer(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Lets a request wait.
    pub fn add(&mut self, unplug: Unplug, call: Call) {
        self.waiting.push((unplug, call));
        self.set_timer();
    }

    /// The requests that wait for this device, which is gone.
    pub fn finish(&mut self, kind: DeviceKind, id: &str) -> Vec<Call> {
        let done = self
            .waiting
            .extract_if(.., |(unplug, _)| unplug.kind == kind && unplug.id == id);
        let calls = done.map(|(_, call)| call).collect();
        self.set_timer();
        calls
    }

    /// The requests whose time is over.
    pub fn expired(&mut self) -> Vec<(Unplug, Call)> {
        let now = Instant::now();
        let expired = self.waiting.extract_if(.., |(unplug, _)| unplug.deadline <= now);
        let expired = expired.collect();
        self.set_timer();
        expired
    }

    /// Sets the timer anew, by which it has not rung: nobody reads it, as that would block when it was set meanwhile.
    fn set_timer(&mut self) {
        let next = self.waiting.iter().map(|(unplug, _)| unplug.deadline).min();
        let set = match next {
            // Zero would stop the timer.
            Some(next) => {
                let left = next.saturating_duration_since(Instant::now());
                self.timer.reset(left.max(Duration::from_nanos(1)), None)
            }
            None => self.timer.clear(),
        };
        if let Err(error) = set {
            log::error!("the timer of devices to be detached cannot be set: {error}");
        }
    }
}
