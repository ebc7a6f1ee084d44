//! Counters of the whole process, and the JSON line they are written as.
//!
//! Devices keep their own counters and hand them out as JSON objects; here they are summed per kind, and a line
//! holds what was counted since the line before. The control thread writes lines every minute, on request and at exit.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use serde_json::{Map, Value, json};

/// Counters of the vCPU threads, shared by all vCPUs of the machine.
#[derive(Debug, Default)]
#[expect(missing_docs, reason = "the names are the API's")]
pub struct VcpuMetrics {
    pub exit_io_in: AtomicU64,
    pub exit_io_out: AtomicU64,
    pub exit_mmio_read: AtomicU64,
    pub exit_mmio_write: AtomicU64,
    pub failures: AtomicU64,
    pub kvmclock_ctrl_fails: AtomicU64,
}

impl VcpuMetrics {
    /// Adds one.
    pub fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// The counters as JSON.
    pub fn to_json(&self) -> Value {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        json!({
            "exit_io_in": get(&self.exit_io_in),
            "exit_io_out": get(&self.exit_io_out),
            "exit_mmio_read": get(&self.exit_mmio_read),
            "exit_mmio_write": get(&self.exit_mmio_write),
            "failures": get(&self.failures),
            "kvmclock_ctrl_fails": get(&self.kvmclock_ctrl_fails),
        })
    }
}

/// Counts API requests by group (`put_api_requests`) and name (`drive_count`).
#[derive(Debug, Default)]
pub struct RequestMetrics(Mutex<BTreeMap<&'static str, BTreeMap<String, u64>>>);

impl RequestMetrics {
    /// Counts a request, and its failure when it failed.
    pub fn count(&self, group: &'static str, name: &str, failed: bool) {
        let mut groups = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let group = groups.entry(group).or_default();
        *group.entry(format!("{name}_count")).or_default() += 1;
        *group.entry(format!("{name}_fails")).or_default() += u64::from(failed);
    }

    /// The groups as JSON, to be merged into the line.
    pub fn to_json(&self) -> Value {
        let groups = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        serde_json::to_value(&*groups).expect("names and numbers")
    }
}

/// Values that a line holds as they are, and not as a difference.
const ABSOLUTE: [&str; 5] = [
    "process_startup_time_us",
    "process_startup_time_cpu_us",
    "min_us",
    "max_us",
    "utc_timestamp_ms",
];

/// The sink of metrics lines.
#[derive(Default)]
pub struct MetricsSink {
    file: Option<File>,
    last: Value,
    /// Lines that could not be written.
    pub missed: u64,
}

impl MetricsSink {
    /// True once a path was set.
    pub fn is_set(&self) -> bool {
        self.file.is_some()
    }

    /// Appends lines to `path` from now on; it is created when missing, and never truncated.
    pub fn set_path(&mut self, path: &Path) -> io::Result<()> {
        self.file = Some(crate::logger::open_sink(path)?);
        Ok(())
    }

    /// Writes a line with what `now` counts since the line before. Nothing happens without a path.
    pub fn write(&mut self, mut now: Value) -> io::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let line = difference(&now, &self.last);
        let mut text = line.to_string();
        text.push('\n');
        if let Err(error) = file.write_all(text.as_bytes()) {
            self.missed += 1;
            return Err(error);
        }
        self.last = now.take();
        Ok(())
    }
}

/// `now` less `before`, number by number.
fn difference(now: &Value, before: &Value) -> Value {
    match now {
        Value::Object(map) => {
            let lessened = map.iter().map(|(key, value)| {
                let absolute = ABSOLUTE.contains(&key.as_str()) || key == "latencies_us";
                let value = if absolute {
                    value.clone()
                } else {
                    difference(value, &before[key])
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

/// Adds a device's counters to the sum of its kind.
pub fn add_to_sum(sum: &mut Map<String, Value>, counters: &Value) {
    let Value::Object(counters) = counters else { return };
    for (key, value) in counters {
        let entry = sum.entry(key.clone());
        match value {
            Value::Object(_) => {
                if let Value::Object(inner) = entry.or_insert_with(|| Value::Object(Map::new())) {
                    add_to_sum(inner, value);
                }
            }
            _ => {
                let entry = entry.or_insert(Value::from(0u64));
                let (old, new) = (entry.as_u64().unwrap_or(0), value.as_u64().unwrap_or(0));
                *entry = Value::from(match key.as_str() {
                    "max_us" => old.max(new),
                    "min_us" if old != 0 && new != 0 => old.min(new),
                    _ => old.saturating_add(new),
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_holds_what_was_counted_since_the_last() {
        let before = json!({"block": {"read_count": 3, "read_agg": {"max_us": 9, "sum_us": 10}}, "new": 0});
        let now = json!({"block": {"read_count": 5, "read_agg": {"max_us": 9, "sum_us": 14}}, "new": 2});
        let line = difference(&now, &before);
        assert_eq!(
            line,
            json!({"block": {"read_count": 2, "read_agg": {"max_us": 9, "sum_us": 4}}, "new": 2})
        );
    }

    #[test]
    fn sums_devices_of_one_kind() {
        let mut sum = Map::new();
        add_to_sum(
            &mut sum,
            &json!({"a": 1, "agg": {"min_us": 4, "max_us": 9, "sum_us": 1}}),
        );
        add_to_sum(
            &mut sum,
            &json!({"a": 2, "agg": {"min_us": 3, "max_us": 7, "sum_us": 1}}),
        );
        assert_eq!(
            Value::Object(sum),
            json!({"a": 3, "agg": {"min_us": 3, "max_us": 9, "sum_us": 2}})
        );
    }

    #[test]
    fn counts_requests_and_failures() {
        let requests = RequestMetrics::default();
        requests.count("put_api_requests", "drive", false);
        requests.count("put_api_requests", "drive", true);
        assert_eq!(
            requests.to_json(),
            json!({"put_api_requests": {"drive_count": 2, "drive_fails": 1}})
        );
    }
}
