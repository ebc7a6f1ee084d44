//! [`Metrics`]: what a balloon counts.

use serde::Serialize;

use super::reclaim::Released;

/// Counters since creation, named as Firecracker names them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Metrics {
    /// Activations that failed: the timer of the statistics could not be watched or set.
    pub activate_fails: u64,
    /// Requests to inflate.
    pub inflate_count: u64,
    /// Sets of statistics that came.
    pub stats_updates_count: u64,
    /// Sets of statistics without a single entry, and runs of their queue that ended because the driver broke the
    /// protocol.
    pub stats_update_fails: u64,
    /// Requests to deflate.
    pub deflate_count: u64,
    /// Requests to inflate of which at least one page could not be given back, and runs of other queues than that of
    /// the statistics that ended because the driver broke the protocol.
    pub event_fails: u64,
    /// Ranges that the guest reported as free.
    pub free_page_report_count: u64,
    /// Bytes of those that were given back.
    pub free_page_report_freed: u64,
    /// Ranges of those that the host would not take.
    pub free_page_report_fails: u64,
    /// Ranges that the guest told of in answer to hinting commands.
    pub free_page_hint_count: u64,
    /// Bytes of those that were given back.
    pub free_page_hint_freed: u64,
    /// Ranges of those that the host would not take, or that belong to no command in force.
    pub free_page_hint_fails: u64,
}

impl Metrics {
    pub(super) fn reported(&mut self, released: Released) {
        self.free_page_report_count += 1;
        self.free_page_report_freed += released.bytes;
        self.free_page_report_fails += u64::from(released.failed);
    }

    pub(super) fn hinted(&mut self, released: Released) {
        self.free_page_hint_count += 1;
        self.free_page_hint_freed += released.bytes;
        self.free_page_hint_fails += u64::from(released.failed);
    }
}
