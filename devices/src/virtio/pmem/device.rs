//! [`Pmem`]: the device.

use std::io;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::flusher::Flusher;
use super::image::Image;
use super::{Config, OpenError, Patch};
use crate::memory_host::{FileMapping, MappedFile, MemoryHost};
use crate::rate_limiter;
use crate::virtio::image_lock::Lock;
use crate::virtio::{
    Blob, Chain, ChainStorage, DeviceError, DeviceInfo, DeviceKind, Histogram, Io, Latency, StateError,
    Throttle, UpdateError, Vector, VirtioDevice, feature,
};

const QUEUE_SIZE: u16 = 256;
/// Request type of a flush, the only one.
const FLUSH: u32 = 0;
/// `ret` of a response: done.
const DONE: u32 = 0;
/// `ret` of a response: -1.
const FAILED: u32 = u32::MAX;
/// The flusher has finished.
const FLUSHED: u32 = 0;
/// A flush that the limits held back can go.
const RELEASED: u32 = 1;

const KIND: &str = "pmem";
const STATE_VERSION: u32 = 1;

/// Counters since creation, named as Firecracker names them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Metrics {
    /// Activations that failed: the flusher's descriptor could not be watched.
    pub activate_fails: u64,
    /// Bad accesses to the configuration space. Always zero: it can be read anywhere, and a write has no effect.
    pub cfg_fails: u64,
    /// Flushes that the host failed, malformed requests, and runs that ended because the driver broke the protocol.
    pub event_fails: u64,
    /// Notifications by the driver.
    pub queue_event_count: u64,
    /// Flushes that the rate limiter held back.
    pub rate_limiter_throttled_events: u64,
    /// Flushes that the rate limiter then let go.
    pub rate_limiter_event_count: u64,
    /// How long flushes of the host took. Told as a histogram only.
    #[serde(skip)]
    pub flush_agg: Latency,
}

/// What a snapshot keeps: facts that the guest has read and that must hold after the restore.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    start: u64,
    size: u64,
    read_only: bool,
    rate_limiter: rate_limiter::State,
}

/// A virtio pmem device.
///
/// Requests stay in the queue while a flush is running: the flush answers those that were there when it began, and
/// those that came since need another one.
pub struct Pmem {
    id: String,
    info: DeviceInfo,
    config_space: [u8; 16],
    /// The memory that the guest has; none for a device that is dropped.
    memory: Box<dyn MappedFile>,
    size: u64,
    /// Makes writes durable; none on a read-only device, which has none.
    flusher: Option<Flusher>,
    /// How many requests the running flush answers.
    covered: u16,
    /// When the running flush began.
    began: Option<Instant>,
    throttle: Throttle,
    /// Bytes in the file, which every flush is said to move.
    file_size: usize,
    /// Kept from flush to flush, so that answering allocates nothing.
    storage: ChainStorage,
    metrics: Metrics,
    /// Let go of last: others may write the file then.
    _lock: Lock,
}

impl Pmem {
    /// Opens the file of a valid config, maps it and makes the device.
    pub(super) fn new(config: &Config, host: &dyn MemoryHost) -> Result<Self, OpenError> {
        let path = || config.path_on_host.clone();
        let image = Image::open(&config.path_on_host, config.read_only)?;
        let size = image.memory_size();
        if size != image.size {
            log::warn!(
                "the file '{}' of pmem device '{}' has {} bytes, which is not a multiple of 2 MiB: the guest sees {size}, \
                 and what it writes behind the file's end is lost",
                config.path_on_host,
                config.id,
                image.size
            );
        }
        let mapping = FileMapping {
            file: &image.file,
            file_size: image.size,
            size,
            read_only: config.read_only,
        };
        let memory = host
            .map_file(&mapping)
            .map_err(|source| OpenError::Memory { path: path(), source })?;
        let file_size = image.size;
        let flusher = (!config.read_only).then(|| Flusher::new(image.file));
        let flusher = flusher.transpose().map_err(|source| OpenError::Host {
            op: "start a thread that flushes",
            path: path(),
            source,
        })?;
        Ok(Self {
            id: config.id.clone(),
            info: DeviceInfo {
                kind: DeviceKind::Pmem,
                queue_sizes: vec![QUEUE_SIZE],
                features: feature::COMMON,
            },
            config_space: config_space(memory.start(), size),
            memory,
            size,
            flusher,
            covered: 0,
            began: None,
            throttle: Throttle::new(config.rate_limiter.as_ref(), RELEASED),
            file_size: usize::try_from(file_size).unwrap_or(usize::MAX),
            storage: ChainStorage::default(),
            metrics: Metrics::default(),
            _lock: image.lock,
        })
    }

