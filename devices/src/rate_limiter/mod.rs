//! Rate limits: token buckets for bytes and for operations.
//!
//! [`RateLimiterConfig`] is what the user writes, and [`RateLimiter`] the limits at work. Both are plain data: moments
//! are given, and nothing here waits. A virtio device has its limiter in a [`Throttle`](crate::virtio::Throttle),
//! which reads the clock and sets the timer.

mod bucket;
mod config;
mod shared;
#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub use bucket::{State as BucketState, TokenBucket};
pub use config::{RateLimiterConfig, TokenBucketConfig, serialize_effective};
pub use shared::{SharedLimiter, UserId};

/// Limits of bytes and of operations. The default limits nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RateLimiter {
    bandwidth: Option<TokenBucket>,
    ops: Option<TokenBucket>,
}

/// What a snapshot keeps of a limiter, beside its config: so a restored device has no new burst.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    bandwidth: Option<BucketState>,
    ops: Option<BucketState>,
}

/// A saved state does not belong to the limits of this config.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the rate limiter is not that of the config: {0}")]
pub struct StateError(&'static str);

impl RateLimiter {
    /// Full buckets.
    pub fn new(limits: &RateLimiterConfig) -> Self {
        Self {
            bandwidth: limits.bandwidth.as_ref().and_then(TokenBucket::new),
            ops: limits.ops.as_ref().and_then(TokenBucket::new),
        }
    }

    /// Whether anything is limited.
    #[inline]
    pub fn limits_something(&self) -> bool {
        self.bandwidth.is_some() || self.ops.is_some()
    }

    /// Puts in the tokens that have come until `now`; the moments given never go back.
    pub fn refill(&mut self, now: Instant) {
        for bucket in [&mut self.bandwidth, &mut self.ops].into_iter().flatten() {
            bucket.refill(now);
        }
    }

    /// Takes the tokens of one operation that moves `bytes`, out of both buckets or none. An error is how long after
    /// the last refill they will be there.
    pub fn take(&mut self, bytes: u64) -> Result<(), Duration> {
        let mut costs = [(&mut self.bandwidth, bytes), (&mut self.ops, 1)];
        let waits = costs
            .iter()
            .filter_map(|(bucket, cost)| bucket.as_ref().map(|bucket| bucket.wait_for(*cost)));
        match waits.max() {
            None | Some(Duration::ZERO) => {}
            Some(wait) => return Err(wait),
        }
        for (bucket, cost) in &mut costs {
            if let Some(bucket) = bucket {
                bucket.withdraw(*cost);
            }
        }
        Ok(())
    }

    /// Changes the limits: a bucket that `patch` leaves out stays as it is, a disabled one is removed, another one
    /// takes its place and is full.
    pub fn patch(&mut self, patch: &RateLimiterConfig) {
        if let Some(config) = &patch.bandwidth {
            self.bandwidth = TokenBucket::new(config);
        }
        if let Some(config) = &patch.ops {
            self.ops = TokenBucket::new(config);
        }
    }

    /// What is left at `now`.
    pub fn save(&self, now: Instant) -> State {
        let save = |bucket: &Option<TokenBucket>| bucket.as_ref().map(|bucket| bucket.save(now));
        State {
            bandwidth: save(&self.bandwidth),
            ops: save(&self.ops),
        }
    }

    /// Takes over what a limiter of the same config had left; nothing changes when it fails.
    pub fn load(&mut self, state: State) -> Result<(), StateError> {
        let mut loaded = self.clone();
        load_bucket(loaded.bandwidth.as_mut(), state.bandwidth)?;
        load_bucket(loaded.ops.as_mut(), state.ops)?;
        *self = loaded;
        Ok(())
    }
}

/// Takes over what a bucket had left, if there is one, then as now.
pub fn load_bucket(bucket: Option<&mut TokenBucket>, state: Option<BucketState>) -> Result<(), StateError> {
    match (bucket, state) {
        (Some(bucket), Some(state)) => bucket.load(state),
        (None, None) => Ok(()),
        _ => Err(StateError("not the same buckets exist")),
    }
}
