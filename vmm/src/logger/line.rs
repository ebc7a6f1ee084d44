//! [`Line`]: the text of a record, put together without taking memory as long as it is short.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Longer lines, such as those of large API requests, take memory.
const INLINE: usize = 512;

/// A line while it is being written.
pub(super) struct Line {
    short: [u8; INLINE],
    len: usize,
    /// The whole text, once it does not fit into `short`.
    long: Vec<u8>,
}

impl Line {
    pub(super) fn new() -> Self {
        Self {
            short: [0; INLINE],
            len: 0,
            long: Vec::new(),
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        if self.long.is_empty() {
            &self.short[..self.len]
        } else {
            &self.long
        }
    }

    fn push(&mut self, bytes: &[u8]) {
        if self.long.is_empty()
            && let Some(room) = self.short.get_mut(self.len..self.len + bytes.len())
        {
            room.copy_from_slice(bytes);
            self.len += bytes.len();
            return;
        }
        if self.long.is_empty() {
            self.long.extend_from_slice(&self.short[..self.len]);
        }
        self.long.extend_from_slice(bytes);
    }

    /// Ends the line.
    pub(super) fn end(&mut self) {
        self.push(b"\n");
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.push(text.as_bytes());
        Ok(())
    }
}

/// Writes text with its control characters escaped: a message is one line, and no terminal obeys it.
pub(super) struct Escaped<'a>(pub(super) &'a mut Line);

impl fmt::Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut rest = text;
        while let Some(at) = rest.find(|c: char| c.is_control() && c != '\t') {
            let (plain, control) = rest.split_at(at);
            self.0.write_str(plain)?;
            let mut chars = control.chars();
            let escaped = chars.next().map(char::escape_default);
            escaped.map_or(Ok(()), |escaped| write!(self.0, "{escaped}"))?;
            rest = chars.as_str();
        }
        self.0.write_str(rest)
    }
}

/// The local time with nanoseconds.
pub(super) struct Timestamp(Duration);

impl Timestamp {
    pub(super) fn now() -> Self {
        Self(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = libc::time_t::try_from(self.0.as_secs()).unwrap_or(0);
        // SAFETY: needed because the standard library knows no time zones. Both pointers are to live values of the
        // right type, and a zeroed `tm` is a valid one.
        let tm = unsafe {
            let mut tm = std::mem::zeroed();
            libc::localtime_r(&seconds, &mut tm);
            tm
        };
        write!(
            f,
            "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:09}",
            tm.tm_year + 1900,
            tm.tm_mon + 1,
            tm.tm_mday,
            tm.tm_hour,
            tm.tm_min,
            tm.tm_sec,
            self.0.subsec_nanos()
        )
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;

    #[test]
    fn keeps_short_and_long_text() {
        let mut line = Line::new();
        line.push(&[b'a'; INLINE - 1]);
        line.end();
        assert!(line.long.is_empty());
        assert_eq!(line.bytes().len(), INLINE);
        line.push(b"bc");
        assert_eq!(line.bytes().len(), INLINE + 2);
        assert!(line.bytes().ends_with(b"a\nbc"));
        assert!(line.bytes().starts_with(b"aaa"));
    }

    #[test]
    fn escapes_what_would_end_the_line_or_move_a_cursor() {
        let mut line = Line::new();
        write!(Escaped(&mut line), "a\nb\r\x1b[2J\té\u{9b}").unwrap();
        assert_eq!(line.bytes(), "a\\nb\\r\\u{1b}[2J\té\\u{9b}".as_bytes());
    }
}