    /// Starts a flush for the requests that wait, unless one is running or held back.
    fn begin(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let is_busy = self.flusher.as_ref().is_some_and(Flusher::is_busy);
        if is_busy || self.throttle.is_holding() {
            return Ok(());
        }
        let mut ring = io.queues[0].open(io.mem)?;
        // A driver that must not notify could wait for ever with a request that came during a flush.
        ring.enable_notify()?;
        let waiting = ring.pending()?;
        if waiting == 0 {
            return Ok(());
        }
        self.throttle.begin(io.clock);
        if !self.throttle.take(self.file_size) {
            self.metrics.rate_limiter_throttled_events += 1;
            return self.throttle.settle(io.clock);
        }
        self.covered = waiting;
        match &mut self.flusher {
            Some(flusher) => {
                flusher.start();
                self.began = Some(io.clock.now());
                Ok(())
            }
            None => {
                let refused = io::Error::from(io::ErrorKind::ReadOnlyFilesystem);
                self.answer(io, Err(refused))?;
                let more = io.queues[0].open(io.mem)?.enable_notify()?;
                io.again = more.then_some(0);
                Ok(())
            }
        }
    }

    /// Answers the requests that a flush was for.
    fn answer(&mut self, io: &mut Io<'_>, result: io::Result<()>) -> Result<(), DeviceError> {
        if let Some(began) = self.began.take() {
            let time = io.clock.now().saturating_duration_since(began);
            self.metrics.flush_agg.record(time);
        }
        if let Err(error) = &result {
            log::warn!("pmem device '{}' could not flush: {error}", self.id);
        }
        let ret = if result.is_ok() { DONE } else { FAILED };
        let mut ring = io.queues[0].open(io.mem)?;
        let mut chain = Chain::from(std::mem::take(&mut self.storage));
        for _ in 0..std::mem::take(&mut self.covered) {
            // They are still there, unless the driver has broken the protocol.
            if !ring.pop(&mut chain)? {
                break;
            }
            let written = self.respond(&chain, ret);
            ring.push(chain.head(), written);
        }
        self.storage = chain.into_storage();
        ring.publish();
        if ring.needs_interrupt() {
            io.irq.raise(Vector::Queue(0));
        }
        Ok(())
    }

    /// Writes the response to one request; returns how many bytes it has.
    fn respond(&mut self, chain: &Chain<'_>, ret: u32) -> u32 {
        let is_flush = chain.readable.read_obj(0).map(u32::from_le) == Some(FLUSH);
        let ret = if is_flush { ret } else { FAILED };
        self.metrics.event_fails += u64::from(ret == FAILED);
        let written = chain.writable.write(0, &ret.to_le_bytes());
        u32::try_from(written).expect("four bytes at most")
    }

    /// Takes the result of a flush that has ended, and goes on with those requests that came since.
    fn finish(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let result = self.flusher.as_mut().and_then(Flusher::take);
        if let Some(result) = result {
            self.answer(io, result)?;
            self.begin(io)?;
        }
        Ok(())
    }

