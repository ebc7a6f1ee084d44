//! What the controller tells about the process: metrics and events.

use std::io;

use api_server::Stream;
use serde::Serialize;
use serde_json::{Map, json};

use super::{ControlError, Controller, STATES, State};
use crate::api::Endpoint;
use crate::config::MetricsConfig;
use crate::events::{Event, EventBus};
use crate::logger::LOGGER;
use crate::metrics::prometheus::Exposition;
use crate::metrics::{Totals, add_to_sum, blank_machine};
use crate::{clock, signals};

/// How long the last one of each action took, in microseconds: seen by the client, and in the machine alone.
#[derive(Debug, Default, Serialize)]
pub(super) struct Latencies {
    pub(super) full_create_snapshot: u64,
    pub(super) diff_create_snapshot: u64,
    pub(super) load_snapshot: u64,
    pub(super) pause_vm: u64,
    pub(super) resume_vm: u64,
    pub(super) vmm_full_create_snapshot: u64,
    pub(super) vmm_diff_create_snapshot: u64,
    pub(super) vmm_load_snapshot: u64,
    pub(super) vmm_pause_vm: u64,
    pub(super) vmm_resume_vm: u64,
}

impl Controller {
    /// Sets where metrics go; once.
    pub fn set_metrics(&mut self, config: MetricsConfig) -> Result<(), ControlError> {
        if self.metrics.is_set() {
            return Err(ControlError::MetricsTwice);
        }
        let mut tags = Map::new();
        if config.emit_id {
            tags.insert("id".into(), self.instance.id.clone().into());
        }
        if let Some(properties) = config.properties {
            tags.insert("properties".into(), json!(properties));
        }
        let now = self.collect_metrics().into_line();
        let opened = self.metrics.open(&config.metrics_path, tags, now);
        opened.map_err(|source| ControlError::Sink {
            section: "Metrics",
            path: config.metrics_path,
            source,
        })
    }

    /// True once metrics have a path: then a line is due every minute.
    pub fn has_metrics(&self) -> bool {
        self.metrics.is_set()
    }

    /// Writes a metrics line, when there is a path.
    pub fn write_metrics(&mut self) -> io::Result<()> {
        if !self.metrics.is_set() {
            return Ok(());
        }
        let line = self.collect_metrics().into_line();
        self.metrics.write(line)
    }

    /// The way to whoever listens to `GET /events`.
    pub fn events(&self) -> &EventBus {
        &self.instance.settings.events
    }

    /// Streams events from now on.
    pub fn subscribe(&self, stream: Stream) {
        let now = Event::Subscribed {
            id: &self.instance.id,
            state: self.state_name(),
        };
        self.events().subscribe(stream, &now);
    }

    /// All counters of the process.
    fn collect_metrics(&self) -> Totals {
        let (startup, startup_cpu) = self.instance.startup_us;
        let mut groups = blank_machine();
        let process = json!({
            "utc_timestamp_ms": clock::unix_us() / 1000,
            "api_server": {
                "process_startup_time_us": startup,
                "process_startup_time_cpu_us": startup_cpu,
            },
            "latencies_us": self.latencies,
            "logger": {
                "missed_log_count": LOGGER.missed(),
                "missed_metrics_count": self.metrics.missed,
                "metrics_fails": self.metrics.fails,
                "rate_limited_log_count": LOGGER.rate_limited(),
            },
            // What ends the process at once is told by its last words only.
            "seccomp": {"num_faults": 0},
            "signals": {
                "sigbus": 0,
                "sighup": 0,
                "sigill": 0,
                "sigpipe": signals::broken_pipes(),
                "sigsegv": 0,
                "sigxcpu": 0,
                "sigxfsz": 0,
            },
            "vmm": {"panic_count": 0},
        });
        add_to_sum(&mut groups, &process);
        add_to_sum(&mut groups, &self.requests.to_json());
        let mut totals = Totals {
            groups,
            devices: Vec::new(),
        };
        if let State::Running(vm) = &self.state {
            vm.collect_metrics(&mut totals);
        }
        totals
    }

    /// All counters and durations, as text for Prometheus.
    pub(super) fn exposition(&self) -> String {
        let mut text = Exposition::default();
        text.totals(self.collect_metrics());
        text.gauge(
            "info",
            &[("id", &self.instance.id), ("version", env!("CARGO_PKG_VERSION"))],
            1,
        );
        for state in STATES {
            text.gauge(
                "state",
                &[("state", state)],
                u64::from(state == self.state_name()),
            );
        }
        for (Endpoint { method, resource }, times) in self.requests.histograms() {
            let labels = [("method", method), ("resource", resource)];
            text.histogram("api_request", &labels, &times);
        }
        if let State::Running(vm) = &self.state {
            vm.collect_histograms(&mut text);
        }
        text.finish()
    }
}
