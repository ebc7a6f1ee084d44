//! [`Exposition`]: all counters as text for Prometheus, format 0.0.4. Nothing starts again at zero by being read.

use std::collections::BTreeMap;
use std::fmt::Write;

use devices::catalog::KINDS;
use devices::virtio::Histogram;
use serde_json::{Map, Value, json};

use super::{DeviceMetrics, Totals, add_to_sum, is_absolute};

/// The media type of the text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4";
/// All names begin with it.
const PREFIX: &str = "mayfly";

/// Names and values that tell samples of one name apart.
pub type Labels<'a> = &'a [(&'a str, &'a str)];

/// Samples of one name.
struct Family {
    kind: &'static str,
    samples: String,
}

/// The text under construction: the samples of a name must stand together.
#[derive(Default)]
pub struct Exposition(BTreeMap<String, Family>);

impl Exposition {
    /// All counters. Kinds of which a machine may have several devices have a sample for each device and no sum.
    pub fn totals(&mut self, totals: Totals) {
        let Totals { mut groups, devices } = totals;
        for kind in KINDS.iter().filter(|kind| kind.label().is_some()) {
            groups.remove(kind.name());
        }
        for DeviceMetrics {
            kind,
            id,
            group,
            counters,
        } in &devices
        {
            match (kind.label(), counters) {
                (Some(label), Value::Object(counters)) => {
                    self.counters(group.unwrap_or(kind.name()), &[(label, id)], counters);
                }
                _ => add_to_sum(&mut groups, &json!({(kind.name()): counters})),
            }
        }
        for (group, value) in &groups {
            if let Value::Object(counters) = value {
                self.counters(group, &[], counters);
            }
        }
    }

    fn counters(&mut self, group: &str, labels: Labels<'_>, counters: &Map<String, Value>) {
        for (key, value) in counters {
            match value {
                Value::Object(inner) => self.counters(&format!("{group}_{key}"), labels, inner),
                Value::Number(number) if is_absolute(group, key) => {
                    self.sample(&format!("{group}_{key}"), "gauge", labels, number);
                }
                Value::Number(number) => {
                    self.sample(&format!("{group}_{key}_total"), "counter", labels, number);
                }
                _ => {}
            }
        }
    }

    /// A value that may go up and down.
    pub fn gauge(&mut self, name: &str, labels: Labels<'_>, value: u64) {
        self.sample(name, "gauge", labels, &value);
    }

    /// A distribution of durations, in seconds.
    pub fn histogram(&mut self, name: &str, labels: Labels<'_>, histogram: &Histogram) {
        let name = format!("{name}_seconds");
        let (text, total) = (labels_text(labels), histogram.count());
        let bucket_labels = labels.iter().map(|(name, value)| label(name, value) + ",");
        let bucket_labels = bucket_labels.collect::<String>();
        let samples = &mut self.family(&name, "histogram").samples;
        let bounds = histogram
            .cumulative()
            .map(|(bound, count)| (seconds(bound).to_string(), count));
        for (bound, count) in bounds.chain([("+Inf".into(), total)]) {
            push(
                samples,
                format_args!("{PREFIX}_{name}_bucket{{{bucket_labels}le=\"{bound}\"}} {count}\n"),
            );
        }
        let sum = seconds(histogram.sum_ns());
        push(samples, format_args!("{PREFIX}_{name}_sum{text} {sum}\n"));
        push(samples, format_args!("{PREFIX}_{name}_count{text} {total}\n"));
    }

    /// The whole text.
    pub fn finish(self) -> String {
        let mut text = String::new();
        for (name, Family { kind, samples }) in self.0 {
            push(
                &mut text,
                format_args!("# TYPE {PREFIX}_{name} {kind}\n{samples}"),
            );
        }
        text
    }

    fn sample(&mut self, name: &str, kind: &'static str, labels: Labels<'_>, value: &dyn std::fmt::Display) {
        let text = labels_text(labels);
        let samples = &mut self.family(name, kind).samples;
        push(samples, format_args!("{PREFIX}_{name}{text} {value}\n"));
    }

    fn family(&mut self, name: &str, kind: &'static str) -> &mut Family {
        let samples = String::new();
        self.0.entry(name.into()).or_insert(Family { kind, samples })
    }
}

