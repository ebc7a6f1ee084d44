//! The request parser: bytes in, in pieces of any size; whole requests out.
//!
//! Pure: no I/O and no clock. A connection owns one on the server's thread and feeds it from the socket; the
//! fuzz target feeds it directly. How the bytes are cut into pieces makes no difference to the requests that
//! come out.

use crate::error::ParseError;
use crate::head::Head;
use crate::message::Request;

/// The limit on request line and headers together, in bytes.
pub const MAX_HEAD: usize = 8192;

/// The limit on header lines in one request.
pub const MAX_HEADERS: usize = 64;

/// What the bytes so far amount to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// No whole request yet.
    NeedMore,
    /// The client announced a body and waits for an interim answer before sending it. Said once per request,
    /// and only if the body is not here yet.
    Continue,
    /// A whole request.
    Request {
        /// The request.
        request: Request,
        /// The client asked for the connection to be closed after the answer.
        close: bool,
    },
    /// The bytes are no request. Where a next one would start is unknown, so the parser stays in this state.
    Error(ParseError),
}

/// Turns a client's byte stream into requests.
///
/// [`feed`](Self::feed) it, then call [`parse`](Self::parse) until it says [`Parsed::NeedMore`] or
/// [`Parsed::Error`]. Fed only after `NeedMore`, it holds at most one request and one piece.
#[derive(Debug)]
pub struct RequestParser {
    buffer: Vec<u8>,
    /// How many bytes at the start of `buffer` have been looked at as part of a head.
    seen: usize,
    /// The head whose body is awaited.
    head: Option<Head>,
    error: Option<ParseError>,
    max_body: usize,
}

impl RequestParser {
    /// A parser that refuses bodies of more than `max_body` bytes.
    pub fn new(max_body: usize) -> Self {
        Self {
            buffer: Vec::new(),
            seen: 0,
            head: None,
            error: None,
            max_body,
        }
    }

    /// Takes the next bytes of the stream. After an error they are ignored.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.error.is_none() {
            self.buffer.extend_from_slice(bytes);
        }
    }

    /// Whether the stream stands between two requests.
    pub fn is_idle(&self) -> bool {
        self.buffer.is_empty() && self.head.is_none()
    }

    /// The next request, if its bytes are here.
    pub fn parse(&mut self) -> Parsed {
        if let Some(error) = &self.error {
            return Parsed::Error(error.clone());
        }
        if self.head.is_none() {
            match self.take_head() {
                Ok(head) => self.head = head,
                Err(error) => return self.fail(error),
            }
        }
        self.take_request()
    }

    fn fail(&mut self, error: ParseError) -> Parsed {
        self.buffer = Vec::new();
        Parsed::Error(self.error.insert(error).clone())
    }

    fn take_head(&mut self) -> Result<Option<Head>, ParseError> {
        self.skip_empty_lines();
        let window = &self.buffer[..self.buffer.len().min(MAX_HEAD)];
        let seen = std::mem::replace(&mut self.seen, window.len());
        // Looking at whole lines only bounds the work on a head that arrives byte by byte, and makes what is
        // found independent of the pieces.
        let lines = match window[seen..].iter().rposition(|&byte| byte == b'\n') {
            _ if window.len() == MAX_HEAD => window,
            Some(line_feed) => &window[..=seen + line_feed],
            None => return Ok(None),
        };
        match Head::parse(lines, self.max_body)? {
            Some((head, length)) => {
                self.buffer.drain(..length);
                self.seen = 0;
                Ok(Some(head))
            }
            None if lines.len() == MAX_HEAD => Err(ParseError::HeadTooLarge { limit: MAX_HEAD }),
            None => Ok(None),
        }
    }

    /// RFC 9112 §2.2: empty lines before a request line are ignored.
    fn skip_empty_lines(&mut self) {
        let lines = self
            .buffer
            .chunks_exact(2)
            .take_while(|line| line == b"\r\n")
            .count();
        if lines > 0 {
            self.buffer.drain(..lines * 2);
            self.seen = 0;
        }
    }

    fn take_request(&mut self) -> Parsed {
        match self.head.take_if(|head| head.content_length <= self.buffer.len()) {
            Some(head) => {
                let rest = self.buffer.split_off(head.content_length);
                let body = std::mem::replace(&mut self.buffer, rest);
                let body = Some(body).filter(|body| !body.is_empty());
                let request = Request {
                    method: head.method,
                    path: head.path,
                    body,
                };
                Parsed::Request {
                    request,
                    close: head.close,
                }
            }
            None if self
                .head
                .as_mut()
                .is_some_and(|head| std::mem::take(&mut head.expects_continue)) =>
            {
                Parsed::Continue
            }
            None => Parsed::NeedMore,
        }
    }
}

#[cfg(test)]
mod tests;
