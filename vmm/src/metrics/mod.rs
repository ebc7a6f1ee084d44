//! Counters of the whole process, and the two forms in which they leave it: lines of JSON and Prometheus text.
//!
//! Devices keep their own counters and hand them out as JSON objects. Here they are summed per kind. The control thread
//! collects, writes a line every minute, on request and at exit, and answers `GET /metrics`.

pub mod last_words;
pub mod prometheus;
mod sink;
mod vcpu;

use devices::catalog::{KINDS, blank_metrics};
use devices::legacy::{i8042, serial};
use devices::mmds;
use devices::virtio::{DeviceKind, InterruptMetrics};
use serde_json::{Map, Value, json};

pub use devices::counters::add_to_sum;
pub use sink::MetricsSink;
pub use vcpu::{TickRate, VcpuMetrics};

/// The groups of a machine, with all counters at zero: a line has every group and name at all times.
pub fn blank_machine() -> Map<String, Value> {
    let mut line = Map::new();
    for kind in KINDS {
        line.insert(kind.name().into(), blank_metrics(kind));
    }
    let zero = json!({
        "i8042": i8042::Metrics::default(),
        "interrupts": InterruptMetrics::default(),
        "mmds": mmds::Metrics::default(),
        "uart": serial::Metrics::default(),
        "vcpu": VcpuMetrics::default().to_json(&TickRate::start()),
    });
    add_to_sum(&mut line, &zero);
    line
}

/// The counters of one device.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceMetrics {
    /// What it is.
    pub kind: DeviceKind,
    /// Which one.
    pub id: String,
    /// The group that it has in place of its kind's, of which it is no part then.
    pub group: Option<&'static str>,
    /// Its counters since its creation.
    pub counters: Value,
}

impl DeviceMetrics {
    /// Adds the counters to those of its kind.
    fn add_to(&self, sums: &mut Map<String, Value>) {
        if self.group.is_none() {
            add_to_sum(sums, &json!({(self.kind.name()): &self.counters}));
        }
    }
}

/// The name of the group that a device has in a line.
pub(crate) fn device_group(kind: DeviceKind, group: Option<&str>, id: &str) -> String {
    format!("{}_{id}", group.unwrap_or(kind.name()))
}

/// All counters of the process since its start.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Totals {
    /// By group and name; of devices only what those that are gone have counted.
    pub groups: Map<String, Value>,
    /// What each device counts.
    pub devices: Vec<DeviceMetrics>,
}

impl Totals {
    /// The content of a line: devices are summed per kind, and those that users name have a group each.
    pub fn into_line(self) -> Map<String, Value> {
        let mut line = self.groups;
        for device in self.devices {
            device.add_to(&mut line);
            if device.kind.label().is_some() {
                line.insert(
                    device_group(device.kind, device.group, &device.id),
                    device.counters,
                );
            }
        }
        line
    }

    /// What stays when the devices are gone.
    pub fn into_sums(self) -> Map<String, Value> {
        let mut sums = self.groups;
        self.devices.iter().for_each(|device| device.add_to(&mut sums));
        sums
    }
}

/// Whether a value is what it is, and not a count of what has happened.
pub(crate) fn is_absolute(group: &str, key: &str) -> bool {
    let absolute = group == "latencies_us" || group == "api_server";
    // The three durations of a vhost-user device are those of the last time.
    absolute || matches!(key, "min_us" | "max_us") || group.starts_with("vhost_user") && key.ends_with("_us")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_sum_of_a_kind_and_each_device_that_has_a_name() {
        let device = |kind, id: &str, count| DeviceMetrics {
            kind,
            id: id.into(),
            group: None,
            counters: json!({"n": count}),
        };
        let devices = vec![
            device(DeviceKind::Block, "a", 1),
            device(DeviceKind::Block, "b", 2),
            DeviceMetrics {
                group: Some("vhost_user"),
                ..device(DeviceKind::Block, "c", 16)
            },
            device(DeviceKind::Entropy, "entropy", 4),
        ];
        let groups = Map::from_iter([("vcpu".to_owned(), json!({"n": 8}))]);
        assert_eq!(
            Value::Object(Totals { groups, devices }.into_line()),
            json!({"block": {"n": 3}, "block_a": {"n": 1}, "block_b": {"n": 2}, "vhost_user_c": {"n": 16}, "entropy": {"n": 4}, "vcpu": {"n": 8}})
        );
    }

    #[test]
    fn what_stays_of_devices_is_in_the_sums() {
        let device = |id: &str, group, count| DeviceMetrics {
            kind: DeviceKind::Block,
            id: id.into(),
            group,
            counters: json!({"n": count}),
        };
        let devices = vec![
            device("a", None, 1),
            device("b", None, 2),
            device("c", Some("vhost_user"), 4),
        ];
        let groups = Map::from_iter([("interrupts".to_owned(), json!({"n": 8}))]);
        assert_eq!(
            Value::Object(Totals { groups, devices }.into_sums()),
            json!({"block": {"n": 3}, "interrupts": {"n": 8}})
        );
    }

    #[test]
    fn a_blank_machine_has_every_kind_of_device() {
        let blank = blank_machine();
        let missing: Vec<_> = KINDS
            .iter()
            .filter(|kind| !blank.contains_key(kind.name()))
            .collect();
        assert!(missing.is_empty(), "{missing:?}");
        assert_eq!(
            blank["vcpu"]["exit_io_in_agg"],
            json!({"min_us": 0, "max_us": 0, "sum_us": 0})
        );
    }
}