fn push(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    text.write_fmt(arguments)
        .expect("writing to a String does not fail");
}

fn labels_text(labels: Labels<'_>) -> String {
    if labels.is_empty() {
        return String::new();
    }
    let all: Vec<_> = labels.iter().map(|(name, value)| label(name, value)).collect();
    format!("{{{}}}", all.join(","))
}

fn label(name: &str, value: &str) -> String {
    let value = value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n");
    format!("{name}=\"{value}\"")
}

#[allow(
    clippy::cast_precision_loss,
    reason = "a sum of durations is exact to 15 digits"
)]
fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use devices::virtio::DeviceKind;

    use super::*;

    fn totals(groups: Value, devices: &[(&str, Value)]) -> Totals {
        let device = |(id, counters): &(&str, Value)| DeviceMetrics {
            kind: DeviceKind::Block,
            group: None,
            id: (*id).into(),
            counters: counters.clone(),
        };
        Totals {
            groups: groups.as_object().cloned().unwrap(),
            devices: devices.iter().map(device).collect(),
        }
    }

    fn text(fill: impl FnOnce(&mut Exposition)) -> String {
        let mut exposition = Exposition::default();
        fill(&mut exposition);
        exposition.finish()
    }

    #[test]
    fn counts_are_counters_and_durations_are_gauges() {
        let groups = json!({
            "uart": {"read_count": 3},
            "latencies_us": {"pause_vm": 7},
            "vcpu": {"agg": {"min_us": 1, "sum_us": 9}},
            "utc_timestamp_ms": 5,
        });
        let expected = "\
            # TYPE mayfly_latencies_us_pause_vm gauge\n\
            mayfly_latencies_us_pause_vm 7\n\
            # TYPE mayfly_uart_read_count_total counter\n\
            mayfly_uart_read_count_total 3\n\
            # TYPE mayfly_vcpu_agg_min_us gauge\n\
            mayfly_vcpu_agg_min_us 1\n\
            # TYPE mayfly_vcpu_agg_sum_us_total counter\n\
            mayfly_vcpu_agg_sum_us_total 9\n";
        assert_eq!(text(|e| e.totals(totals(groups, &[]))), expected);
    }

    #[test]
    fn samples_of_several_devices_stand_together() {
        let devices = [
            ("a", json!({"read_count": 1, "write_count": 2})),
            ("b", json!({"read_count": 3, "write_count": 4})),
        ];
        let expected = "\
            # TYPE mayfly_block_read_count_total counter\n\
            mayfly_block_read_count_total{drive=\"a\"} 1\n\
            mayfly_block_read_count_total{drive=\"b\"} 3\n\
            # TYPE mayfly_block_write_count_total counter\n\
            mayfly_block_write_count_total{drive=\"a\"} 2\n\
            mayfly_block_write_count_total{drive=\"b\"} 4\n";
        assert_eq!(
            text(|e| e.totals(totals(json!({"block": {"read_count": 4}}), &devices))),
            expected
        );
    }

    #[test]
    fn a_histogram_has_growing_buckets_a_sum_and_a_count() {
        let mut histogram = Histogram::default();
        histogram.record(1_000);
        histogram.record(2_000_000_000);
        let text = text(|e| e.histogram("block_read", &[("drive", "a")], &histogram));
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "# TYPE mayfly_block_read_seconds histogram");
        assert_eq!(
            lines[1],
            r#"mayfly_block_read_seconds_bucket{drive="a",le="0.000001024"} 1"#
        );
        assert_eq!(
            lines[25],
            r#"mayfly_block_read_seconds_bucket{drive="a",le="+Inf"} 2"#
        );
        assert_eq!(lines[26], r#"mayfly_block_read_seconds_sum{drive="a"} 2.000001"#);
        assert_eq!(lines[27], r#"mayfly_block_read_seconds_count{drive="a"} 2"#);
        assert_eq!(lines.len(), 28);
    }

    #[test]
    fn labels_are_escaped() {
        let text = text(|e| e.gauge("info", &[("id", "a\"b\\c\nd")], 1));
        assert_eq!(text.lines().nth(1).unwrap(), r#"mayfly_info{id="a\"b\\c\nd"} 1"#);
    }
}
