//! From the guest to the host: the transmit queue's frames go to the backend from guest memory.

use super::backend::{HEADER_LEN, MAX_FRAME_LEN};
use super::{MacAddr, Metrics, Progress, TURN, Wire};
use crate::virtio::{Buffers, Chain, QueueError, Ring, Throttle};

/// A header and the Ethernet header behind it.
const MIN_FRAME_LEN: usize = HEADER_LEN + 14;
/// Where a frame names its sender.
const SOURCE_MAC: usize = HEADER_LEN + 6;

/// The sending half of a device.
pub(super) struct Tx {
    /// The address that the guest was given, when it was.
    pub(super) guest_mac: Option<MacAddr>,
    /// Limits what is sent.
    pub(super) throttle: Throttle,
    /// Frames wait in the queue until the backend has room.
    pub(super) waits: bool,
}

impl Tx {
    /// Sends at most one turn of frames.
    ///
    /// A frame that the host does not take is lost and counted, as on a wire: a tap has no queue in this direction
    /// that could fill up, so waiting would only hold back the frames behind. While the link is down all are lost. A
    /// backend that can fill up says so before, and frames wait in the queue.
    pub(super) fn drain(
        &mut self,
        wire: &mut Wire<'_>,
        ring: &mut Ring<'_, '_>,
        metrics: &mut Metrics,
    ) -> Result<Progress, QueueError> {
        let mut chain = Chain::new();
        ring.disable_notify();
        self.waits = false;
        metrics.no_tx_avail_buffer += u64::from(ring.pending()? == 0);
        for _ in 0..TURN {
            if !wire.backend.has_room() {
                self.waits = true;
                ring.publish();
                return Ok(Progress::Done);
            }
            if ring.pop(&mut chain)? {
                if !wire.is_up {
                    metrics.tx_fails += 1;
                    ring.push(chain.head(), 0);
                    continue;
                }
                if is_frame(&chain.readable) && wire.takes(&chain.readable) {
                    ring.push(chain.head(), 0);
                    continue;
                }
                if is_frame(&chain.readable) && !self.throttle.take(chain.readable.len()) {
                    metrics.tx_rate_limiter_throttled += 1;
                    ring.unpop(1);
                    ring.publish();
                    return Ok(Progress::Done);
                }
                self.send(wire, &chain.readable, metrics);
                ring.push(chain.head(), 0);
            } else if ring.enable_notify()? {
                ring.disable_notify();
            } else {
                ring.publish();
                return Ok(Progress::Done);
            }
        }
        ring.publish();
        metrics.tx_remaining_reqs_count += u64::from(ring.pending()?);
        Ok(Progress::More)
    }

    fn send(&self, wire: &mut Wire<'_>, frame: &Buffers<'_>, metrics: &mut Metrics) {
        if !is_frame(frame) {
            metrics.tx_malformed_frames += 1;
            metrics.tx_fails += 1;
            return;
        }
        if self.guest_mac.is_some_and(|mac| sender(frame) != mac) {
            metrics.tx_spoofed_mac_count += 1;
        }
        let result = wire.backend.send(frame);
        if let Ok(len) = result {
            metrics.tx_bytes_count += len as u64;
            metrics.tx_packets_count += 1;
            metrics.tx_count += 1;
        } else {
            metrics.tap_write_fails += 1;
            metrics.tx_fails += 1;
            wire.complain("writing a frame", metrics.tap_write_fails, &result);
        }
    }
}

fn is_frame(buffers: &Buffers<'_>) -> bool {
    (MIN_FRAME_LEN..=MAX_FRAME_LEN).contains(&buffers.len())
}

fn sender(frame: &Buffers<'_>) -> MacAddr {
    let mut mac = [0; 6];
    frame.read(SOURCE_MAC, &mut mac);
    MacAddr::new(mac)
}
