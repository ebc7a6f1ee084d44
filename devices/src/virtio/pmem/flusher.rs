//! [`Flusher`]: a thread that makes a file's content durable, one flush at a time.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;

use crate::threads;

/// Names a flush.
type Ticket = u64;

/// A thread that waits for the disk in place of the io loop.
pub(super) struct Flusher {
    orders: Option<Sender<Ticket>>,
    results: Receiver<(Ticket, io::Result<()>)>,
    /// Signalled after every flush. Loops watch it edge-triggered, so nobody reads it.
    done: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    next: Ticket,
    /// The flush whose result is wanted. Results of forgotten ones are dropped.
    current: Option<Ticket>,
}

impl Flusher {
    /// Starts the thread.
    pub(super) fn new(file: Arc<File>) -> io::Result<Self> {
        let done = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let (orders, inbox) = mpsc::channel::<Ticket>();
        let (outbox, results) = mpsc::channel();
        let signal = Arc::clone(&done);
        let work = move || {
            for ticket in inbox {
                // Whoever has gone does not want the result. Only a full counter refuses, and it has signalled.
                let _ = outbox.send((ticket, file.sync_data()));
                let _ = signal.write(1);
            }
        };
        Ok(Self {
            orders: Some(orders),
            results,
            done,
            thread: Some(threads::spawn("flush", 64 << 10, work)?),
            next: 0,
            current: None,
        })
    }

    /// Becomes ready after a flush.
    pub(super) fn done_fd(&self) -> RawFd {
        self.done.as_raw_fd()
    }

    /// True from `start` until its result is taken.
    pub(super) fn is_busy(&self) -> bool {
        self.current.is_some()
    }

    /// Starts a flush of all that was written so far. The last one is forgotten.
    pub(super) fn start(&mut self) {
        self.current = Some(self.next);
        let orders = self.orders.as_ref().expect("the thread lives as long as this");
        orders.send(self.next).expect("the thread takes every order");
        self.next += 1;
    }

    /// The result of the flush that was started, once it is there.
    pub(super) fn take(&mut self) -> Option<io::Result<()>> {
        while let Ok((ticket, result)) = self.results.try_recv() {
            if self.is_it(ticket) {
                return Some(result);
            }
        }
        None
    }

    /// Waits for the result of the flush that was started; `None` when there was none.
    pub(super) fn wait(&mut self) -> Option<io::Result<()>> {
        while self.is_busy() {
            let (ticket, result) = self.results.recv().expect("the thread answers every order");
            if self.is_it(ticket) {
                return Some(result);
            }
        }
        None
    }

    /// Wants no result any more.
    pub(super) fn forget(&mut self) {
        self.current = None;
    }

    fn is_it(&mut self, ticket: Ticket) -> bool {
        let it = self.current == Some(ticket);
        if it {
            self.current = None;
        }
        it
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        drop(self.orders.take());
        if let Some(thread) = self.thread.take() {
            // A panic in the thread has ended the process already.
            drop(thread.join());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_whether_the_host_has_flushed() {
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap();
        let mut flusher = Flusher::new(file.into_file().into()).unwrap();
        assert!(flusher.wait().is_none());
        flusher.start();
        assert!(flusher.is_busy());
        assert!(flusher.wait().unwrap().is_ok());
        assert!(!flusher.is_busy() && flusher.take().is_none());
    }

    #[test]
    fn tells_why_the_host_has_not_flushed() {
        // A pipe cannot be made durable.
        let (pipe, _writer) = io::pipe().unwrap();
        let mut flusher = Flusher::new(File::from(std::os::fd::OwnedFd::from(pipe)).into()).unwrap();
        flusher.start();
        let error = flusher.wait().unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_forgotten_flush_is_not_taken_for_the_next_one() {
        let (pipe, _writer) = io::pipe().unwrap();
        let mut flusher = Flusher::new(File::from(std::os::fd::OwnedFd::from(pipe)).into()).unwrap();
        flusher.start();
        flusher.forget();
        assert!(flusher.wait().is_none());
        flusher.start();
        assert!(flusher.wait().is_some() && flusher.take().is_none());
    }
}
