//! [`Block`]: the device between queue and image.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vm_memory::VolatileSlice;

use super::request::{Limits, MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS, Request, SERIAL, Status};
use super::settle::Changes;
use super::uring::Uring;
use super::{Backend, CacheType, Config, Metrics, OpenError, Patch, SECTOR, backend, overlap};
use crate::GuestMemory;
use crate::rate_limiter;
use crate::virtio::image_lock::Lock;
use crate::virtio::{
    Blob, Chain, ChainStorage, DeviceError, DeviceInfo, DeviceKind, Histogram, Io, QueueError, Ring, Sibling,
    StateError, Throttle, UpdateError, Vector, VirtioDevice, feature,
};

/// Feature bits (virtio 1.2 §5.2.3).
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const QUEUE_SIZE: u16 = 256;
/// Data segments in a request: all descriptors but those of header and status.
const SEG_MAX: u32 = 254;
/// Sectors to which discards are best aligned: most file systems give back blocks of 4 KiB.
const DISCARD_ALIGNMENT: u32 = 8;
/// The fields of `struct virtio_blk_config` up to `write_zeroes_may_unmap`, with its padding.
const CONFIG_SIZE: usize = 60;

/// A run of the queue ends after this many requests or this much time, whichever comes first. Then the answers go
/// out and the other devices of the loop have their turn. So an answer waits for few others when the disk is slow, and
/// one interrupt serves many when it is fast.
pub(super) const RUN_REQUESTS: u32 = 128;
pub(super) const RUN_TIME: Duration = Duration::from_micros(500);

const KIND: &str = "block";
const STATE_VERSION: u32 = 1;

/// The device's descriptors: the timer of its rate limiter, and what tells that requests have landed.
const LIMITER_TOKEN: u32 = 0;
pub(super) const ENGINE_TOKEN: u32 = 1;

/// What a snapshot keeps: facts that the guest has read and that must hold after the restore, and what is left of limits.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    sectors: u64,
    read_only: bool,
    rate_limiter: rate_limiter::State,
}

/// A virtio block device; with several queues the part that serves one of them.
pub struct Block {
    info: DeviceInfo,
    config: Config,
    pub(super) backend: Arc<dyn Backend>,
    /// The queue that it serves.
    pub(super) queue: u16,
    /// Where the first part leaves its config and backend for the others.
    shared: Arc<Mutex<(Config, Arc<dyn Backend>)>>,
    /// The other parts, until they are split off.
    siblings: Vec<Block>,
    /// What carries requests out so that they overlap; without it each is carried out where it is taken.
    pub(super) engine: Option<Box<Uring>>,
    flush: bool,
    pub(super) throttle: Throttle,
    serial: [u8; SERIAL],
    config_space: [u8; CONFIG_SIZE],
    /// Kept from run to run, so that serving a request allocates nothing.
    storage: ChainStorage,
    pub(super) metrics: Metrics,
}

/// What becomes of a request that was popped.
pub(super) enum Admitted<'m> {
    /// The rate limiter holds it back.
    Held,
    /// It was not valid; so many bytes were written to it.
    Answered(u32),
    /// It is to be carried out, and then answered in this byte.
    Valid(Request, VolatileSlice<'m>),
}

impl Block {
    /// Opens the image of a valid config and makes the device.
    pub(super) fn new(config: &Config) -> Result<Self, OpenError> {
        Self::over(config, backend::open(config, &[])?.into())
    }

