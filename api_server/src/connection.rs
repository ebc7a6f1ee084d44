//! One client connection: what is read, what is owed, when it ends.
//!
//! ```text
//!             request            answer due
//! Reading ──────────────► Handling ────────► Writing ──► Reading       (keep-alive)
//!    │                       │                 ▲  └────► Lingering ──► closed
//!    ├── parse error, time-out, interim 100 ───┤
//!                            └─► Streaming ────┘
//! ```
//!
//! Owned by the server and driven on its thread only. All calls return at once; what to do next comes back as
//! a [`Step`].

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;

use crate::config::ServerConfig;
use crate::handler::Message;
use crate::message::{CONTINUE, Request, Response};
use crate::parser::{Parsed, RequestParser};
use crate::stream::Backlog;

/// How much one call reads, in bytes: others get their turn before a large body continues.
const PIECE: usize = 4096;

/// What the server does next for a connection.
#[derive(Debug)]
pub(crate) enum Step {
    /// Nothing until the next event.
    Wait,
    /// Hand the request over; the answer comes through [`Connection::answer`].
    Handle(Request),
    /// Drop the connection.
    Close,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Between requests or within one.
    Reading,
    /// A request is with the handler; nothing is read meanwhile.
    Handling,
    /// `output` is being written.
    Writing,
    /// What comes into `output` is written at once, until the end is sent; nothing is read meanwhile.
    Streaming,
    /// All is written and the sending side shut down; what the client sends is discarded.
    Lingering,
}

#[derive(Debug)]
pub(crate) struct Connection {
    stream: UnixStream,
    parser: RequestParser,
    output: Vec<u8>,
    /// How much of `output` is written.
    written: usize,
    phase: Phase,
    /// The client sends nothing more.
    ended: bool,
    /// Close after the answer that is due or being written.
    close: bool,
    /// Of the stream that is or was written.
    backlog: Option<Arc<Backlog>>,
    timeout: Duration,
    linger_timeout: Duration,
    deadline: Option<Instant>,
}

impl Connection {
    /// A connection on a non-blocking `stream`.
    pub(crate) fn new(stream: UnixStream, config: &ServerConfig) -> Self {
        Self {
            stream,
            parser: RequestParser::new(config.max_body),
            output: Vec::new(),
            written: 0,
            phase: Phase::Reading,
            ended: false,
            close: false,
            backlog: None,
            timeout: config.timeout,
            linger_timeout: config.linger_timeout,
            deadline: None,
        }
    }

    /// Sends an answer that nobody asked for, and closes.
    pub(crate) fn refuse(&mut self, response: &Response) -> Step {
        self.reply(response, true);
        self.advance()
    }

    /// Takes the answer to the request that the last [`Step::Handle`] gave, or a part of it.
    pub(crate) fn answer(&mut self, message: Message) -> Step {
        match (self.phase, message) {
            (Phase::Handling, Message::Answer(response)) => self.reply(&response, false),
            (
                Phase::Handling,
                Message::Stream {
                    content_type,
                    backlog,
                },
            ) => {
                self.write_next(Response::stream_head(content_type));
                backlog.add_head(self.output.len());
                self.phase = Phase::Streaming;
                self.backlog = Some(backlog);
                self.close = true;
            }
            (Phase::Streaming, Message::Piece(bytes)) => {
                self.output.drain(..self.written);
                self.written = 0;
                self.output.extend_from_slice(&bytes);
            }
            (Phase::Streaming, Message::End) => self.phase = Phase::Writing,
            _ => return Step::Wait,
        }
        self.advance()
    }

    /// The socket is ready for `events`.
    pub(crate) fn ready(&mut self, events: EventSet) -> Step {
        match self.phase {
            Phase::Reading | Phase::Lingering => self.read(),
            Phase::Writing => self.advance(),
            // The client has closed both directions: its answer could not be delivered.
            Phase::Handling | Phase::Streaming if events.intersects(EventSet::HANG_UP | EventSet::ERROR) => {
                Step::Close
            }
            Phase::Handling => Step::Wait,
            Phase::Streaming => self.advance(),
        }
    }

    /// The deadline has passed.
    pub(crate) fn expire(&mut self) -> Step {
        if self.phase != Phase::Reading {
            return Step::Close;
        }
        let message = format!(
            "The request is incomplete, and nothing more came for {:?}.",
            self.timeout
        );
        self.refuse(&Response::fault(400, &message))
    }

    /// Ends as soon as possible: `false` if that is now, `true` if an answer is still owed.
    pub(crate) fn finish(&mut self) -> bool {
        self.close = true;
        self.owes_answer()
    }

