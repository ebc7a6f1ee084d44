//! The vsock device (virtio 1.2 §5.10): streams between programs of the guest and programs of the host, which use unix
//! sockets.
//!
//! A host program connects to `uds_path` and names a port of the guest; the guest's connection to a port of the host
//! goes to the socket `uds_path` and `_PORT`. Data moves between guest memory and the sockets without a copy in
//! between; only what a host program does not take at once is kept, within the credit that the guest has. All calls
//! but [`Config::build`] come from the io thread that owns the device.

mod config;
mod connection;
mod host;
mod listener;
mod metrics;
mod muxer;
pub mod packet;
mod room;
mod slots;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::AsRawFd;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use config::{Config, ConfigError, MAX_CID, MAX_PATH, MIN_CID};
pub use connection::BUF_ALLOC;
pub use listener::OpenError;
pub use metrics::Metrics;
pub use muxer::MAX_CONNECTIONS;

use self::muxer::Muxer;
use self::room::Room;
use super::{
    Blob, Chain, ChainStorage, DeviceError, DeviceInfo, DeviceKind, Io, QueueError, StateError, UpdateError,
    Vector, VirtioDevice, feature,
};

/// Index of the queue for what the guest receives.
pub const RX: u16 = 0;
/// Index of the queue for what the guest sends.
pub const TX: u16 = 1;
/// Index of the queue for what the guest is told about the device.
pub const EVENT: u16 = 2;
/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;
/// The most packets of the guest taken before others have their turn.
const TURN: usize = 256;
/// The device's only descriptor.
const MUXER_TOKEN: u32 = 0;
/// Streams can be used (virtio 1.2 §5.10.3).
const F_STREAM: u64 = 1;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, as it lies in an event buffer.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// Whether there is more work than one turn allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Done,
    More,
}

/// What a snapshot keeps: nothing. Connections end with it, and the guest is told after the restore.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {}

/// A vsock device.
pub struct Vsock {
    info: DeviceInfo,
    config_space: [u8; 8],
    muxer: Muxer,
    /// The guest has to be told that its connections are gone.
    reset_due: bool,
    /// The muxer's events did not fit into one turn.
    more_events: bool,
    chain: ChainStorage,
    rooms: Vec<ChainStorage>,
}

impl Vsock {
    fn new(config: &Config) -> Result<Self, OpenError> {
        Ok(Self {
            info: DeviceInfo {
                kind: DeviceKind::Vsock,
                queue_sizes: vec![QUEUE_SIZE; 3],
                features: feature::COMMON | F_STREAM,
            },
            config_space: u64::from(config.guest_cid).to_le_bytes(),
            muxer: Muxer::new(config)?,
            reset_due: false,
            more_events: false,
            chain: ChainStorage::default(),
            rooms: Vec::new(),
        })
    }

    /// Serves the guest's packets when `transmit` says so, and fills its buffers.
    fn run(&mut self, transmit: bool, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let accepted = self.muxer.accept();
        let mut again = self.more_events || accepted == Progress::More;
        let was_congested = self.muxer.is_congested();
        if transmit || was_congested {
            let result = self.transmit(io);
            self.muxer.metrics.tx_queue_event_fails += u64::from(result.is_err());
            again |= result? == Progress::More;
        }
        let congested = self.muxer.is_congested();
        if self.muxer.has_output() {
            let result = self.receive(io);
            self.muxer.metrics.rx_queue_event_fails += u64::from(result.is_err());
            again |= result? == Progress::More;
        }
        // The guest's packets have waited for room for answers, which there is now.
        again |= congested && !self.muxer.is_congested();
        if again {
            io.again = [TX, RX].into_iter().find(|queue| is_ready(io, *queue));
        }
        Ok(())
    }

    fn transmit(&mut self, io: &mut Io<'_>) -> Result<Progress, QueueError> {
        if !is_ready(io, TX) {
            return Ok(Progress::Done);
        }
        let mut ring = io.queues[usize::from(TX)].open(io.mem)?;
        ring.disable_notify();
        let mut chain = Chain::from(std::mem::take(&mut self.chain));
        let mut progress = Progress::More;
        for _ in 0..TURN {
            if self.muxer.is_congested() {
                progress = Progress::Done;
                break;
            }
            if !ring.pop(&mut chain)? {
                if ring.enable_notify()? {
                    ring.disable_notify();
                    continue;
                }
                progress = Progress::Done;
                break;
            }
            self.muxer.on_packet(&mut chain.readable);
            ring.push(chain.head(), 0);
        }
        ring.publish();
        self.chain = chain.into_storage();
        if ring.needs_interrupt() {
            io.irq.raise(Vector::Queue(TX));
        }
        Ok(progress)
    }

