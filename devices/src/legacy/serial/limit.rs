//! [`Limited`]: the output, and the limit of its bytes. What is beyond the limit is dropped, so the guest never waits.

use std::io::{self, Write};
use std::sync::Arc;

use super::{Counters, Output, add};
use crate::rate_limiter::{BucketState, StateError, TokenBucket, load_bucket};
use crate::timer::Clock;

/// An output with or without a limit.
pub(super) struct Limited {
    out: Output,
    limit: Option<(TokenBucket, Box<dyn Clock + Send>)>,
    counters: Arc<Counters>,
}

impl Limited {
    /// Writes everything.
    pub(super) fn new(out: Output, counters: Arc<Counters>) -> Self {
        Self {
            out,
            limit: None,
            counters,
        }
    }

    /// Writes no more bytes than `bucket` has by `clock`.
    pub(super) fn set_limit(&mut self, bucket: TokenBucket, clock: Box<dyn Clock + Send>) {
        self.limit = Some((bucket, clock));
    }

    /// What is left of the limit.
    pub(super) fn save(&self) -> Option<BucketState> {
        let limit = self.limit.as_ref();
        limit.map(|(bucket, clock)| bucket.save(clock.now()))
    }

    /// Takes over what was left of the same limit; nothing changes when it is another one.
    pub(super) fn load(&mut self, state: Option<BucketState>) -> Result<(), StateError> {
        load_bucket(self.limit.as_mut().map(|(bucket, _)| bucket), state)
    }
}

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some((bucket, clock)) = &mut self.limit {
            bucket.refill(clock.now());
            if bucket.take(bytes.len() as u64).is_err() {
                add(&self.counters.bytes_dropped, bytes.len() as u64);
                return Ok(bytes.len());
            }
        }
        self.out.write(bytes).map_err(|error| match error.kind() {
            // A vCPU that waits here is wanted elsewhere; this kind would have the byte written again.
            io::ErrorKind::Interrupted => io::Error::other(error),
            _ => error,
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
