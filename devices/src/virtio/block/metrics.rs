//! The counters of a drive, under the names that Firecracker's metrics have.

use serde::Serialize;

use crate::virtio::Latency;

/// Counters since the creation of the device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Metrics {
    /// Activations that failed.
    pub activate_fails: u64,
    /// Bad accesses to the configuration space. Always zero: it can be read anywhere, and a write has no effect.
    pub cfg_fails: u64,
    /// Notifications that found the queue empty.
    pub no_avail_buffer: u64,
    /// Runs of the queue that ended because the driver broke the protocol.
    pub event_fails: u64,
    /// Valid requests that the host failed.
    pub execute_fails: u64,
    /// Requests that were refused: malformed, out of range, a write to a read-only drive, or of an unknown type.
    pub invalid_reqs_count: u64,
    /// Flushes carried out.
    pub flush_count: u64,
    /// Notifications by the driver.
    pub queue_event_count: u64,
    /// Timer events of the rate limiter.
    pub rate_limiter_event_count: u64,
    /// Changes of the live device that were made.
    pub update_count: u64,
    /// Changes of the live device that were refused.
    pub update_fails: u64,
    /// Bytes that the guest read.
    pub read_bytes: u64,
    /// Bytes that the guest wrote.
    pub write_bytes: u64,
    /// Reads carried out.
    pub read_count: u64,
    /// Writes carried out.
    pub write_count: u64,
    /// Times that the rate limiter held a request back.
    pub rate_limiter_throttled_events: u64,
    /// Times that a full asynchronous engine held requests back.
    pub io_engine_throttled_events: u64,
    /// Requests that stayed in the queue when a run of it ended, so that other devices had their turn.
    pub remaining_reqs_count: u64,
    /// How long reads took.
    pub read_agg: Latency,
    /// How long writes took.
    pub write_agg: Latency,
    /// How long flushes took.
    #[serde(skip)]
    pub flush_agg: Latency,
    /// How long discards took.
    #[serde(skip)]
    pub discard_agg: Latency,
    /// How long write-zeroes requests took.
    #[serde(skip)]
    pub write_zeroes_agg: Latency,
}
