//! The way from the server to whoever answers requests, and back.
//!
//! [`Handler::handle`] runs on the server's thread; a [`Responder`] may go to any thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;

use vmm_sys_util::eventfd::EventFd;

use crate::message::{Request, Response};

/// Answers requests.
///
/// Closures of the same signature are handlers too.
pub trait Handler {
    /// Takes one request. Called on the server's thread, which serves nobody else until this returns: hand
    /// long work and the `responder` to another thread.
    fn handle(&mut self, request: Request, responder: Responder);
}

impl<F: FnMut(Request, Responder)> Handler for F {
    fn handle(&mut self, request: Request, responder: Responder) {
        self(request, responder);
    }
}

/// The obligation to answer one request, from any thread and at any time.
///
/// If it is dropped instead, the client gets a 400 that says so. If the client has gone meanwhile, the answer
/// is discarded.
#[derive(Debug)]
pub struct Responder {
    connection: u64,
    replies: Sender<Reply>,
    wake: Arc<Wake>,
    sent: bool,
}

/// An answer on its way to the server's thread.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) connection: u64,
    pub(crate) response: Response,
}

impl Responder {
    pub(crate) fn new(connection: u64, replies: Sender<Reply>, wake: Arc<Wake>) -> Self {
        Self {
            connection,
            replies,
            wake,
            sent: false,
        }
    }

    /// Answers the request.
    pub fn send(mut self, response: Response) {
        self.deliver(response);
    }

    fn deliver(&mut self, response: Response) {
        self.sent = true;
        // A server that is gone has closed its connections: nobody waits for this answer.
        if self
            .replies
            .send(Reply {
                connection: self.connection,
                response,
            })
            .is_ok()
        {
            self.wake.notify();
        }
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        if !self.sent {
            self.deliver(Response::fault(
                400,
                "The request was abandoned: the process is stopping or its handler failed.",
            ));
        }
    }
}

/// What other threads wake the server's thread with.
#[derive(Debug)]
pub(crate) struct Wake {
    pub(crate) event: EventFd,
    stop: AtomicBool,
}

impl Wake {
    pub(crate) fn new(event: EventFd) -> Self {
        Self {
            event,
            stop: AtomicBool::new(false),
        }
    }

    pub(crate) fn request_stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.notify();
    }

    pub(crate) fn stop_requested(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn notify(&self) {
        // The only failure is a full counter, which means that a wake-up is pending.
        let _ = self.event.write(1);
    }
}
