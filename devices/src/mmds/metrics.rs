//! Counters of the metadata service since its start.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// Counters, named as Firecracker names them. Interfaces on several io threads add to them.
#[derive(Debug, Default, Serialize)]
pub struct Metrics {
    /// Frames from guests that were for the service.
    pub rx_accepted: AtomicU64,
    /// Frames for the service that were malformed.
    pub rx_accepted_err: AtomicU64,
    /// Frames for the service that it does not serve: other protocols, other ports, fragments.
    pub rx_accepted_unusual: AtomicU64,
    /// Frames for the service that are longer than an interface takes.
    pub rx_bad_eth: AtomicU64,
    /// Requests with a token that is not, or no longer, valid.
    pub rx_invalid_token: AtomicU64,
    /// Requests to read without a token.
    pub rx_no_token: AtomicU64,
    /// Frames that were worked on.
    pub rx_count: AtomicU64,
    /// Bytes sent to guests.
    pub tx_bytes: AtomicU64,
    /// Times that frames were made for guests.
    pub tx_count: AtomicU64,
    /// Frames lost because the guest took too few.
    pub tx_errors: AtomicU64,
    /// Frames sent to guests.
    pub tx_frames: AtomicU64,
    /// Connections that guests opened.
    pub connections_created: AtomicU64,
    /// Connections that are gone.
    pub connections_destroyed: AtomicU64,
}

/// Adds one.
pub(super) fn count(counter: &AtomicU64) {
    add(counter, 1);
}

/// Adds `amount`.
pub(super) fn add(counter: &AtomicU64, amount: usize) {
    counter.fetch_add(amount as u64, Ordering::Relaxed);
}
