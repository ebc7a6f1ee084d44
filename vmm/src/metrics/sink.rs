//! [`MetricsSink`]: the file or FIFO that lines of metrics are appended to.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use serde_json::{Map, Value};

use super::{is_absolute, last_words};

/// The sink of metrics lines. A line holds what was counted since the line before.
#[derive(Default)]
pub struct MetricsSink {
    file: Option<File>,
    /// What every line begins with, so to speak: the names of the instance.
    tags: Map<String, Value>,
    last: Value,
    /// A line was written in part, so the next one must not be taken for its end.
    torn: bool,
    /// Lines that found no room: nobody reads the FIFO. The next line tells what they would have told.
    pub missed: u64,
    /// Lines that the host refused for another reason.
    pub fails: u64,
}

impl MetricsSink {
    /// True once a path was set.
    pub fn is_set(&self) -> bool {
        self.file.is_some()
    }

    /// Appends lines with `tags` to `path` from now on; it is created when missing, and never truncated. `now` has the
    /// names that lines will have.
    pub fn open(&mut self, path: &Path, tags: Map<String, Value>, now: Map<String, Value>) -> io::Result<()> {
        let file = crate::logger::open_sink(path)?;
        let now = tagged(now, &tags);
        last_words::prepare(&file, difference("", &now, &now))?;
        (self.file, self.tags) = (Some(file), tags);
        Ok(())
    }

    /// What comes under the name of this group counts from zero.
    pub fn begin_group(&mut self, name: &str) {
        if let Value::Object(last) = &mut self.last {
            last.remove(name);
        }
    }

    /// Writes a line with what `now` counts since the line before. Nothing happens without a path.
    pub fn write(&mut self, now: Map<String, Value>) -> io::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let now = tagged(now, &self.tags);
        let line = difference("", &now, &self.last);
        let start = if self.torn { "\n" } else { "" };
        let text = format!("{start}{line}\n");
        match write_once(file, text.as_bytes()) {
            Ok(written) if written == text.len() => {
                self.torn = false;
                self.last = now;
                return Ok(());
            }
            Ok(written) => {
                self.torn |= written > 0;
                self.missed += 1;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.missed += 1,
            Err(error) => {
                self.fails += 1;
                return Err(error);
            }
        }
        Err(io::Error::new(
            io::ErrorKind::WouldBlock,
            "there is no room for a line of metrics",
        ))
    }
}

fn tagged(mut line: Map<String, Value>, tags: &Map<String, Value>) -> Value {
    line.extend(tags.clone());
    line.into()
}

/// One write, so that lines of several writers stay whole where the host can do it.
fn write_once(file: &mut File, bytes: &[u8]) -> io::Result<usize> {
    loop {
        match file.write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// `now` less `before`, number by number.
fn difference(group: &str, now: &Value, before: &Value) -> Value {
    match now {
        Value::Object(map) => {
            let lessened = map.iter().map(|(key, value)| {
                let absolute = key == "utc_timestamp_ms" || is_absolute(group, key);
                let group = if group.is_empty() { key } else { group };
                let value = if absolute {
                    value.clone()
                } else {
                    difference(group, value, &before[key])
                };
                (key.clone(), value)
            });
            Value::Object(lessened.collect())
        }
        Value::Number(number) => match (number.as_u64(), before.as_u64()) {
            (Some(now), Some(before)) => Value::from(now.saturating_sub(before)),
            _ => now.clone(),
        },
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use serde_json::json;
    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    fn line(value: Value) -> Map<String, Value> {
        value.as_object().cloned().unwrap()
    }

    fn opened(path: &Path) -> MetricsSink {
        let mut sink = MetricsSink::default();
        sink.open(path, line(json!({"id": "a"})), Map::new()).unwrap();
        sink
    }

    #[test]
    fn a_line_holds_what_was_counted_since_the_last() {
        let before =
            json!({"block": {"read_count": 3, "read_agg": {"max_us": 9, "sum_us": 10}}, "new": {"x": 0}});
        let now =
            json!({"block": {"read_count": 5, "read_agg": {"max_us": 9, "sum_us": 14}}, "new": {"x": 2}});
        let line = difference("", &now, &before);
        assert_eq!(
            line,
            json!({"block": {"read_count": 2, "read_agg": {"max_us": 9, "sum_us": 4}}, "new": {"x": 2}})
        );
    }

    #[test]
    fn durations_names_and_the_time_are_no_counts() {
        let line = json!({
            "id": "vm", "properties": {"rack": "7"}, "utc_timestamp_ms": 5,
            "latencies_us": {"pause_vm": 3}, "api_server": {"process_startup_time_us": 2},
        });
        assert_eq!(difference("", &line, &line), line);
    }

    #[test]
    fn appends_lines_and_keeps_what_a_lost_line_would_have_told() {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("fifo");
        let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
        // SAFETY: needed as std makes no FIFOs; the name ends with zero.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        let mut sink = opened(&path);
        let mut reader = crate::logger::open_sink(&path).unwrap();
        let long = "x".repeat(1 << 20);
        assert!(sink.write(line(json!({"g": {"n": 1}, "filler": long}))).is_err());
        assert!(sink.write(line(json!({"g": {"n": 2}}))).is_err());
        assert_eq!((sink.missed, sink.fails), (2, 0));
        let mut piece = vec![0; 1 << 20];
        while reader.read(&mut piece).is_ok() {}
        sink.write(line(json!({"g": {"n": 3}}))).unwrap();
        sink.write(line(json!({"g": {"n": 7}}))).unwrap();
        let count = reader.read(&mut piece).unwrap();
        let expected = "\n{\"g\":{\"n\":3},\"id\":\"a\"}\n{\"g\":{\"n\":4},\"id\":\"a\"}\n";
        assert_eq!(std::str::from_utf8(&piece[..count]).unwrap(), expected);
    }

    #[test]
    fn a_group_that_begins_again_counts_from_zero() {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("lines");
        let mut sink = opened(&path);
        sink.write(line(json!({"g": {"n": 3}, "h": {"n": 3}}))).unwrap();
        sink.begin_group("g");
        sink.write(line(json!({"g": {"n": 5}, "h": {"n": 5}}))).unwrap();
        let lines = std::fs::read_to_string(&path).unwrap();
        assert_eq!(
            lines.lines().last().unwrap(),
            r#"{"g":{"n":5},"h":{"n":2},"id":"a"}"#
        );
    }

    #[test]
    fn a_full_disk_is_a_failure() {
        let mut sink = opened(Path::new("/dev/full"));
        assert!(sink.write(Map::new()).is_err());
        assert_eq!((sink.missed, sink.fails), (0, 1));
    }
}
