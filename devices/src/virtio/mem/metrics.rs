//! The counters of the memory device, named as Firecracker names them.

use serde::Serialize;

use crate::virtio::Latency;

/// Counters since creation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Metrics {
    /// Activations that failed; there is nothing in one that could.
    pub activate_fails: u64,
    /// Runs of the queue that ended because the driver broke the protocol, and requests of no known kind.
    pub queue_event_fails: u64,
    /// Notifications by the driver.
    pub queue_event_count: u64,
    /// Requests to plug blocks.
    pub plug_count: u64,
    /// Bytes plugged.
    pub plug_bytes: u64,
    /// Requests to plug that were refused.
    pub plug_fails: u64,
    /// How long plugging took.
    pub plug_agg: Latency,
    /// Requests to unplug blocks.
    pub unplug_count: u64,
    /// Bytes unplugged.
    pub unplug_bytes: u64,
    /// Requests to unplug that were refused.
    pub unplug_fails: u64,
    /// Times that the host did not take memory back.
    pub unplug_discard_fails: u64,
    /// How long unplugging took.
    pub unplug_agg: Latency,
    /// Questions for the state of blocks.
    pub state_count: u64,
    /// Questions that were refused.
    pub state_fails: u64,
    /// How long the answers took.
    pub state_agg: Latency,
    /// Requests to unplug everything.
    pub unplug_all_count: u64,
    /// Requests to unplug everything that were refused; there is no reason to.
    pub unplug_all_fails: u64,
    /// How long unplugging everything took.
    pub unplug_all_agg: Latency,
}
