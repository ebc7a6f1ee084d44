//! [`Stream`]: an answer without an end, written piece by piece from any thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;

use crate::handler::{Message, Reply, Wake};

/// How much may wait for a client that reads slowly, in bytes; the socket's own buffer comes on top.
pub const STREAM_BACKLOG: usize = 64 << 10;

/// Why a piece was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The client is too slow: as much as may wait is waiting.
    #[error("the client does not keep up")]
    Full,
    /// The client has gone, or the server has stopped.
    #[error("the stream has ended")]
    Closed,
}

/// What both ends of a stream know.
#[derive(Debug, Default)]
pub(crate) struct Backlog {
    waiting: AtomicUsize,
    closed: AtomicBool,
}

impl Backlog {
    fn add(&self, bytes: usize) -> Result<(), StreamError> {
        if self.closed.load(Ordering::Acquire) {
            return Err(StreamError::Closed);
        }
        // Several threads may send: each sees the sum of what was there and its own.
        let before = self.waiting.fetch_add(bytes, Ordering::Relaxed);
        if before + bytes > STREAM_BACKLOG {
            self.written(bytes);
            return Err(StreamError::Full);
        }
        Ok(())
    }

    /// The head waits too, whatever there is.
    pub(crate) fn add_head(&self, bytes: usize) {
        self.waiting.fetch_add(bytes, Ordering::Relaxed);
    }

    /// These bytes wait no more.
    pub(crate) fn written(&self, bytes: usize) {
        self.waiting.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Nobody takes anything any more.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }
}

/// The sending end of a stream. Dropping it ends the stream, after what was sent.
///
/// The client gets status 200, `Connection: close` and no length: the answer ends with the connection.
#[derive(Debug)]
pub struct Stream {
    connection: u64,
    replies: Sender<Reply>,
    wake: Arc<Wake>,
    backlog: Arc<Backlog>,
}

impl Stream {
    pub(crate) fn new(
        connection: u64,
        replies: Sender<Reply>,
        wake: Arc<Wake>,
        content_type: &'static str,
    ) -> Self {
        let stream = Self {
            connection,
            replies,
            wake,
            backlog: Arc::default(),
        };
        let backlog = Arc::clone(&stream.backlog);
        // A server that is gone closes nothing later, so it is closed now.
        if !stream.deliver(Message::Stream {
            content_type,
            backlog,
        }) {
            stream.backlog.close();
        }
        stream
    }

    /// Sends a piece. It never waits: while the client is too slow, pieces are refused.
    ///
    /// # Errors
    /// [`StreamError`]; nothing of the piece was sent then.
    pub fn send(&self, bytes: &[u8]) -> Result<(), StreamError> {
        self.backlog.add(bytes.len())?;
        if self.deliver(Message::Piece(bytes.to_vec())) {
            return Ok(());
        }
        self.backlog.close();
        Err(StreamError::Closed)
    }

    /// Whether nothing can be sent any more.
    pub fn is_closed(&self) -> bool {
        self.backlog.closed.load(Ordering::Acquire)
    }

    fn deliver(&self, message: Message) -> bool {
        let connection = self.connection;
        let sent = self.replies.send(Reply { connection, message }).is_ok();
        if sent {
            self.wake.notify();
        }
        sent
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.deliver(Message::End);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_backlog_refuses_until_something_is_written() {
        let backlog = Backlog::default();
        backlog.add(STREAM_BACKLOG - 1).unwrap();
        assert_eq!(backlog.add(2), Err(StreamError::Full));
        backlog.add(1).unwrap();
        backlog.written(10);
        backlog.add(10).unwrap();
        backlog.close();
        assert_eq!(backlog.add(0), Err(StreamError::Closed));
    }
}
