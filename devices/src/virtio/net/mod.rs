//! The network device (virtio 1.2 §5.1): a queue for each direction between the guest and a [`Backend`]: a [`Tap`], or a
//! program that [`Passt`] reaches. With several such pairs of queues each is a part of its own.
//!
//! Frames carry virtio's own header on a tap too, so checksum and segmentation offloads pass through unparsed, and
//! the bytes move between guest memory and kernel without a copy in between. All calls but [`Config::build`] come
//! from the io thread that owns the device.

mod backend;
mod config;
mod detour;
mod error;
pub mod feature;
mod inherited;
mod link;
mod mac;
mod metrics;
mod pairs;
mod passt;
mod rx;
mod tap;
#[cfg(test)]
mod tests;
mod tx;
mod vhost;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use backend::{Backend, HEADER_LEN, MAX_FRAME_LEN};
pub use config::{BackendKind, Config, ConfigError, LinkState, MAX_QUEUES, MIN_MTU, Patch};
pub use error::OpenError;
pub use mac::{InvalidMac, MacAddr};
pub use metrics::Metrics;
pub use passt::Passt;
pub use tap::Tap;

use self::detour::Detour;
use self::pairs::Pairs;
use self::rx::Rx;
use self::tx::Tx;
use super::{
    Blob, Buffers, Clock, DeviceError, DeviceInfo, DeviceKind, Histogram, Io, Sibling, StateError, Throttle,
    UpdateError, Vector, VirtioDevice, feature as virtio,
};
use crate::mmds::Mmds;
use crate::rate_limiter;

/// Index of the queue for what the guest receives.
pub const RX: u16 = 0;
/// Index of the queue for what the guest sends.
pub const TX: u16 = 1;
/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;
/// The most frames moved in one direction before others have their turn.
const TURN: usize = 64;
/// The device's descriptors: the backend, and the timers of the rate limiters and of the metadata service.
const BACKEND_TOKEN: u32 = 0;
const RX_LIMITER_TOKEN: u32 = 1;
const TX_LIMITER_TOKEN: u32 = 2;
const MMDS_TOKEN: u32 = 3;
const KIND: &str = "net";

/// Whether a direction has more work than it was allowed to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Done,
    More,
}

/// The host's end of the interface, as the two directions see it.
struct Wire<'a> {
    backend: &'a mut dyn Backend,
    iface_id: &'a str,
    clock: &'a dyn Clock,
    /// The metadata service, when the interface serves it.
    detour: Option<&'a Detour>,
    /// Frames of the tap wait for an event of their own.
    only_detour: bool,
    /// Frames pass.
    is_up: bool,
}

impl Wire<'_> {
    /// Whether a frame of the guest is for the metadata service, which then has it.
    fn takes(&self, frame: &Buffers<'_>) -> bool {
        self.detour.is_some_and(|detour| detour.take(frame, self.clock))
    }

    /// Sends what the backend has gathered. What it loses was counted as sent.
    fn flush(&mut self, metrics: &mut Metrics) {
        let result = self.backend.flush().map(|()| 0);
        if result.is_err() {
            metrics.tap_write_fails += 1;
            self.complain("writing frames", metrics.tap_write_fails, &result);
        }
    }

    /// Logs the `count`th failure of `op`; ever fewer of them, as a guest can cause as many as it likes.
    fn complain(&self, op: &str, count: u64, result: &io::Result<usize>) {
        if !count.is_power_of_two() {
            return;
        }
        let id = self.iface_id;
        match result {
            Ok(len) => log::warn!("net {id}: {op} gave {len} bytes (failure {count})"),
            Err(error) => log::warn!("net {id}: {op} failed (failure {count}): {error}"),
        }
    }
}

/// What a snapshot keeps beside config and features. A frame on its way may be lost.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    rx_rate_limiter: rate_limiter::State,
    tx_rate_limiter: rate_limiter::State,
    /// How many of several pairs of queues the driver uses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pairs: Option<u16>,
}

