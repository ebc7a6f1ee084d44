//! [`RequestMetrics`]: how many requests of each kind there were, how many failed, and how long their answers took.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use api_server::{Method, Request};
use devices::virtio::Histogram;
use serde_json::{Map, Value, json};

/// Resources, which are the first parts of paths, and their names in metrics.
type Names = &'static [(&'static str, &'static str)];

/// The metrics groups of requests, one for a method.
const GROUPS: [(&str, Method, Names); 3] = [
    (
        "get_api_requests",
        Method::Get,
        &[
            ("", "instance_info"),
            ("hotplug", "hotplug_memory"),
            ("machine-config", "machine_cfg"),
            ("mmds", "mmds"),
            ("version", "vmm_version"),
        ],
    ),
    (
        "put_api_requests",
        Method::Put,
        &[
            ("actions", "actions"),
            ("boot-source", "boot_source"),
            ("cpu-config", "cpu_cfg"),
            ("drives", "drive"),
            ("hotplug", "hotplug_memory"),
            ("logger", "logger"),
            ("machine-config", "machine_cfg"),
            ("metrics", "metrics"),
            ("mmds", "mmds"),
            ("network-interfaces", "network"),
            ("pmem", "pmem"),
            ("serial", "serial"),
            ("vsock", "vsock"),
        ],
    ),
    (
        "patch_api_requests",
        Method::Patch,
        &[
            ("drives", "drive"),
            ("hotplug", "hotplug_memory"),
            ("machine-config", "machine_cfg"),
            ("mmds", "mmds"),
            ("network-interfaces", "network"),
            ("pmem", "pmem"),
        ],
    ),
];
/// Resources that have no name in those groups.
const UNNAMED: [&str; 6] = ["balloon", "entropy", "events", "metrics", "snapshot", "vm"];
/// Stands for every path that the API does not have, so that clients cannot make up endpoints.
const OTHER: &str = "other";

/// A kind of request: method and resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Endpoint {
    /// The method.
    pub method: &'static str,
    /// The first part of the path; empty for the instance itself.
    pub resource: &'static str,
}

impl Endpoint {
    /// What kind a request is of.
    pub(super) fn of(request: &Request) -> Self {
        let path = request.path.trim_start_matches('/');
        let first = path.split('/').next().unwrap_or_default();
        let named = GROUPS.iter().flat_map(|(_, _, names)| names.iter());
        let mut known = named.map(|(resource, _)| *resource).chain(UNNAMED);
        Self {
            method: request.method.as_str(),
            resource: known.find(|resource| *resource == first).unwrap_or(OTHER),
        }
    }
}

#[derive(Debug, Default, Clone)]
struct Counters {
    count: u64,
    fails: u64,
    times: Histogram,
}

#[derive(Debug, Default)]
struct State {
    endpoints: BTreeMap<Endpoint, Counters>,
    deprecated: u64,
}

/// Counters of the API's requests, shared by the `api` thread and the control thread.
#[derive(Debug, Default)]
pub struct RequestMetrics(Mutex<State>);

impl RequestMetrics {
    /// Counts a request that has arrived.
    pub(super) fn begin(&self, endpoint: Endpoint) {
        self.lock().endpoints.entry(endpoint).or_default().count += 1;
    }

    /// Counts an answer.
    pub(super) fn finish(&self, endpoint: Endpoint, time: Duration, failed: bool, deprecated: bool) {
        let mut state = self.lock();
        let counters = state.endpoints.entry(endpoint).or_default();
        counters.fails += u64::from(failed);
        counters
            .times
            .record(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        state.deprecated += u64::from(deprecated);
    }

    /// The groups of requests, all names included, to be merged into the line.
    pub fn to_json(&self) -> Value {
        let state = self.lock();
        let mut line = Map::new();
        for (group, method, names) in GROUPS {
            let mut counts = Map::new();
            for (resource, name) in names {
                let method = method.as_str();
                let counters = state.endpoints.get(&Endpoint { method, resource });
                let counters = counters.cloned().unwrap_or_default();
                counts.insert(format!("{name}_count"), counters.count.into());
                if group != "get_api_requests" {
                    counts.insert(format!("{name}_fails"), counters.fails.into());
                }
            }
            line.insert(group.into(), counts.into());
        }
        line.insert(
            "deprecated_api".into(),
            json!({"deprecated_http_api_calls": state.deprecated}),
        );
        line.into()
    }

    /// How long requests took from their arrival to their answer.
    pub fn histograms(&self) -> Vec<(Endpoint, Histogram)> {
        let state = self.lock();
        let times = state.endpoints.iter();
        times
            .map(|(endpoint, counters)| (*endpoint, counters.times))
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(method: Method, path: &str) -> Endpoint {
        Endpoint::of(&Request {
            method,
            path: path.into(),
            body: None,
        })
    }

    #[test]
    fn counts_requests_failures_and_deprecations() {
        let requests = RequestMetrics::default();
        let drive = endpoint(Method::Put, "//drives/a");
        requests.begin(drive);
        requests.begin(drive);
        requests.finish(drive, Duration::from_micros(5), true, false);
        requests.finish(drive, Duration::from_micros(5), false, true);
        let line = requests.to_json();
        assert_eq!(line["put_api_requests"]["drive_count"], 2);
        assert_eq!(line["put_api_requests"]["drive_fails"], 1);
        assert_eq!(line["deprecated_api"]["deprecated_http_api_calls"], 1);
        let histograms = requests.histograms();
        assert_eq!((histograms[0].0, histograms[0].1.count()), (drive, 2));
    }

    #[test]
    fn every_name_is_there_from_the_start_and_gets_have_no_failures() {
        let line = RequestMetrics::default().to_json();
        let names = |group: &str| line[group].as_object().map_or(0, Map::len);
        assert_eq!(names("get_api_requests"), 5);
        assert_eq!(names("put_api_requests"), 26);
        assert_eq!(names("patch_api_requests"), 12);
        assert!(line["get_api_requests"].get("machine_cfg_fails").is_none());
    }

    #[test]
    fn a_made_up_path_is_another_one() {
        assert_eq!(endpoint(Method::Get, "/nope/x").resource, OTHER);
        assert_eq!(endpoint(Method::Get, "/").resource, "");
        assert_eq!(endpoint(Method::Patch, "/vm").resource, "vm");
    }
}
