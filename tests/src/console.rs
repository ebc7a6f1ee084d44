//! What a process has written so far to one of its pipes, collected by a thread of its own so that the pipe is never
//! full, with waits for more.

use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Shown of a long output when a test fails, in bytes.
const TAIL: usize = 6000;
/// How long what was read may wait for more of it. A guest's console comes byte by byte, and to pass on each of them by
/// itself would cost two switches of threads.
const GATHER: Duration = Duration::from_millis(2);

/// A growing record of bytes; clones show the same one.
#[derive(Debug, Clone, Default)]
pub struct Console(Arc<(Mutex<Record>, Condvar)>);

#[derive(Debug, Default)]
struct Record {
    bytes: Vec<u8>,
    ended: bool,
}

impl Console {
    /// Records what `source` yields until it ends.
    pub fn record(mut source: impl Read + Send + 'static) -> Self {
        let console = Self::default();
        let writer = console.clone();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = source.read(&mut bytes) {
                writer.change(|record| record.bytes.extend_from_slice(&bytes[..count]));
                std::thread::sleep(GATHER);
            }
            writer.change(|record| record.ended = true);
        });
        console
    }

    /// Everything so far, with what is no UTF-8 replaced.
    pub fn text(&self) -> String {
        self.read(|record| String::from_utf8_lossy(&record.bytes).into_owned())
    }

    /// The number of bytes so far.
    pub fn len(&self) -> usize {
        self.read(|record| record.bytes.len())
    }

    /// True when there is nothing so far.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The last part of it.
    pub fn tail(&self) -> String {
        self.read(|record| {
            let start = record.bytes.len().saturating_sub(TAIL);
            String::from_utf8_lossy(&record.bytes[start..]).into_owned()
        })
    }

    /// Waits for a line that begins at the byte `*from`; takes it without its end, and moves `from` behind it. `None`
    /// when there is none before the deadline, or never will be.
    pub fn next_line(&self, from: &mut usize, deadline: Instant) -> Option<String> {
        let line = self.wait(deadline, |bytes| {
            let rest = bytes.get(*from..).unwrap_or_default();
            rest.iter()
                .position(|byte| *byte == b'\n')
                .map(|end| rest[..end].to_vec())
        })?;
        *from += line.len() + 1;
        Some(String::from_utf8_lossy(&line).trim_matches('\r').to_owned())
    }

    /// Waits until the text occurs anywhere; false when it does not before the deadline, or never will.
    pub fn wait_for(&self, text: &str, deadline: Instant) -> bool {
        let found = |bytes: &[u8]| {
            bytes
                .windows(text.len())
                .any(|part| part == text.as_bytes())
                .then_some(())
        };
        self.wait(deadline, found).is_some()
    }

    /// Waits for the end of the source; false when it does not come before the deadline.
    pub fn wait_end(&self, deadline: Instant) -> bool {
        self.wait::<()>(deadline, |_| None);
        self.read(|record| record.ended)
    }

    /// Waits until `find` finds something in the bytes so far.
    fn wait<T>(&self, deadline: Instant, find: impl Fn(&[u8]) -> Option<T>) -> Option<T> {
        let (lock, changed) = &*self.0;
        let mut record = lock.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(found) = find(&record.bytes) {
                return Some(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if record.ended || left.is_zero() {
                return None;
            }
            record = changed
                .wait_timeout(record, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn read<T>(&self, read: impl FnOnce(&Record) -> T) -> T {
        read(&self.0.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn change(&self, change: impl FnOnce(&mut Record)) {
        change(&mut self.0.0.lock().unwrap_or_else(PoisonError::into_inner));
        self.0.1.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(100)
    }

    fn later() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn takes_line_after_line_without_carriage_returns() {
        let console = Console::record(&b"one\r\n\ntwo\nrest"[..]);
        let mut from = 0;
        let lines: Vec<_> = std::iter::from_fn(|| console.next_line(&mut from, later())).collect();
        assert_eq!(lines, ["one", "", "two"]);
    }

    #[test]
    fn waits_for_a_line_that_comes_in_pieces() {
        let (mut writer, reader) = UnixStream::pair().unwrap();
        let console = Console::record(reader);
        let sender = std::thread::spawn(move || {
            writer.write_all(b"he").unwrap();
            std::thread::sleep(Duration::from_millis(20));
            writer.write_all(b"llo\n").unwrap();
        });
        assert_eq!(console.next_line(&mut 0, later()).as_deref(), Some("hello"));
        sender.join().unwrap();
    }

    #[test]
    fn gives_up_at_the_deadline() {
        let (_writer, reader) = UnixStream::pair().unwrap();
        let console = Console::record(reader);
        assert_eq!(console.next_line(&mut 0, soon()), None);
        assert!(!console.wait_end(soon()));
    }

    #[test]
    fn does_not_wait_for_what_can_no_longer_come() {
        let console = Console::record(&b"end"[..]);
        assert!(!console.wait_for("more", Instant::now() + Duration::from_secs(3600)));
        assert!(console.wait_for("nd", later()));
    }
}