    /// The same, over a backend that is open.
    pub(super) fn over(config: &Config, backend: Arc<dyn Backend>) -> Result<Self, OpenError> {
        let engine = overlap::engine(config, &*backend)?;
        let flush = config.cache_type == CacheType::Writeback;
        let queues = config.queue_count();
        let mut features = feature::COMMON | F_SEG_MAX | F_BLK_SIZE;
        features |= if flush { F_FLUSH } else { 0 };
        features |= if queues > 1 { F_MQ } else { 0 };
        features |= if config.read_only() {
            F_RO
        } else {
            F_DISCARD | F_WRITE_ZEROES
        };
        let mut first = Self {
            info: DeviceInfo {
                kind: DeviceKind::Block,
                queue_sizes: vec![QUEUE_SIZE; usize::from(queues)],
                features,
            },
            config_space: config_space(&*backend, config),
            config: config.clone(),
            shared: Arc::new((config.clone(), Arc::clone(&backend)).into()),
            backend,
            engine,
            queue: 0,
            siblings: Vec::new(),
            flush,
            throttle: Throttle::new(config.rate_limiter.as_ref(), LIMITER_TOKEN),
            serial: serial(&config.drive_id),
            storage: ChainStorage::default(),
            metrics: Metrics::default(),
        };
        let siblings = (1..queues).map(|queue| first.sibling(queue));
        first.siblings = siblings.collect::<Result<_, _>>()?;
        Ok(first)
    }

    /// The part that serves another queue of the same drive.
    fn sibling(&self, queue: u16) -> Result<Self, OpenError> {
        let throttle = self.throttle.share().map_err(|source| OpenError::Host {
            op: "make the timer of a queue for",
            path: self.config.path_on_host.clone().unwrap_or_default(),
            source,
        })?;
        Ok(Self {
            info: self.info.clone(),
            config: self.config.clone(),
            engine: overlap::engine(&self.config, &*self.backend)?,
            backend: Arc::clone(&self.backend),
            queue,
            shared: Arc::clone(&self.shared),
            siblings: Vec::new(),
            flush: self.flush,
            throttle,
            serial: self.serial,
            config_space: self.config_space,
            storage: ChainStorage::default(),
            metrics: Metrics::default(),
        })
    }