/// A network device; with several pairs of queues the part that serves one of them.
pub struct Net<B = Tap> {
    info: DeviceInfo,
    iface_id: String,
    config_space: [u8; 12],
    backend: B,
    detour: Option<Detour>,
    /// The pair of queues that it serves, and what it shares with the other parts.
    pair: u16,
    pairs: Option<Arc<Pairs<B>>>,
    /// The other parts, until they are split off.
    siblings: Vec<Self>,
    /// Why the loop does not watch the backend; to be told with the next event.
    fault: Option<io::Error>,
    link: LinkState,
    /// The driver's offloads that the backend goes by.
    offloads: u64,
    rx: Rx,
    tx: Tx,
    metrics: Metrics,
}

impl<B: Backend> Net<B> {
    /// A device on `backend`; of `config` it takes address, MTU and limits.
    pub fn new(config: &Config, backend: B) -> Self {
        Self {
            info: device_info(config, backend.offloads()),
            iface_id: config.iface_id.clone(),
            config_space: config_space(config),
            offloads: backend.offloads() & feature::GUEST_OFFLOADS,
            backend,
            detour: None,
            pair: 0,
            pairs: None,
            siblings: Vec::new(),
            fault: None,
            link: config.link_state.unwrap_or_default(),
            rx: Rx::new(Throttle::new(config.rx_rate_limiter.as_ref(), RX_LIMITER_TOKEN)),
            tx: Tx {
                guest_mac: config.guest_mac,
                throttle: Throttle::new(config.tx_rate_limiter.as_ref(), TX_LIMITER_TOKEN),
                waits: false,
            },
            metrics: Metrics::default(),
        }
    }

    /// The same device, which serves the metadata service too.
    pub fn with_mmds(mut self, mmds: Arc<Mmds>) -> io::Result<Self> {
        let detour = Detour::new(mmds)?;
        for part in &mut self.siblings {
            part.detour = Some(detour.clone());
        }
        self.detour = Some(detour);
        Ok(self)
    }

    fn start(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        self.begin_pair(io)
            .map_err(host("set up the queues of the tap"))?;
        self.rx.mergeable = io.features & feature::MRG_RXBUF != 0;
        let offloads = io.features & feature::GUEST_OFFLOADS;
        if offloads != self.offloads {
            let set = self.backend.set_offloads(offloads);
            set.map_err(host("set the offloads of the tap"))?;
            if self.offloads & !offloads != 0 {
                self.rx.discard(&mut self.backend);
            }
            self.offloads = offloads;
        }
        self.rx.throttle.activate(io)?;
        self.tx.throttle.activate(io)?;
        // Of several parts, one is enough to do what is due.
        if let Some(detour) = self.detour.as_ref().filter(|_| self.pair == 0) {
            let watched = io.watch.add(detour.timer_fd(), MMDS_TOKEN);
            watched.map_err(host("watch the timer of the metadata service"))?;
        }
        let fd = self.backend.as_fd().as_raw_fd();
        io.watch.add(fd, BACKEND_TOKEN).map_err(host("watch the tap"))
    }

    fn transmit(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        if self.tx.throttle.is_holding() {
            return Ok(());
        }
        self.tx.throttle.begin(io.clock);
        let (is_up, tx) = (self.is_up(), self.tx_queue());
        let mut ring = io.queues[usize::from(tx)].open(io.mem)?;
        let mut wire = Wire {
            backend: &mut self.backend,
            iface_id: &self.iface_id,
            clock: io.clock,
            detour: self.detour.as_ref(),
            only_detour: false,
            is_up,
        };
        let (start, sent) = (Instant::now(), self.metrics.tx_count);
        let progress = self.tx.drain(&mut wire, &mut ring, &mut self.metrics)?;
        wire.flush(&mut self.metrics);
        if self.metrics.tx_count != sent {
            self.metrics.tap_write_agg.record(start.elapsed());
        }
        if ring.needs_interrupt() {
            io.irq.raise(Vector::Queue(tx));
        }
        if progress == Progress::More {
            io.again = Some(tx);
        }
        self.tx.throttle.settle(io.clock)?;
        if self.detour.as_ref().is_some_and(|detour| detour.has_frame()) {
            self.receive(true, io)?;
        }
        Ok(())
    }