    /// Counts a run that ended badly.
    fn counted(&mut self, result: Result<(), DeviceError>) -> Result<(), DeviceError> {
        self.metrics.event_fails += u64::from(result.is_err());
        result
    }

    /// Watches the flusher and the timer of the limits.
    fn watch(&mut self, io: &Io<'_>) -> Result<(), DeviceError> {
        if let Some(flusher) = &self.flusher {
            let watched = io.watch.add(flusher.done_fd(), FLUSHED);
            watched.map_err(|source| DeviceError::Host {
                op: "watch the flushes of a pmem device",
                source,
            })?;
        }
        self.throttle.activate(io)
    }

    fn change(&mut self, patch: &Patch, io: &Io<'_>) -> Result<(), UpdateError> {
        let limits = patch.rate_limiter.as_ref();
        self.throttle.prepare(limits, io)?;
        self.throttle.patch(limits);
        Ok(())
    }
}

impl VirtioDevice for Pmem {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn config_space(&self) -> &[u8] {
        &self.config_space
    }

    fn activate(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let result = self.watch(io);
        self.metrics.activate_fails += u64::from(result.is_err());
        result
    }

    fn on_queue(&mut self, _queue: u16, io: &mut Io<'_>) -> Result<(), DeviceError> {
        self.metrics.queue_event_count += 1;
        let result = self.begin(io);
        self.counted(result)
    }

    fn on_event(&mut self, token: u32, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let result = match token {
            FLUSHED => self.finish(io),
            RELEASED if self.throttle.release() => {
                self.metrics.rate_limiter_event_count += 1;
                self.begin(io)
            }
            _ => Ok(()),
        };
        self.counted(result)
    }

    fn quiesce(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        // What came during the flush stays in the queue, and is seen after the resume.
        let flushed = self.flusher.as_mut().and_then(Flusher::wait);
        let result = flushed.map_or(Ok(()), |result| self.answer(io, result));
        self.counted(result)
    }

    fn reset(&mut self) {
        if let Some(flusher) = &mut self.flusher {
            flusher.forget();
        }
        self.throttle.reset();
    }

    fn update(&mut self, patch: Value, io: &mut Io<'_>) -> Result<(), UpdateError> {
        self.change(&serde_json::from_value(patch)?, io)
    }

    fn save(&self) -> Blob {
        let state = State {
            start: self.memory.start(),
            size: self.size,
            read_only: self.flusher.is_none(),
            rate_limiter: self.throttle.save(),
        };
        Blob::new(KIND, STATE_VERSION, &state)
    }

    fn load(&mut self, state: Blob) -> Result<(), StateError> {
        let state: State = state.open(KIND, STATE_VERSION)?;
        let inconsistent = |what| StateError::Inconsistent { kind: KIND, what };
        if (state.start, state.size) != (self.memory.start(), self.size) {
            return Err(inconsistent(format!(
                "pmem device '{}' had {} bytes at {:#x} and has {} at {:#x}: restore its file with the size that it had, \
                 in a machine with the same memory and devices",
                self.id,
                state.size,
                state.start,
                self.size,
                self.memory.start()
            )));
        }
        if state.read_only != self.flusher.is_none() {
            return Err(inconsistent(format!(
                "read_only of pmem device '{}' is not what it was at the snapshot",
                self.id
            )));
        }
        self.throttle.load(KIND, state.rate_limiter)
    }

    fn metrics(&self) -> Value {
        serde_json::to_value(&self.metrics).expect("counters are plain data")
    }

    fn histograms(&self) -> Vec<(&'static str, Histogram)> {
        vec![("flush", self.metrics.flush_agg.spread)]
    }
}

/// `struct virtio_pmem_config` (virtio 1.2 §5.19.4): start, size.
fn config_space(start: u64, size: u64) -> [u8; 16] {
    let mut space = [0; 16];
    space[..8].copy_from_slice(&start.to_le_bytes());
    space[8..].copy_from_slice(&size.to_le_bytes());
    space
}
