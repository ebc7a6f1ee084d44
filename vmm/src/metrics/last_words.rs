//! The last line of metrics of a process that a fault or a panic ends.
//!
//! Where such a process stands nothing can be collected: no memory may be taken, and the control thread may be the one
//! that fell. So the line is made when metrics get their path, with all counters at zero, and the way of death is a digit
//! in it. What was counted since the line before is lost.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use serde_json::Value;

/// Ways to die that a line can tell: group and name.
const DEATHS: [(&str, &str); 8] = [
    ("seccomp", "num_faults"),
    ("signals", "sigbus"),
    ("signals", "sighup"),
    ("signals", "sigill"),
    ("signals", "sigsegv"),
    ("signals", "sigxcpu"),
    ("signals", "sigxfsz"),
    ("vmm", "panic_count"),
];
const TIME: &str = "utc_timestamp_ms";
const TIME_DIGITS: usize = 13;

static PREPARED: OnceLock<LastWords> = OnceLock::new();

struct LastWords {
    file: OwnedFd,
    /// Shared with nobody but whoever dies.
    line: Box<[AtomicU8]>,
    /// Where the digit of each death is.
    places: [Option<usize>; DEATHS.len()],
    time: Option<usize>,
}

/// Makes the line, of which `blank` has all groups, for this file. The first call counts.
pub fn prepare(file: &File, mut blank: Value) -> io::Result<()> {
    // It has as many digits as the real one will have.
    blank[TIME] = 1_000_000_000_000u64.into();
    let words = LastWords::new(file, &blank)?;
    // Metrics have one path.
    let _ = PREPARED.set(words);
    Ok(())
}

/// Writes the line, if there is one. Async-signal-safe.
pub fn write(death: &str) {
    if let Some(words) = PREPARED.get() {
        words.write(death);
    }
}

impl LastWords {
    fn new(file: &File, blank: &Value) -> io::Result<Self> {
        let line = format!("{blank}\n");
        let place = |(group, name): (&str, &str)| {
            let group = line.find(&format!("\"{group}\":{{"))?;
            let name = format!("\"{name}\":");
            Some(group + line[group..].find(&name)? + name.len())
        };
        let time = format!("\"{TIME}\":");
        Ok(Self {
            file: file.try_clone()?.into(),
            places: DEATHS.map(place),
            time: line.find(&time).map(|at| at + time.len()),
            line: line.bytes().map(AtomicU8::new).collect(),
        })
    }

    fn write(&self, death: &str) {
        let set = |at: usize, digit: u8| {
            if let Some(byte) = self.line.get(at) {
                byte.store(b'0' + digit, Ordering::Relaxed);
            }
        };
        let index = DEATHS.iter().position(|(_, name)| *name == death);
        if let Some(at) = index.and_then(|index| self.places[index]) {
            set(at, 1);
        }
        if let Some(start) = self.time {
            let mut left = crate::clock::unix_us() / 1000;
            for at in (start..start + TIME_DIGITS).rev() {
                set(at, u8::try_from(left % 10).expect("a digit"));
                left /= 10;
            }
        }
        // SAFETY: needed because only async-signal-safe calls are allowed here. The pointer is to as many bytes that
        // live for ever; an `AtomicU8` has the layout of a byte, and nobody else writes them any more.
        unsafe { libc::write(self.file.as_raw_fd(), self.line.as_ptr().cast(), self.line.len()) };
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    #[test]
    fn tells_the_death_and_its_time_in_a_whole_line() {
        let blank = json!({
            "properties": {"signals": "\"signals\":{\"sigsegv\":0"},
            "signals": {"sigbus": 0, "sigsegv": 0},
            "utc_timestamp_ms": 1_000_000_000_000u64,
            "vmm": {"panic_count": 0},
        });
        let file = TempFile::new().unwrap();
        let before = crate::clock::unix_us() / 1000;

        LastWords::new(file.as_file(), &blank).unwrap().write("sigsegv");

        let text = std::fs::read_to_string(file.as_path()).unwrap();
        let line: Value = serde_json::from_str(text.strip_suffix('\n').unwrap()).unwrap();
        assert_eq!(line["signals"], json!({"sigbus": 0, "sigsegv": 1}));
        assert_eq!(line["properties"], blank["properties"]);
        assert_eq!(line["vmm"]["panic_count"], 0);
        assert!(line["utc_timestamp_ms"].as_u64() >= Some(before), "{line}");
    }
}
