//! [`Pmem`]: the device.

use std::io;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::flusher::Flusher;
use super::image::Image;
use super::{Config, OpenError, Patch};
use crate::memory_host::{FileMapping, MappedFile, MemoryHost};
use crate::virtio::{
    Blob, Chain, ChainStorage, DeviceError, DeviceInfo, DeviceKind, Io, QueueError, StateError, UpdateError,
    Vector, VirtioDevice, feature,
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
    /// Flushes that the rate limiter held back. Always zero in this version.
    pub rate_limiter_throttled_events: u64,
    /// Timer events of the rate limiter. Always zero in this version.
    pub rate_limiter_event_count: u64,
}

/// What a snapshot keeps: facts that the guest has read and that must hold after the restore.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    start: u64,
    size: u64,
    read_only: bool,
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
    /// Kept from flush to flush, so that answering allocates nothing.
    storage: ChainStorage,
    metrics: Metrics,
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
            storage: ChainStorage::default(),
            metrics: Metrics::default(),
        })
    }

    /// Starts a flush for the requests that wait, unless one is running.
    fn begin(&mut self, io: &mut Io<'_>) -> Result<(), QueueError> {
        if self.flusher.as_ref().is_some_and(Flusher::is_busy) {
            return Ok(());
        }
        let mut ring = io.queues[0].open(io.mem)?;
        // A driver that must not notify could wait for ever with a request that came during a flush.
        ring.enable_notify()?;
        self.covered = ring.pending()?;
        match (&mut self.flusher, self.covered) {
            (_, 0) => Ok(()),
            (Some(flusher), _) => {
                flusher.start();
                Ok(())
            }
            (None, _) => {
                let refused = io::Error::from(io::ErrorKind::ReadOnlyFilesystem);
                self.answer(io, Err(refused))?;
                let more = io.queues[0].open(io.mem)?.enable_notify()?;
                io.again = more.then_some(0);
                Ok(())
            }
        }
    }

    /// Answers the requests that a flush was for.
    fn answer(&mut self, io: &mut Io<'_>, result: io::Result<()>) -> Result<(), QueueError> {
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
    fn finish(&mut self, io: &mut Io<'_>) -> Result<(), QueueError> {
        let result = self.flusher.as_mut().and_then(Flusher::take);
        if let Some(result) = result {
            self.answer(io, result)?;
            self.begin(io)?;
        }
        Ok(())
    }

    /// Counts a run that ended badly.
    fn counted(&mut self, result: Result<(), QueueError>) -> Result<(), DeviceError> {
        self.metrics.event_fails += u64::from(result.is_err());
        Ok(result?)
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
        let Some(flusher) = &self.flusher else {
            return Ok(());
        };
        io.watch.add(flusher.done_fd(), FLUSHED).map_err(|source| {
            self.metrics.activate_fails += 1;
            DeviceError::Host {
                op: "watch the flushes of a pmem device",
                source,
            }
        })
    }

    fn on_queue(&mut self, _queue: u16, io: &mut Io<'_>) -> Result<(), DeviceError> {
        self.metrics.queue_event_count += 1;
        let result = self.begin(io);
        self.counted(result)
    }

    fn on_event(&mut self, _token: u32, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let result = self.finish(io);
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
    }

    fn update(&mut self, patch: Value, _io: &mut Io<'_>) -> Result<(), UpdateError> {
        let patch: Patch = serde_json::from_value(patch)?;
        patch
            .validate()
            .map_err(|error| UpdateError::Device(error.into()))
    }

    fn save(&self) -> Blob {
        let state = State {
            start: self.memory.start(),
            size: self.size,
            read_only: self.flusher.is_none(),
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
        Ok(())
    }

    fn metrics(&self) -> Value {
        serde_json::to_value(&self.metrics).expect("counters are plain data")
    }
}

/// `struct virtio_pmem_config` (virtio 1.2 §5.19.4): start, size.
fn config_space(start: u64, size: u64) -> [u8; 16] {
    let mut space = [0; 16];
    space[..8].copy_from_slice(&start.to_le_bytes());
    space[8..].copy_from_slice(&size.to_le_bytes());
    space
}
