//! The way from the server to whoever answers requests, and back.
//!
//! [`Handler::handle`] runs on the server's thread; a [`Responder`] may go to any thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;

use vmm_sys_util::eventfd::EventFd;

use crate::message::{Request, Response};
use crate::stream::{Backlog, Stream};

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
/// is discarded; until it comes, the connection counts among the others.
#[derive(Debug)]
pub struct Responder {
    connection: u64,
    replies: Sender<Reply>,
    wake: Arc<Wake>,
    sent: bool,
}

/// An answer, or a part of one, on its way to the server's thread.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) connection: u64,
    pub(crate) message: Message,
}

/// What a connection is to write.
#[derive(Debug)]
pub(crate) enum Message {
    /// The whole answer.
    Answer(Response),
    /// The head of a stream.
    Stream {
        content_type: &'static str,
        backlog: Arc<Backlog>,
    },
    /// A piece of it.
    Piece(Vec<u8>),
    /// Its end.
    End,
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

    /// Answers the request with status 200 and a body that is sent piece by piece. The connection serves no other
    /// request after that.
    pub fn stream(mut self, content_type: &'static str) -> Stream {
        self.sent = true;
        Stream::new(
            self.connection,
            self.replies.clone(),
            Arc::clone(&self.wake),
            content_type,
        )
    }

    fn deliver(&mut self, response: Response) {
        self.sent = true;
        let reply = Reply {
            connection: self.connection,
            message: Message::Answer(response),
        };
        // A server that is gone has closed its connections: nobody waits for this answer.
        if self.replies.send(reply).is_ok() {
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

    pub(crate) fn notify(&self) {
        // The only failure is a full counter, which means that a wake-up is pending.
        let _ = self.event.write(1);
    }
}
