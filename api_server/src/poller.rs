//! epoll(7), level-triggered, with a token per file descriptor. Used by the server on its thread.

use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::time::Instant;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::error::ServerError;

/// How many events one call of [`Poller::wait`] returns at most. More than descriptors in normal use; the
/// rest comes with the next call.
const BATCH: usize = 32;

#[derive(Debug)]
pub(crate) struct Poller {
    epoll: Epoll,
}

impl Poller {
    pub(crate) fn new() -> Result<Self, ServerError> {
        let epoll = Epoll::new().map_err(|source| ServerError::EventLoop {
            operation: "epoll_create1",
            source,
        })?;
        Ok(Self { epoll })
    }

    /// Reports `events` of `file` as `token` from now on.
    pub(crate) fn add(&self, file: &impl AsRawFd, token: u64, events: EventSet) -> Result<(), ServerError> {
        self.control(ControlOperation::Add, file, EpollEvent::new(events, token))
    }

    /// Changes what is reported of `file`.
    pub(crate) fn modify(
        &self,
        file: &impl AsRawFd,
        token: u64,
        events: EventSet,
    ) -> Result<(), ServerError> {
        self.control(ControlOperation::Modify, file, EpollEvent::new(events, token))
    }

    /// Reports nothing of `file` any more. Closing a file that has no duplicate does the same.
    pub(crate) fn remove(&self, file: &impl AsRawFd) -> Result<(), ServerError> {
        self.control(ControlOperation::Delete, file, EpollEvent::default())
    }

    fn control(
        &self,
        operation: ControlOperation,
        file: &impl AsRawFd,
        event: EpollEvent,
    ) -> Result<(), ServerError> {
        self.epoll
            .ctl(operation, file.as_raw_fd(), event)
            .map_err(|source| ServerError::EventLoop {
                operation: "epoll_ctl",
                source,
            })
    }

    /// Waits for events or until `deadline`; for ever if there is none. Returns tokens and what happened to
    /// them.
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> Result<Vec<(u64, EventSet)>, ServerError> {
        let mut events = [EpollEvent::default(); BATCH];
        let timeout = deadline.map_or(-1, milliseconds_until);
        match self.epoll.wait(timeout, &mut events) {
            Ok(count) => Ok(events[..count]
                .iter()
                .map(|event| (event.data(), EventSet::from_bits_truncate(event.events())))
                .collect()),
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(Vec::new()),
            Err(source) => Err(ServerError::EventLoop {
                operation: "epoll_wait",
                source,
            }),
        }
    }
}

/// Rounded up: waking early would find nothing due, and wait again.
fn milliseconds_until(deadline: Instant) -> i32 {
    let nanoseconds = deadline.saturating_duration_since(Instant::now()).as_nanos();
    i32::try_from(nanoseconds.div_ceil(1_000_000)).unwrap_or(i32::MAX)
}
