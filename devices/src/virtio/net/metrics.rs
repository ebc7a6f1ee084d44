//! Counters of a network interface since its creation.

use serde::Serialize;

use crate::virtio::Latency;

/// Counters, named as Firecracker names them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Metrics {
    /// Activations that failed.
    pub activate_fails: u64,
    /// Accesses to the configuration space that failed; the slot serves them, so none does.
    pub cfg_fails: u64,
    /// Times that the guest had no, or not enough, receive buffers.
    pub no_rx_avail_buffer: u64,
    /// Kicks of the transmit queue that found nothing to send.
    pub no_tx_avail_buffer: u64,
    /// Events that ended in a broken queue.
    pub event_fails: u64,
    /// Kicks of the receive queue.
    pub rx_queue_event_count: u64,
    /// Timer events of the receive rate limiter.
    pub rx_event_rate_limiter_count: u64,
    /// Times that the receive rate limiter held a frame back.
    pub rx_rate_limiter_throttled: u64,
    /// Events of the tap.
    pub rx_tap_event_count: u64,
    /// Bytes received, headers of 12 bytes included.
    pub rx_bytes_count: u64,
    /// Frames received.
    pub rx_packets_count: u64,
    /// Frames from the host that the guest's buffers could not take.
    pub rx_fails: u64,
    /// Frames received.
    pub rx_count: u64,
    /// Reads that the host refused.
    pub tap_read_fails: u64,
    /// Writes that the host refused; each is a lost frame.
    pub tap_write_fails: u64,
    /// Bytes sent, headers of 12 bytes included.
    pub tx_bytes_count: u64,
    /// Frames from the guest that are no frames: too short or too long.
    pub tx_malformed_frames: u64,
    /// Frames from the guest that were not sent.
    pub tx_fails: u64,
    /// Frames sent.
    pub tx_count: u64,
    /// Frames sent.
    pub tx_packets_count: u64,
    /// Kicks of the transmit queue.
    pub tx_queue_event_count: u64,
    /// Timer events of the transmit rate limiter.
    pub tx_rate_limiter_event_count: u64,
    /// Times that the transmit rate limiter held a frame back.
    pub tx_rate_limiter_throttled: u64,
    /// Frames sent under another Ethernet address than `guest_mac`.
    pub tx_spoofed_mac_count: u64,
    /// Frames that had to wait for the next turn of the io loop.
    pub tx_remaining_reqs_count: u64,
    /// How long runs of the transmit queue took that wrote frames to the tap. Not each write: reading the clock for
    /// each frame would cost more than it tells.
    pub tap_write_agg: Latency,
    /// How long runs of the receive queue took that moved frames.
    #[serde(skip)]
    pub rx_agg: Latency,
}