    /// Whether a request was taken whose answer is not fully written. A stream is never that.
    pub(crate) fn owes_answer(&self) -> bool {
        matches!(self.phase, Phase::Handling | Phase::Writing)
    }

    /// Whether a request is with the handler.
    pub(crate) fn is_handled(&self) -> bool {
        self.phase == Phase::Handling
    }

    /// Whether nothing is in flight: no byte of a request is here, and no answer is owed.
    pub(crate) fn is_idle(&self) -> bool {
        self.phase == Phase::Reading && self.parser.is_idle()
    }

    /// Whether no further request will be taken.
    pub(crate) fn is_leaving(&self) -> bool {
        self.close && matches!(self.phase, Phase::Writing | Phase::Lingering)
    }

    /// When [`expire`](Self::expire) is due; `None` if nothing is in flight.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// The events to wait for. Hang-up is always among them.
    pub(crate) fn interest(&self) -> EventSet {
        match self.phase {
            Phase::Reading | Phase::Lingering => EventSet::IN,
            Phase::Streaming if !self.output.is_empty() => EventSet::OUT,
            Phase::Handling | Phase::Streaming => EventSet::empty(),
            Phase::Writing => EventSet::OUT,
        }
    }

    fn read(&mut self) -> Step {
        let mut piece = [0; PIECE];
        match self.stream.read(&mut piece) {
            Ok(0) => self.ended = true,
            Ok(_) if self.phase == Phase::Lingering => return Step::Wait,
            Ok(count) => self.parser.feed(&piece[..count]),
            Err(error) if is_transient(&error) => return Step::Wait,
            Err(_) => return Step::Close,
        }
        self.advance()
    }

    /// Goes through the phases as far as the bytes at hand and the socket's room allow.
    fn advance(&mut self) -> Step {
        let step = loop {
            let step = match self.phase {
                Phase::Reading => self.next_request(),
                Phase::Handling => Some(Step::Wait),
                Phase::Writing | Phase::Streaming => self.flush(),
                Phase::Lingering if self.ended => Some(Step::Close),
                Phase::Lingering => Some(Step::Wait),
            };
            if let Some(step) = step {
                break step;
            }
        };
        self.arm_deadline();
        step
    }

    /// `None` once there is something to write.
    fn next_request(&mut self) -> Option<Step> {
        match self.parser.parse() {
            Parsed::Request { request, close } => {
                self.close = close;
                self.phase = Phase::Handling;
                return Some(Step::Handle(request));
            }
            Parsed::Continue => self.write_next(CONTINUE.to_vec()),
            Parsed::Error(error) => self.reply(&Response::fault(400, &error.to_string()), true),
            Parsed::NeedMore if !self.ended => return Some(Step::Wait),
            Parsed::NeedMore if self.parser.is_idle() => return Some(Step::Close),
            Parsed::NeedMore => {
                let message = "The client ended the connection in the middle of a request.";
                self.reply(&Response::fault(400, message), true);
            }
        }
        None
    }

    fn reply(&mut self, response: &Response, last: bool) {
        self.close |= last;
        self.write_next(response.to_bytes(self.close));
    }

    fn write_next(&mut self, bytes: Vec<u8>) {
        self.output = bytes;
        self.written = 0;
        self.phase = Phase::Writing;
    }

    /// `None` once all is written.
    fn flush(&mut self) -> Option<Step> {
        while self.written < self.output.len() {
            match self.stream.write(&self.output[self.written..]) {
                Ok(count) => {
                    self.written += count;
                    self.tell_written(count);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if is_transient(&error) => return Some(Step::Wait),
                Err(_) => return Some(Step::Close),
            }
        }
        self.output = Vec::new();
        self.written = 0;
        if self.phase == Phase::Streaming {
            return Some(Step::Wait);
        }
        if !self.close {
            self.phase = Phase::Reading;
            return None;
        }
        if self.stream.shutdown(Shutdown::Write).is_err() {
            return Some(Step::Close);
        }
        self.phase = Phase::Lingering;
        self.deadline = Instant::now().checked_add(self.linger_timeout);
        None
    }

    /// Gives the stream's sender room for as much again.
    fn tell_written(&self, count: usize) {
        if let Some(backlog) = &self.backlog {
            backlog.written(count);
        }
    }

    /// Every progress moves the deadline, except while lingering: there the client must not keep the
    /// connection.
    fn arm_deadline(&mut self) {
        self.deadline = match self.phase {
            Phase::Lingering => self.deadline,
            Phase::Handling | Phase::Streaming => None,
            Phase::Reading if self.parser.is_idle() => None,
            Phase::Reading | Phase::Writing => Instant::now().checked_add(self.timeout),
        };
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(backlog) = &self.backlog {
            backlog.close();
        }
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
