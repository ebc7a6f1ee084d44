//! [`Tokens`]: the session tokens that have been given out.
//!
//! A token is 128 random bits of the host, so it cannot be made up, and it says nothing. The table is bounded: when it is
//! full, the token with the least time left is forgotten, and its owner has to ask for a new one, as at its end.

use std::collections::HashMap;
use std::fmt::Write;
use std::io;
use std::time::Duration;

/// The longest life of a token, in seconds.
pub(super) const MAX_TTL: u32 = 21_600;
/// The most tokens at a time: one a second for more than two hours, in about 350 KiB.
const MAX_TOKENS: usize = 8192;
/// Bytes of a token; its text has two digits for each.
const LEN: usize = 16;

/// Tokens and when each ends, by [`super::Mmds::age`]. The map's keyed hash keeps the time of a look-up from telling how
/// much of a guess was right.
#[derive(Debug, Default)]
pub(super) struct Tokens(HashMap<[u8; LEN], Duration>);

impl Tokens {
    /// A new token that is valid for `ttl` seconds.
    pub(super) fn issue(&mut self, ttl: u32, now: Duration) -> io::Result<String> {
        let mut token = [0; LEN];
        crate::random::fill(&mut token)?;
        if self.0.len() >= MAX_TOKENS {
            self.make_room(now);
        }
        self.0.insert(token, now + Duration::from_secs(ttl.into()));
        Ok(token
            .iter()
            .fold(String::with_capacity(2 * LEN), |mut text, byte| {
                write!(text, "{byte:02x}").expect("writing to a String does not fail");
                text
            }))
    }

    /// Whether it was given out and has not ended.
    pub(super) fn is_valid(&self, token: &str, now: Duration) -> bool {
        let end = parse(token).and_then(|token| self.0.get(&token));
        end.is_some_and(|end| now < *end)
    }

    fn make_room(&mut self, now: Duration) {
        self.0.retain(|_, end| now < *end);
        if self.0.len() >= MAX_TOKENS
            && let Some(next) = self
                .0
                .iter()
                .min_by_key(|(_, end)| **end)
                .map(|(token, _)| *token)
        {
            self.0.remove(&next);
        }
    }
}

fn parse(text: &str) -> Option<[u8; LEN]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * LEN {
        return None;
    }
    let mut token = [0; LEN];
    for (byte, pair) in token.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(token)
}

/// The value of a digit as [`Tokens::issue`] writes it.
fn digit(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_token_is_valid_until_its_time_is_over() {
        let mut tokens = Tokens::default();
        let token = tokens.issue(10, at(5)).unwrap();
        assert!(tokens.is_valid(&token, at(5)) && tokens.is_valid(&token, at(14)));
        assert!(!tokens.is_valid(&token, at(15)));
    }

    #[test]
    fn a_token_lives_its_whole_seconds_also_when_it_was_issued_within_one() {
        let mut tokens = Tokens::default();
        let start = Duration::from_millis(5900);
        let token = tokens.issue(1, start).unwrap();
        let after = |millis| start + Duration::from_millis(millis);
        assert!(tokens.is_valid(&token, after(999)) && !tokens.is_valid(&token, after(1000)));
    }

    #[test]
    fn tokens_are_different_and_have_32_digits() {
        let mut tokens = Tokens::default();
        let (one, two) = (tokens.issue(10, at(0)).unwrap(), tokens.issue(10, at(0)).unwrap());
        assert_ne!(one, two);
        assert!(one.len() == 32 && one.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f')));
        assert!(tokens.is_valid(&one, at(1)) && tokens.is_valid(&two, at(1)));
    }

    #[test]
    fn what_was_not_given_out_is_not_valid() {
        let mut tokens = Tokens::default();
        let token = tokens.issue(10, at(0)).unwrap();
        let upper = format!("A{}", &token[1..]);
        let longer = format!("{token}0");
        for other in ["", "é", "0", &"0".repeat(32), &token[1..], &longer, &upper] {
            assert!(!tokens.is_valid(other, at(0)), "{other}");
        }
    }

    #[test]
    fn a_full_table_forgets_ended_tokens_first() {
        let mut tokens = Tokens::default();
        let live: Vec<_> = (1..MAX_TOKENS)
            .map(|_| tokens.issue(MAX_TTL, at(0)).unwrap())
            .collect();
        tokens.issue(1, at(0)).unwrap();
        let new = tokens.issue(10, at(2)).unwrap();
        assert!(
            live.iter()
                .chain([&new])
                .all(|token| tokens.is_valid(token, at(2)))
        );
        assert_eq!(tokens.0.len(), MAX_TOKENS);
    }

    #[test]
    fn a_full_table_of_live_tokens_forgets_the_one_that_ends_next() {
        let mut tokens = Tokens::default();
        let next = tokens.issue(100, at(0)).unwrap();
        let live: Vec<_> = (1..MAX_TOKENS)
            .map(|_| tokens.issue(200, at(0)).unwrap())
            .collect();
        let new = tokens.issue(50, at(0)).unwrap();
        assert!(!tokens.is_valid(&next, at(0)) && tokens.is_valid(&new, at(0)));
        assert!(live.iter().all(|token| tokens.is_valid(token, at(0))));
        assert_eq!(tokens.0.len(), MAX_TOKENS);
    }
}
