//! [`TokenBucket`]: tokens that come at a steady rate and are kept up to a limit.
//!
//! The bucket counts the tokens it lacks, and beside them the part of a token that has come already, as a fraction
//! whose denominator is the refill time. So no time is ever lost by rounding, however often it is asked.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{StateError, TokenBucketConfig};

const NANOS_PER_MILLI: u128 = 1_000_000;

/// A bucket that starts full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenBucket {
    size: u64,
    /// Nanoseconds in which an empty bucket fills up.
    refill_time: u128,
    /// Tokens that are left of the one-time burst. They are spent before those of the bucket.
    burst: u64,
    /// Tokens that the bucket lacks; above `size` when a request was larger than the bucket.
    missing: u64,
    /// Parts of the next token that have come; a token has `refill_time` of them.
    fraction: u128,
    /// Tokens that came up to this moment are in the bucket; none before the first look at a clock.
    refilled: Option<Instant>,
}

/// What a snapshot keeps of a bucket, beside its config.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Tokens that are left of the one-time burst.
    burst: u64,
    /// Tokens that the bucket lacks.
    missing: u64,
}

impl TokenBucket {
    /// A full bucket; none when the config disables it.
    pub fn new(config: &TokenBucketConfig) -> Option<Self> {
        config.is_effective().then(|| Self {
            size: config.size,
            refill_time: u128::from(config.refill_time) * NANOS_PER_MILLI,
            burst: config.one_time_burst.unwrap_or(0),
            missing: 0,
            fraction: 0,
            refilled: None,
        })
    }

    /// Puts in the tokens that have come until `now`; the moments given never go back.
    pub fn refill(&mut self, now: Instant) {
        let last = self.refilled.unwrap_or(now);
        let passed = now.saturating_duration_since(last).as_nanos();
        self.refilled = Some(last.max(now));
        if self.missing == 0 || passed == 0 {
            return;
        }
        // Only centuries overflow, and they fill every bucket.
        let parts = passed.checked_mul(u128::from(self.size));
        let parts = parts.and_then(|parts| parts.checked_add(self.fraction));
        let tokens = parts.map_or(u128::MAX, |parts| parts / self.refill_time);
        match u64::try_from(tokens) {
            Ok(tokens) if tokens < self.missing => {
                self.missing -= tokens;
                self.fraction = parts.expect("the quotient is in range") % self.refill_time;
            }
            _ => (self.missing, self.fraction) = (0, 0),
        }
    }

    /// Takes `tokens` out, or says how long it takes until they are there.
    ///
    /// A request for more than the bucket holds gets what a full bucket has and owes the rest: nothing goes until that
    /// has come.
    pub fn take(&mut self, tokens: u64) -> Result<(), Duration> {
        match self.wait_for(tokens) {
            Duration::ZERO => {
                self.withdraw(tokens);
                Ok(())
            }
            wait => Err(wait),
        }
    }

    /// How long after the last refill `tokens` can be taken, in whole nanoseconds rounded up; zero when they are there.
    pub(super) fn wait_for(&self, tokens: u64) -> Duration {
        let needed = u128::from(tokens.min(self.size)) + u128::from(self.missing);
        let short = needed.saturating_sub(u128::from(self.size) + u128::from(self.burst));
        if tokens == 0 || short == 0 {
            return Duration::ZERO;
        }
        let parts = short.saturating_mul(self.refill_time) - self.fraction;
        let nanos = parts.div_ceil(u128::from(self.size));
        // The end of this range is 584 years away.
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Takes out `tokens` that need no waiting.
    pub(super) fn withdraw(&mut self, tokens: u64) {
        let from_burst = tokens.min(self.burst);
        self.burst -= from_burst;
        // No overflow: either all fits into the bucket, or burst and bucket together held at least its size.
        self.missing += tokens - from_burst;
    }

    /// What is left at `now`.
    pub fn save(&self, now: Instant) -> State {
        let mut bucket = *self;
        bucket.refill(now);
        State {
            burst: bucket.burst,
            missing: bucket.missing,
        }
    }

    /// Takes over what a bucket of the same config had left.
    pub fn load(&mut self, state: State) -> Result<(), StateError> {
        if state.burst > self.burst {
            return Err(StateError("more of the one-time burst is left than there was"));
        }
        (self.burst, self.missing, self.fraction) = (state.burst, state.missing, 0);
        Ok(())
    }
}