    /// Serves requests until the queue is empty or the rate limiter holds one back (false), or the run has lasted long
    /// enough (true). The answers are in the ring and still to be published.
    fn run<'m>(
        &mut self,
        ring: &mut Ring<'_, 'm>,
        mem: &'m GuestMemory,
        write_through: bool,
    ) -> Result<bool, DeviceError> {
        if let Some(mut engine) = self.engine.take() {
            let more = self.run_ahead(&mut engine, ring, mem, write_through);
            self.engine = Some(engine);
            return more;
        }
        let mut chain = Chain::from(std::mem::take(&mut self.storage));
        let mut changes = Changes::of_run(&*self.backend);
        let more = self.serve_all(&mut chain, ring, write_through, &mut changes);
        self.storage = chain.into_storage();
        self.settle_run(&changes);
        Ok(more?)
    }

    fn serve_all<'m>(
        &mut self,
        chain: &mut Chain<'m>,
        ring: &mut Ring<'_, 'm>,
        write_through: bool,
        changes: &mut Changes<'m>,
    ) -> Result<bool, QueueError> {
        let (mut now, mut count) = (Instant::now(), 0);
        let end = now + RUN_TIME;
        ring.disable_notify();
        loop {
            if count == RUN_REQUESTS || now >= end {
                return ring.enable_notify();
            }
            if ring.pop(chain)? {
                let Some(written) = self.serve(chain, &mut now, write_through, changes) else {
                    ring.unpop(1);
                    return Ok(false);
                };
                ring.push(chain.head(), written);
                count += 1;
            } else if !ring.enable_notify()? {
                self.metrics.no_avail_buffer += u64::from(count == 0);
                return Ok(false);
            }
        }
    }

    /// Serves one request that begins at `now`, which moves on to its end; returns how many bytes were written to it,
    /// or nothing when the rate limiter holds it back.
    fn serve<'m>(
        &mut self,
        chain: &mut Chain<'m>,
        now: &mut Instant,
        write_through: bool,
        changes: &mut Changes<'m>,
    ) -> Option<u32> {
        match self.admit(chain) {
            Admitted::Held => None,
            Admitted::Answered(written) => Some(written),
            Admitted::Valid(request, status) => {
                let result = self.execute(request, chain, write_through);
                changes.note(request, status, &result);
                let start = std::mem::replace(now, Instant::now());
                Some(self.conclude(request, &status, result, *now - start))
            }
        }
    }

    /// Takes a request apart, which was just popped; one that is not valid is answered.
    pub(super) fn admit<'m>(&mut self, chain: &mut Chain<'m>) -> Admitted<'m> {
        let Some(status_byte) = chain.writable.pop_byte() else {
            // There is no place to say that it is wrong.
            self.metrics.invalid_reqs_count += 1;
            return Admitted::Answered(0);
        };
        let limits = Limits {
            sectors: self.sectors(),
            read_only: self.config.read_only(),
            flush: self.flush,
        };
        match Request::parse(chain, limits) {
            Ok(request) if !self.throttle.take(request.bytes(chain)) => {
                self.metrics.rate_limiter_throttled_events += 1;
                Admitted::Held
            }
            Ok(request) => Admitted::Valid(request, status_byte),
            Err(status) => {
                self.metrics.invalid_reqs_count += 1;
                status_byte.copy_from(&[status as u8]);
                Admitted::Answered(1)
            }
        }
    }

    /// Answers a request that was carried out, with what came of it: how many bytes of data it moved. Returns how many
    /// bytes were written to it.
    pub(super) fn conclude(
        &mut self,
        request: Request,
        status_byte: &VolatileSlice<'_>,
        result: io::Result<usize>,
        time: Duration,
    ) -> u32 {
        let (status, written) = match result {
            Ok(bytes) => (Status::Ok, self.count(request, bytes, time)),
            Err(error) => {
                self.metrics.execute_fails += 1;
                // A broken disk fails every request, so the log gets ever fewer of them.
                if self.metrics.execute_fails.is_power_of_two() {
                    let (fails, serial) = (self.metrics.execute_fails, self.serial_text());
                    log::error!("drive '{serial}': {request:?} failed (failure {fails}): {error}");
                }
                (Status::IoError, 0)
            }
        };
        status_byte.copy_from(&[status as u8]);
        u32::try_from(written + 1).expect("the queue bounds a chain to 4 GiB")
    }

    /// Does what a valid request asks for; returns how many bytes of data it moved.
    pub(super) fn execute(
        &self,
        request: Request,
        chain: &mut Chain<'_>,
        write_through: bool,
    ) -> io::Result<usize> {
        match request {
            Request::Read { offset } => {
                let bytes = chain.writable.len();
                self.backend.read(offset, &mut chain.writable)?;
                Ok(bytes)
            }
            Request::Write { offset } => {
                let bytes = chain.readable.len();
                self.backend.write(offset, &mut chain.readable)?;
                self.write_through(write_through).map(|()| bytes)
            }
            Request::Flush => self.backend.sync().map(|()| 0),
            Request::GetId => Ok(chain.writable.write(0, &self.serial)),
            Request::Discard { offset, len } => self.backend.discard(offset..offset + len).map(|()| 0),
            Request::WriteZeroes {
                offset,
                len,
                may_unmap,
            } => {
                self.backend.write_zeroes(offset..offset + len, may_unmap)?;
                self.write_through(write_through).map(|()| 0)
            }
        }
    }

    /// Makes what was written durable, when the driver counts on that.
    fn write_through(&self, wanted: bool) -> io::Result<()> {
        if wanted { self.backend.sync() } else { Ok(()) }
    }

    fn sectors(&self) -> u64 {
        self.backend.size() / SECTOR
    }

    /// Counts a request that was carried out; returns how many of its bytes went to the guest.
    fn count(&mut self, request: Request, bytes: usize, time: Duration) -> usize {
        let metrics = &mut self.metrics;
        let moved = u64::try_from(bytes).expect("a usize fits");
        match request {
            Request::Read { .. } => {
                metrics.read_count += 1;
                metrics.read_bytes += moved;
                metrics.read_agg.record(time);
                bytes
            }
            Request::Write { .. } => {
                metrics.write_count += 1;
                metrics.write_bytes += moved;
                metrics.write_agg.record(time);
                0
            }
            Request::Flush => {
                metrics.flush_count += 1;
                metrics.flush_agg.record(time);
                0
            }
            Request::GetId => bytes,
            Request::Discard { .. } => {
                metrics.discard_agg.record(time);
                0
            }
            Request::WriteZeroes { .. } => {
                metrics.write_zeroes_agg.record(time);
                0
            }
        }
    }

    fn serve_queue(&mut self, queue: u16, io: &mut Io<'_>) -> Result<(), DeviceError> {
        // A driver may leave queues unused, and events of the device come all the same.
        let running = io.queues.get_mut(usize::from(queue));
        let Some(running) = running.filter(|queue| queue.config().ready) else {
            return Ok(());
        };
        // A driver that takes no flush counts on every write to be durable (virtio 1.2 §5.2.5.1).
        let write_through = self.flush && io.features & F_FLUSH == 0;
        let mut ring = running.open(io.mem)?;
        self.throttle.begin(io.clock);
        let more = self.run(&mut ring, io.mem, write_through);
        ring.publish();
        if ring.needs_interrupt() {
            io.irq.raise(Vector::Queue(queue));
        }
        match more {
            Ok(true) => {
                self.metrics.remaining_reqs_count += u64::from(ring.pending()?);
                io.again = Some(queue);
                Ok(())
            }
            Ok(false) => self.throttle.settle(io.clock),
            Err(error) => {
                self.metrics.event_fails += 1;
                Err(error)
            }
        }
    }

    fn change(&mut self, patch: Value, io: &mut Io<'_>) -> Result<(), UpdateError> {
        let patch: Patch = serde_json::from_value(patch)?;
        let (limits, swap) = (patch.rate_limiter, patch.path_on_host.is_some());
        let mut config = self.config.clone();
        let valid = patch.validate().and_then(|()| config.patch(patch));
        valid.map_err(|error| UpdateError::Device(error.into()))?;
        self.throttle.prepare(limits.as_ref(), io)?;
        if swap {
            // The new image may stand on the old one.
            self.backend.settle().map_err(|source| UpdateError::Host {
                op: format!("bring what drive '{}' has to its image", self.serial_text()),
                source,
            })?;
            let backend = backend::open(&config, self.backend.locks())
                .map_err(|error| UpdateError::Device(error.into()))?;
            self.prepare_swap(&*backend, io)?;
            self.config_space = config_space(&*backend, &config);
            self.backend = backend.into();
            self.backend.locks().iter().for_each(Lock::share);
        }
        self.config = config;
        *self.shared.lock().unwrap_or_else(PoisonError::into_inner) =
            (self.config.clone(), Arc::clone(&self.backend));
        self.throttle.patch(limits.as_ref());
        Ok(())
    }

    pub(super) fn serial_text(&self) -> String {
        String::from_utf8_lossy(&self.serial)
            .trim_end_matches('\0')
            .to_owned()
    }
}