    /// The backend has something to tell: frames, or that it takes some again.
    fn on_backend(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        if let Err(error) = self.backend.on_ready() {
            self.metrics.tap_write_fails += 1;
            log::warn!("net {}: {error}", self.iface_id);
        }
        self.receive(false, io)?;
        // There is room, too, when the connection was lost just now.
        if self.tx.waits && self.backend.has_room() {
            self.transmit(io)?;
        }
        Ok(())
    }

    /// Does nothing before the driver has set the queue up and uses it, and while the link is down: frames wait in the
    /// backend. With `only_detour` those of the backend wait in any case.
    fn receive(&mut self, only_detour: bool, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let _turn = self.pairs.as_ref().map(|pairs| pairs.turn(self.pair));
        let (rx, is_up) = (self.rx_queue(), self.is_up() && self.is_used());
        let queue = &mut io.queues[usize::from(rx)];
        if !queue.config().ready || self.rx.throttle.is_holding() || !is_up {
            return Ok(());
        }
        self.rx.throttle.begin(io.clock);
        let mut ring = queue.open(io.mem)?;
        let mut wire = Wire {
            backend: &mut self.backend,
            iface_id: &self.iface_id,
            clock: io.clock,
            detour: self.detour.as_ref(),
            only_detour,
            is_up,
        };
        let (start, received) = (Instant::now(), self.metrics.rx_count);
        let progress = self.rx.drain(&mut wire, &mut ring, &mut self.metrics)?;
        if self.metrics.rx_count != received {
            self.metrics.rx_agg.record(start.elapsed());
        }
        if ring.needs_interrupt() {
            io.irq.raise(Vector::Queue(rx));
        }
        if progress == Progress::More {
            // Of two queues with more to do, only one can be asked for. A turn of the transmit queue leads here again.
            io.again.get_or_insert(rx);
        }
        self.rx.has_more = progress == Progress::More || only_detour && self.rx.has_more;
        self.rx.throttle.settle(io.clock)
    }

    /// Ends an event: counts it when it ends the device's work, and waits for what the metadata service does next.
    fn checked(&mut self, result: Result<(), DeviceError>, io: &Io<'_>) -> Result<(), DeviceError> {
        let watched = self.fault.take().map_or(Ok(()), Err);
        let result = watched.map_err(host("watch the tap")).and(result);
        let result = result.and_then(|()| match &self.detour {
            Some(detour) => detour
                .set_timer(io.clock)
                .map_err(host("set the timer of the metadata service")),
            None => Ok(()),
        });
        self.metrics.event_fails += u64::from(result.is_err());
        self.show_link(io);
        result
    }
}

