//! Counters of the vsock device since its creation.

use serde::Serialize;

/// Counters, named as Firecracker names them. "rx" is what the guest receives, "tx" what it sends.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Metrics {
    /// Activations that failed.
    pub activate_fails: u64,
    /// Accesses to the configuration space that failed; the slot serves them, so none does.
    pub cfg_fails: u64,
    /// Receive buffers that were too short for any packet, and broken receive queues.
    pub rx_queue_event_fails: u64,
    /// Packets of the guest that were malformed, and broken transmit queues.
    pub tx_queue_event_fails: u64,
    /// Event buffers that were too short, and broken event queues.
    pub ev_queue_event_fails: u64,
    /// Host programs that could not be accepted, or connections of the guest that found nobody or no room.
    pub muxer_event_fails: u64,
    /// Host programs that did not ask for a port.
    pub conn_event_fails: u64,
    /// Kicks of the receive queue.
    pub rx_queue_event_count: u64,
    /// Kicks of the transmit queue.
    pub tx_queue_event_count: u64,
    /// Bytes of payload received.
    pub rx_bytes_count: u64,
    /// Bytes of payload sent.
    pub tx_bytes_count: u64,
    /// Packets received.
    pub rx_packets_count: u64,
    /// Packets sent.
    pub tx_packets_count: u64,
    /// Connections that began.
    pub conns_added: u64,
    /// Those that the device ended with an RST: after an error, a breach of the protocol or a time-out.
    pub conns_killed: u64,
    /// Those that are gone.
    pub conns_removed: u64,
    /// Time-outs that had to be looked for; none, as they are kept in order.
    pub killq_resync: u64,
    /// Writes of kept bytes that the host refused.
    pub tx_flush_fails: u64,
    /// Writes that the host refused.
    pub tx_write_fails: u64,
    /// Reads that the host refused.
    pub rx_read_fails: u64,
}