impl VirtioDevice for Block {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn config_space(&self) -> &[u8] {
        &self.config_space
    }

    fn split(&mut self) -> Vec<Sibling> {
        let sibling = |part: Block| Sibling {
            queues: vec![part.queue],
            device: Box::new(part),
        };
        self.siblings.drain(..).map(sibling).collect()
    }

    fn refresh(&mut self, io: &mut Io<'_>) {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        (self.config, self.backend) = shared.clone();
        drop(shared);
        self.refresh_engine(io);
        self.throttle.refresh();
    }

    fn activate(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let result = self.throttle.activate(io).and_then(|()| self.watch_engine(io));
        self.metrics.activate_fails += u64::from(result.is_err());
        result
    }

    fn on_queue(&mut self, queue: u16, io: &mut Io<'_>) -> Result<(), DeviceError> {
        self.metrics.queue_event_count += 1;
        if self.throttle.is_holding() {
            return Ok(());
        }
        self.serve_queue(queue, io)
    }

    fn on_event(&mut self, token: u32, io: &mut Io<'_>) -> Result<(), DeviceError> {
        if token == ENGINE_TOKEN {
            return self.serve_queue(self.queue, io);
        }
        if !self.throttle.release() {
            return Ok(());
        }
        self.metrics.rate_limiter_event_count += 1;
        self.serve_queue(self.queue, io)
    }

