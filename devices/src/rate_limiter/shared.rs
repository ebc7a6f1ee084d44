//! [`SharedLimiter`]: one limiter for several users, who are served in the order in which they came to wait.
//!
//! Who finds too few tokens is given a turn: the moment at which they will be there when all who wait already have had
//! theirs. They are taken out as of that moment, by whoever comes next. So a user that comes late to its turn loses
//! nothing, and one that never comes keeps nobody waiting. A single user has no turns.

use std::time::Instant;

use super::{RateLimiter, RateLimiterConfig, State, StateError};

/// Names a user of a limiter.
pub type UserId = u32;

/// A limiter with its users.
#[derive(Debug)]
pub struct SharedLimiter {
    limiter: RateLimiter,
    users: u32,
    /// At most one of each user; those to come are in order.
    turns: Vec<Turn>,
    /// The last refill. Moments that come from several threads can be out of order.
    moment: Option<Instant>,
}

#[derive(Debug, Clone, Copy)]
struct Turn {
    user: UserId,
    bytes: u64,
    due: Instant,
    /// It has come, and its tokens are out of the buckets.
    paid: bool,
}

impl SharedLimiter {
    /// The first user of a limiter.
    pub const FIRST: UserId = 0;

    /// A limiter with its first user.
    pub fn new(limiter: RateLimiter) -> Self {
        Self {
            limiter,
            users: 1,
            turns: Vec::new(),
            moment: None,
        }
    }

    /// One more user.
    pub fn join(&mut self) -> UserId {
        self.users += 1;
        self.users - 1
    }

    /// Whether anything is limited.
    pub fn limits_something(&self) -> bool {
        self.limiter.limits_something()
    }

    /// Puts in the tokens that have come until `now`, and takes out those of the turns that have come.
    pub fn refill(&mut self, now: Instant) {
        for turn in self.turns.iter_mut().filter(|turn| !turn.paid && turn.due <= now) {
            self.limiter.refill(turn.due);
            turn.paid = self.limiter.take(turn.bytes).is_ok();
        }
        self.limiter.refill(now);
        self.moment = self.moment.max(Some(now));
    }

    /// Takes the tokens of one operation that moves `bytes`, after a refill at `now`. An error is when to ask for them
    /// again.
    pub fn take(&mut self, user: UserId, bytes: u64, now: Instant) -> Result<(), Instant> {
        if self.users == 1 {
            return self.limiter.take(bytes).map_err(|wait| now + wait);
        }
        if let Some(index) = self.turns.iter().position(|turn| turn.user == user) {
            let turn = self.turns[index];
            if turn.bytes == bytes && !turn.paid {
                return Err(turn.due);
            }
            self.turns.remove(index);
            // Otherwise the guest has put something else in the place of what waited.
            if turn.bytes == bytes {
                return Ok(());
            }
        }
        let mut due = self.moment.map_or(now, |moment| moment.max(now));
        let mut waiting = self.turns.iter().filter(|turn| !turn.paid).peekable();
        let taken = if waiting.peek().is_none() {
            self.limiter.take(bytes)
        } else {
            let mut ahead = self.limiter.clone();
            for turn in waiting {
                due = turn.due;
                ahead.refill(due);
                // It is there at that moment.
                let _ = ahead.take(turn.bytes);
            }
            Err(ahead.take(bytes).err().unwrap_or_default())
        };
        taken.map_err(|wait| {
            due += wait;
            self.turns.push(Turn {
                user,
                bytes,
                due,
                paid: false,
            });
            due
        })
    }

    /// A user waits no more.
    pub fn leave(&mut self, user: UserId) {
        self.turns.retain(|turn| turn.user != user);
    }

    /// Changes the limits. Nobody has a turn then, and all may ask again.
    pub fn patch(&mut self, patch: &RateLimiterConfig) {
        self.turns.clear();
        self.limiter.patch(patch);
    }

    /// What is left at `now`.
    pub fn save(&self, now: Instant) -> State {
        self.limiter.save(now)
    }

    /// Takes over what a limiter of the same config had left; nothing changes when it fails.
    pub fn load(&mut self, state: State) -> Result<(), StateError> {
        self.limiter.load(state)
    }
}