    fn receive(&mut self, io: &mut Io<'_>) -> Result<Progress, QueueError> {
        if !is_ready(io, RX) {
            return Ok(Progress::Done);
        }
        let mut ring = io.queues[usize::from(RX)].open(io.mem)?;
        let mut room = Room::new(&mut ring, &mut self.rooms);
        let progress = self.muxer.fill(&mut room)?;
        self.muxer.metrics.rx_queue_event_fails += room.close();
        if ring.needs_interrupt() {
            io.irq.raise(Vector::Queue(RX));
        }
        Ok(progress)
    }

    /// Tells the driver after a restore that its connections are gone (virtio 1.2 §5.10.6.7).
    fn announce_reset(&mut self, io: &mut Io<'_>) -> Result<(), QueueError> {
        let mut ring = io.queues[usize::from(EVENT)].open(io.mem)?;
        let mut chain = Chain::new();
        // A driver that offers nothing but useless buffers meets the bound.
        for _ in 0..QUEUE_SIZE {
            if !self.reset_due {
                break;
            }
            if !ring.pop(&mut chain)? {
                if ring.enable_notify()? {
                    continue;
                }
                break;
            }
            self.reset_due = chain.writable.write(0, &TRANSPORT_RESET) < TRANSPORT_RESET.len();
            self.muxer.metrics.ev_queue_event_fails += u64::from(self.reset_due);
            ring.push(chain.head(), if self.reset_due { 0 } else { 4 });
        }
        ring.publish();
        if ring.needs_interrupt() {
            io.irq.raise(Vector::Queue(EVENT));
        }
        Ok(())
    }
}

impl VirtioDevice for Vsock {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn config_space(&self) -> &[u8] {
        &self.config_space
    }

    fn activate(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let watched = io.watch.add(self.muxer.as_raw_fd(), MUXER_TOKEN);
        self.muxer.metrics.activate_fails += u64::from(watched.is_err());
        watched.map_err(|source| host("watch the vsock's sockets", source))
    }

    fn on_queue(&mut self, queue: u16, io: &mut Io<'_>) -> Result<(), DeviceError> {
        match queue {
            TX => self.muxer.metrics.tx_queue_event_count += 1,
            RX => self.muxer.metrics.rx_queue_event_count += 1,
            _ => {
                let result = self.announce_reset(io);
                self.muxer.metrics.ev_queue_event_fails += u64::from(result.is_err());
                return Ok(result?);
            }
        }
        if self.more_events {
            self.poll()?;
        }
        self.run(queue == TX, io)
    }

    fn on_event(&mut self, _token: u32, io: &mut Io<'_>) -> Result<(), DeviceError> {
        self.poll()?;
        self.run(false, io)
    }

    fn reset(&mut self) {
        self.muxer.reset();
        self.reset_due = false;
        self.more_events = false;
    }

    fn update(&mut self, _patch: Value, _io: &mut Io<'_>) -> Result<(), UpdateError> {
        Err(UpdateError::Refused("the vsock device takes no changes".into()))
    }

    fn save(&self) -> Blob {
        Blob::new("vsock", 1, &State {})
    }

    fn load(&mut self, state: Blob) -> Result<(), StateError> {
        let State {} = state.open("vsock", 1)?;
        self.reset_due = true;
        Ok(())
    }

    fn metrics(&self) -> Value {
        serde_json::to_value(&self.muxer.metrics).expect("counters are plain data")
    }
}

impl Vsock {
    fn poll(&mut self) -> Result<(), DeviceError> {
        let polled = self.muxer.poll();
        self.muxer.metrics.muxer_event_fails += u64::from(polled.is_err());
        let polled = polled.map_err(|source| host("wait for the vsock's sockets", source))?;
        self.more_events = polled == Progress::More;
        Ok(())
    }
}

fn is_ready(io: &Io<'_>, queue: u16) -> bool {
    io.queues
        .get(usize::from(queue))
        .is_some_and(|queue| queue.config().ready)
}

fn host(op: &'static str, source: io::Error) -> DeviceError {
    DeviceError::Host { op, source }
}