    fn quiesce(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        self.land_all(io)?;
        if let Err(error) = self.backend.settle() {
            // Nothing is lost: the next run, flush or pause tries again. No driver resets a disk because of that.
            self.settle_failed(&error);
        }
        Ok(())
    }

    fn end(&mut self) {
        // What is in flight must not write to the guest's memory when the driver has its answer.
        if let Some(engine) = &mut self.engine {
            engine.drain();
        }
    }

    fn reset(&mut self) {
        self.throttle.reset();
    }

    fn update(&mut self, patch: Value, io: &mut Io<'_>) -> Result<(), UpdateError> {
        let result = self.change(patch, io);
        match result {
            Ok(()) => self.metrics.update_count += 1,
            Err(_) => self.metrics.update_fails += 1,
        }
        result
    }

    fn save(&self) -> Blob {
        let state = State {
            sectors: self.sectors(),
            read_only: self.config.read_only(),
            rate_limiter: self.throttle.save(),
        };
        Blob::new(KIND, STATE_VERSION, &state)
    }

    fn load(&mut self, state: Blob) -> Result<(), StateError> {
        let state: State = state.open(KIND, STATE_VERSION)?;
        let inconsistent = |what| StateError::Inconsistent { kind: KIND, what };
        let (serial, sectors) = (self.serial_text(), self.sectors());
        if state.sectors != sectors {
            return Err(inconsistent(format!(
                "drive '{serial}' had {} sectors of {SECTOR} bytes and its image has {sectors}: \
                 restore the image as it was at the snapshot",
                state.sectors
            )));
        }
        if state.read_only != self.config.read_only() {
            return Err(inconsistent(format!(
                "is_read_only of drive '{serial}' is not what it was at the snapshot"
            )));
        }
        self.throttle.load(KIND, state.rate_limiter)
    }

    fn metrics(&self) -> Value {
        serde_json::to_value(&self.metrics).expect("counters are plain data")
    }

    fn histograms(&self) -> Vec<(&'static str, Histogram)> {
        let metrics = &self.metrics;
        vec![
            ("read", metrics.read_agg.spread),
            ("write", metrics.write_agg.spread),
            ("flush", metrics.flush_agg.spread),
            ("discard", metrics.discard_agg.spread),
            ("write_zeroes", metrics.write_zeroes_agg.spread),
        ]
    }
}

/// `struct virtio_blk_config` (virtio 1.2 §5.2.4), of which the unnamed fields belong to features that are not offered.
fn config_space(backend: &dyn Backend, config: &Config) -> [u8; CONFIG_SIZE] {
    let mut space = [0; CONFIG_SIZE];
    let mut put = |at: usize, value: u32| space[at..at + 4].copy_from_slice(&value.to_le_bytes());
    put(12, SEG_MAX);
    put(20, 512);
    if !config.read_only() {
        put(36, MAX_DISCARD_SECTORS);
        put(40, 1);
        put(44, DISCARD_ALIGNMENT);
        put(48, MAX_WRITE_ZEROES_SECTORS);
        put(52, 1);
        put(56, 1);
    }
    if config.queue_count() > 1 {
        space[34..36].copy_from_slice(&config.queue_count().to_le_bytes());
    }
    space[..8].copy_from_slice(&(backend.size() / SECTOR).to_le_bytes());
    space
}

/// The serial number: the drive's id, cut or padded with zeros to 20 bytes.
fn serial(drive_id: &str) -> [u8; SERIAL] {
    let mut serial = [0; SERIAL];
    let id = &drive_id.as_bytes()[..drive_id.floor_char_boundary(SERIAL)];
    serial[..id.len()].copy_from_slice(id);
    serial
}