impl<B: Backend + 'static> VirtioDevice for Net<B> {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn config_space(&self) -> &[u8] {
        &self.config_space
    }

    fn split(&mut self) -> Vec<Sibling> {
        let sibling = |part: Self| Sibling {
            queues: vec![part.rx_queue(), part.tx_queue()],
            device: Box::new(part),
        };
        self.siblings.drain(..).map(sibling).collect()
    }

    fn refresh(&mut self, io: &mut Io<'_>) {
        self.follow(io);
    }

    fn activate(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let result = self.start(io);
        self.metrics.activate_fails += u64::from(result.is_err());
        result
    }

    fn on_queue(&mut self, queue: u16, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let result = if self.control_queue(io.features) == Some(queue) {
            self.control(queue, io)
        } else if queue == self.tx_queue() {
            self.metrics.tx_queue_event_count += 1;
            self.transmit(io).and_then(|()| match self.rx.has_more {
                true => self.receive(false, io),
                false => Ok(()),
            })
        } else {
            self.metrics.rx_queue_event_count += 1;
            self.receive(false, io)
        };
        self.checked(result, io)
    }

    fn on_event(&mut self, token: u32, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let metrics = &mut self.metrics;
        let result = match token {
            BACKEND_TOKEN => {
                metrics.rx_tap_event_count += 1;
                self.on_backend(io)
            }
            RX_LIMITER_TOKEN if self.rx.throttle.release() => {
                metrics.rx_event_rate_limiter_count += 1;
                self.receive(false, io)
            }
            TX_LIMITER_TOKEN if self.tx.throttle.release() => {
                metrics.tx_rate_limiter_event_count += 1;
                self.transmit(io)
            }
            MMDS_TOKEN => {
                if let Some(detour) = &self.detour {
                    detour.work(io.clock);
                }
                self.receive(true, io)
            }
            _ => Ok(()),
        };
        self.checked(result, io)
    }

    fn quiesce(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        if let Some(detour) = &self.detour {
            detour.pause(io.clock);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.rx.reset();
        self.tx.throttle.reset();
        self.tx.waits = false;
        self.fault = None;
        if let Some(detour) = &self.detour {
            detour.reset();
        }
        if let Some(pairs) = self.pairs.as_ref().filter(|_| self.pair == 0) {
            pairs.reset();
        }
    }

    fn update(&mut self, patch: Value, io: &mut Io<'_>) -> Result<(), UpdateError> {
        self.change(&serde_json::from_value(patch)?, io)
    }

    fn save(&self) -> Blob {
        let state = State {
            rx_rate_limiter: self.rx.throttle.save(),
            tx_rate_limiter: self.tx.throttle.save(),
            pairs: self.pairs.as_ref().map(|pairs| pairs.used()),
        };
        Blob::new(KIND, 1, &state)
    }

    fn load(&mut self, state: Blob) -> Result<(), StateError> {
        let state: State = state.open(KIND, 1)?;
        let fits = match (&self.pairs, state.pairs) {
            (Some(pairs), Some(used)) => pairs.load(used),
            (None, None) => true,
            _ => false,
        };
        if !fits {
            return Err(StateError::Inconsistent {
                kind: KIND,
                what: format!(
                    "interface '{}' has other queues than at the snapshot",
                    self.iface_id
                ),
            });
        }
        self.rx.throttle.load(KIND, state.rx_rate_limiter)?;
        self.tx.throttle.load(KIND, state.tx_rate_limiter)
    }

    fn metrics(&self) -> Value {
        serde_json::to_value(&self.metrics).expect("counters are plain data")
    }

    fn histograms(&self) -> Vec<(&'static str, Histogram)> {
        vec![
            ("rx_batch", self.metrics.rx_agg.spread),
            ("tx_batch", self.metrics.tap_write_agg.spread),
        ]
    }
}

fn host(op: &'static str) -> impl Fn(io::Error) -> DeviceError {
    move |source| DeviceError::Host { op, source }
}

/// What a card of this config is that serves these offloads.
fn device_info(config: &Config, offloads: u64) -> DeviceInfo {
    let mut features = virtio::COMMON | feature::MRG_RXBUF | feature::STATUS | offloads;
    if config.guest_mac.is_some() {
        features |= feature::MAC;
    }
    if config.mtu.is_some() {
        features |= feature::MTU;
    }
    DeviceInfo {
        kind: DeviceKind::Net,
        queue_sizes: vec![QUEUE_SIZE; 2],
        features,
    }
}

/// The configuration space (virtio 1.2 §5.1.4): address, status, no pairs of queues beyond the first, MTU.
fn config_space(config: &Config) -> [u8; 12] {
    let mut space = [0; 12];
    if let Some(mac) = config.guest_mac {
        space[..6].copy_from_slice(&mac.bytes());
    }
    space[6..8].copy_from_slice(&link::status(config.link_state != Some(LinkState::Down)));
    space[10..].copy_from_slice(&config.mtu.unwrap_or(0).to_le_bytes());
    space
}
