//! [`VhostUserBlock`]: the device between the driver's registers and a backend.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vmm_sys_util::eventfd::EventFd;

use super::backend::{Backend, Inflight, Start};
use super::requests::{fail_left, fail_pending, unclear};
use super::{GRACE, Metrics, OpenError, PATIENT, RETRY};
use crate::timer::Timer;
use crate::virtio::block::{CacheType, Config, Patch};
use crate::virtio::{
    Blob, DeviceError, DeviceInfo, DeviceKind, Io, StateError, UpdateError, Vector, VirtioDevice, feature,
};

const F_FLUSH: u64 = 1 << 9;
const F_MQ: u64 = 1 << 12;
/// What a backend's features may be: sizes, read-only, block size, flush, topology, queues, discards, zeroes. Not the
/// switch of the write cache, which the driver would write to the configuration space.
const KNOWN: u64 = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 6 | F_FLUSH | 1 << 10 | F_MQ | 1 << 13 | 1 << 14;

const QUEUE_SIZE: u16 = 256;
/// The configuration space up to what the known features use.
const CONFIG_SIZE: usize = 60;
/// Where it has the count of queues.
const NUM_QUEUES: usize = 34;

const KIND: &str = "vhost-user-block";
const STATE_VERSION: u32 = 1;

/// The device's descriptors: the connection, the backend's channel, the timer, and two for each queue.
const CONNECTION: u32 = 0;
const CHANNEL: u32 = 1;
const TIMER: u32 = 2;
const CALLS: u32 = 0x100;
const KICKS: u32 = 0x200;

/// What a snapshot keeps: what the guest has read.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    features: u64,
    config: Vec<u8>,
}

/// Whether somebody serves the queues.
enum Service {
    /// The backend does, or will once the driver is ready.
    Backend(Box<Backend>),
    /// Nobody: requests wait until this moment.
    Away { until: Instant },
    /// Nobody: requests fail.
    Failing,
}

/// A disk with a backend.
pub struct VhostUserBlock {
    info: DeviceInfo,
    drive_id: String,
    socket: PathBuf,
    service: Service,
    config: Vec<u8>,
    calls: Vec<EventFd>,
    timer: Timer,
    /// The queues that run at the backend.
    running: Vec<u16>,
    /// Nobody has been told yet where the queues stand that the last backend has left.
    abandoned: bool,
    inflight: Option<Inflight>,
    metrics: Metrics,
}

impl VhostUserBlock {
    /// Connects to the backend of a valid config and makes the device.
    pub(crate) fn new(config: &Config) -> Result<Self, OpenError> {
        let path = config.socket.clone().unwrap_or_default();
        let host = |source| OpenError::Host { source };
        let queues = config.queue_count();
        let started = Instant::now();
        let connected = Backend::connect(path.as_ref(), queues);
        let mut backend = connected.map_err(|source| refusal(&path, source))?;
        let space = backend.config_space(CONFIG_SIZE);
        let space = space.map_err(|source| refusal(&path, source))?;
        if backend.features & feature::VERSION_1 == 0 {
            let source = io::Error::new(io::ErrorKind::Unsupported, "it is older than virtio 1.0");
            return Err(refusal(&path, source));
        }
        let mut features = backend.features & (KNOWN | feature::COMMON);
        if config.cache_type == CacheType::Unsafe {
            features &= !F_FLUSH;
        }
        if queues == 1 {
            features &= !F_MQ;
        }
        let call = |_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let mut device = Self {
            info: DeviceInfo {
                kind: DeviceKind::Block,
                queue_sizes: vec![QUEUE_SIZE; usize::from(queues)],
                features,
            },
            drive_id: config.drive_id.clone(),
            socket: path.into(),
            service: Service::Backend(Box::new(backend)),
            config: Vec::new(),
            calls: (0..queues).map(call).collect::<Result<_, _>>().map_err(host)?,
            timer: Timer::new().map_err(host)?,
            running: Vec::new(),
            abandoned: false,
            inflight: None,
            metrics: Metrics::default(),
        };
        device.metrics.init_time_us = micros(started);
        device.show(space);
        Ok(device)
    }

    /// Takes the backend's configuration space, with the count of queues that the device has.
    fn show(&mut self, mut space: Vec<u8>) {
        let queues = if self.calls.len() > 1 { self.calls.len() } else { 0 };
        let queues = u16::try_from(queues).unwrap_or(u16::MAX);
        space[NUM_QUEUES..NUM_QUEUES + 2].copy_from_slice(&queues.to_le_bytes());
        self.config = space;
    }

    /// Has the backend serve the queues from where they stand.
    fn start(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        if !matches!(self.service, Service::Backend(_)) || !self.running.is_empty() {
            return Ok(());
        }
        let before = Instant::now();
        let bases = self.bases(io)?;
        match self.start_at(&bases, io) {
            Ok(()) => {
                self.metrics.activate_time_us = micros(before);
                // What came while nobody listened.
                io.kicks.iter().for_each(nudge);
            }
            Err(error) => {
                self.metrics.activate_fails += 1;
                self.lose(&error, io)?;
            }
        }
        Ok(())
    }

    fn start_at(&mut self, bases: &[u16], io: &mut Io<'_>) -> io::Result<()> {
        let Service::Backend(backend) = &mut self.service else {
            return Ok(());
        };
        let queues = u16::try_from(self.calls.len()).map_err(io::Error::other)?;
        let queues = (queues, QUEUE_SIZE);
        backend.prepare(io.mem, io.features, queues, &mut self.inflight)?;
        backend.begin();
        for (index, base) in (0u16..).zip(bases) {
            let place = usize::from(index);
            let config = io.queues[place].config();
            if config.ready {
                let queue = Start {
                    index,
                    config,
                    base: *base,
                    kick: &io.kicks[place],
                    call: &self.calls[place],
                };
                // From the first message on, it may work on the queue.
                self.running.push(index);
                backend.start(io.mem, &queue)?;
            }
        }
        Ok(())
    }

    /// Where each queue goes on. What a backend left behind that died is to be done again: it is what follows the last
    /// answer if the backend has answered in order, or if the shared memory says more to the next one, which takes it.
    /// Otherwise it is answered with an error.
    fn bases(&mut self, io: &mut Io<'_>) -> Result<Vec<u16>, DeviceError> {
        if std::mem::take(&mut self.abandoned) {
            let takes = matches!(&self.service, Service::Backend(backend) if backend.keeps_inflight());
            self.inflight = self.inflight.take().filter(|_| takes);
            let told = self.inflight.is_some();
            for (index, queue) in (0u16..).zip(io.queues.iter_mut()) {
                if !queue.config().ready {
                    continue;
                }
                let ring = queue.open(io.mem)?;
                let (_, used) = ring.indexes();
                if told || ring.left().ok_or_else(unclear)?.in_order {
                    queue.go_on_from(used, used);
                } else {
                    fail_left(queue, io.mem)?;
                    io.irq.raise(Vector::Queue(index));
                }
            }
        }
        Ok(io.queues.iter().map(|queue| queue.next_available()).collect())
    }

    /// The backend has gone, or is not to be talked to any more.
    fn lose(&mut self, error: &io::Error, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let Service::Backend(backend) = &self.service else {
            return Ok(());
        };
        log::warn!(
            "drive '{}': its vhost-user backend is lost ({error}); connecting to '{}' again",
            self.drive_id,
            self.socket.display()
        );
        let (connection, channel) = backend.fds();
        for fd in [Some(connection), channel].into_iter().flatten() {
            // What the loop does not know has nothing to be removed.
            let _ = io.watch.remove(fd);
        }
        self.abandoned |= !std::mem::take(&mut self.running).is_empty();
        let until = io.clock.now() + GRACE;
        self.service = Service::Away { until };
        self.timer
            .set(RETRY)
            .map_err(failed("set the timer of a vhost-user drive"))
    }

    /// Tries to get a backend again.
    fn retry(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let until = match self.service {
            Service::Backend(_) => return Ok(()),
            Service::Away { until } => Some(until),
            Service::Failing => None,
        };
        let before = Instant::now();
        match self.reconnect() {
            Ok((backend, space)) => self.welcome(backend, space, before, io),
            Err(error) => {
                if until.is_some_and(|until| io.clock.now() >= until) {
                    log::error!(
                        "drive '{}': no vhost-user backend for {GRACE:?} ({error}): requests fail",
                        self.drive_id
                    );
                    self.give_up(io)?;
                }
                let delay = RETRY.max(before.elapsed() * PATIENT);
                self.timer
                    .set(delay)
                    .map_err(failed("set the timer of a vhost-user drive"))
            }
        }
    }

    /// A connection to a backend that can take the place of the one before.
    fn reconnect(&self) -> io::Result<(Backend, Vec<u8>)> {
        let queues = u16::try_from(self.calls.len()).map_err(io::Error::other)?;
        let mut backend = Backend::connect(&self.socket, queues)?;
        let missing = self.info.features & !F_MQ & !backend.features;
        if missing != 0 {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("it lacks the features {missing:#x} of the one before"),
            ));
        }
        let space = backend.config_space(CONFIG_SIZE)?;
        Ok((backend, space))
    }

    fn welcome(
        &mut self,
        backend: Backend,
        space: Vec<u8>,
        before: Instant,
        io: &mut Io<'_>,
    ) -> Result<(), DeviceError> {
        self.metrics.init_time_us = micros(before);
        unwatch_kicks(io);
        self.service = Service::Backend(Box::new(backend));
        self.watch_backend(io)?;
        self.show(space);
        if io.config.set(&self.config) {
            io.irq.raise(Vector::Config);
        }
        self.start(io)?;
        if !self.running.is_empty() {
            log::info!("drive '{}': its vhost-user backend is back", self.drive_id);
        }
        Ok(())
    }

    /// Answers all requests with errors from now on.
    fn give_up(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        self.service = Service::Failing;
        self.inflight = None;
        if std::mem::take(&mut self.abandoned) {
            for queue in io.queues.iter_mut().filter(|queue| queue.config().ready) {
                fail_left(queue, io.mem)?;
            }
        }
        for (index, kick) in (0u16..).zip(io.kicks) {
            if io.queues[usize::from(index)].config().ready {
                let watched = io.watch.add(kick.as_raw_fd(), KICKS + u32::from(index));
                watched.map_err(failed("watch a queue's notifications"))?;
                self.fail_queue(index, io)?;
                io.irq.raise(Vector::Queue(index));
            }
        }
        Ok(())
    }

    fn service_fails(&self) -> bool {
        matches!(self.service, Service::Failing)
    }

    /// Answers what waits in a queue with errors.
    fn fail_queue(&self, index: u16, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let mut ring = io.queues[usize::from(index)].open(io.mem)?;
        let more = fail_pending(&mut ring)?;
        if ring.needs_interrupt() {
            io.irq.raise(Vector::Queue(index));
        }
        if more {
            nudge(&io.kicks[usize::from(index)]);
        }
        Ok(())
    }

    fn watch_backend(&self, io: &Io<'_>) -> Result<(), DeviceError> {
        let Service::Backend(backend) = &self.service else {
            return Ok(());
        };
        let (connection, channel) = backend.fds();
        let mut watch = vec![(connection, CONNECTION)];
        watch.extend(channel.map(|channel| (channel, CHANNEL)));
        watch_all(&watch, io)
    }

    /// The backend's configuration space may be another one.
    fn refresh_config(&mut self) -> io::Result<()> {
        let before = Instant::now();
        let Service::Backend(backend) = &mut self.service else {
            return Err(io::Error::new(io::ErrorKind::NotConnected, "the backend is away"));
        };
        let space = backend
            .config_space(CONFIG_SIZE)
            .inspect_err(|_| self.metrics.cfg_fails += 1)?;
        self.show(space);
        self.metrics.config_change_time_us = micros(before);
        Ok(())
    }

    fn on_connection(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        match &self.service {
            Service::Backend(backend) if backend.is_broken() => {
                self.lose(&io::ErrorKind::ConnectionReset.into(), io)
            }
            _ => Ok(()),
        }
    }

    fn on_channel(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let Service::Backend(backend) = &self.service else {
            return Ok(());
        };
        let changed = match backend.config_has_changed() {
            Ok(false) => return Ok(()),
            Ok(true) => self.refresh_config(),
            Err(error) => Err(error),
        };
        if let Err(error) = changed {
            return self.lose(&error, io);
        }
        if io.config.set(&self.config) {
            io.irq.raise(Vector::Config);
        }
        Ok(())
    }

    /// Has the backend stop; tells of each queue the index of the available ring at which to go on.
    fn stop(&mut self) -> io::Result<Vec<(u16, u16)>> {
        let running = std::mem::take(&mut self.running);
        let Service::Backend(backend) = &mut self.service else {
            return Ok(Vec::new());
        };
        let stop = |index: u16| Ok((index, backend.stop(index)?));
        let stopped = running.into_iter().map(stop).collect();
        self.abandoned |= io::Result::is_err(&stopped);
        self.inflight = self.inflight.take().filter(|_| stopped.is_err());
        stopped
    }

    fn change(&mut self, patch: Value) -> Result<(), UpdateError> {
        let patch: Patch = serde_json::from_value(patch)?;
        if patch.path_on_host.is_some() || patch.rate_limiter.is_some() {
            let id = &self.drive_id;
            return Err(UpdateError::Refused(format!(
                "drive '{id}' has a vhost-user backend, which has its image and limits: change them there, and give \
                 neither path_on_host nor rate_limiter"
            )));
        }
        self.refresh_config().map_err(|source| UpdateError::Host {
            op: format!(
                "read the configuration of drive '{}' from its vhost-user backend",
                self.drive_id
            ),
            source,
        })
    }
}

impl VirtioDevice for VhostUserBlock {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn config_space(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let calls = self.calls.iter().map(AsRawFd::as_raw_fd).zip(CALLS..);
        let mut watch = vec![(self.timer.as_raw_fd(), TIMER)];
        watch.extend(calls);
        watch_all(&watch, io)?;
        unwatch_kicks(io);
        match &self.service {
            Service::Backend(backend) if backend.is_broken() => {
                self.lose(&io::ErrorKind::ConnectionReset.into(), io)
            }
            Service::Backend(_) => {
                self.watch_backend(io)?;
                self.start(io)
            }
            Service::Away { .. } | Service::Failing => {
                let until = io.clock.now() + GRACE;
                self.service = Service::Away { until };
                let set = self.timer.set(Duration::ZERO);
                set.map_err(failed("set the timer of a vhost-user drive"))
            }
        }
    }

    /// Only after a resume: the backend works on the queue otherwise.
    fn on_queue(&mut self, queue: u16, io: &mut Io<'_>) -> Result<(), DeviceError> {
        match self.service {
            Service::Failing => self.fail_queue(queue, io),
            _ => self.start(io),
        }
    }

    fn on_event(&mut self, token: u32, io: &mut Io<'_>) -> Result<(), DeviceError> {
        match token {
            CONNECTION => self.on_connection(io),
            CHANNEL => self.on_channel(io),
            TIMER => self.retry(io),
            KICKS.. => match (self.service_fails(), u16::try_from(token - KICKS)) {
                (true, Ok(queue)) => self.fail_queue(queue, io),
                _ => Ok(()),
            },
            _ => {
                if let Ok(queue) = u16::try_from(token.saturating_sub(CALLS)) {
                    io.irq.raise(Vector::Queue(queue));
                }
                Ok(())
            }
        }
    }

    fn quiesce(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let stopped = match self.stop() {
            Ok(stopped) => stopped,
            Err(error) => return self.lose(&error, io),
        };
        for (index, available) in stopped {
            let queue = &mut io.queues[usize::from(index)];
            let (_, used) = queue.open(io.mem)?.indexes();
            queue.go_on_from(available, used);
        }
        Ok(())
    }

    /// All of it here, as the thread that resets must not wait for a backend, or talk to it.
    fn end(&mut self) {
        if let Err(error) = self.stop() {
            log::warn!(
                "drive '{}': its vhost-user backend does not stop: {error}",
                self.drive_id
            );
            // It stops when nobody is there any more.
            self.service = Service::Failing;
        }
        self.abandoned = false;
        self.inflight = None;
    }

    fn update(&mut self, patch: Value, _io: &mut Io<'_>) -> Result<(), UpdateError> {
        self.change(patch)
    }

    fn save(&self) -> Blob {
        let state = State {
            features: self.info.features,
            config: self.config.clone(),
        };
        Blob::new(KIND, STATE_VERSION, &state)
    }

    fn load(&mut self, state: Blob) -> Result<(), StateError> {
        let state: State = state.open(KIND, STATE_VERSION)?;
        if state.features & !self.info.features == 0 && state.config == self.config {
            return Ok(());
        }
        Err(StateError::Inconsistent {
            kind: KIND,
            what: format!(
                "the backend of drive '{}' is not as it was at the snapshot",
                self.drive_id
            ),
        })
    }

    fn metrics(&self) -> Value {
        serde_json::to_value(&self.metrics).expect("counters are plain data")
    }
}

/// Has whoever serves a queue look at it.
fn nudge(kick: &Arc<EventFd>) {
    // Only a full counter refuses, and then somebody has been told already.
    let _ = kick.write(1);
}

/// Leaves the notifications to the backend.
fn unwatch_kicks(io: &Io<'_>) {
    for kick in io.kicks {
        // What the loop does not watch has nothing to be removed.
        let _ = io.watch.remove(kick.as_raw_fd());
    }
}

fn watch_all(watch: &[(RawFd, u32)], io: &Io<'_>) -> Result<(), DeviceError> {
    let mut watch = watch.iter();
    let watched = watch.try_for_each(|(fd, token)| io.watch.add(*fd, *token));
    watched.map_err(failed("watch the descriptors of a vhost-user drive"))
}

fn failed(op: &'static str) -> impl Fn(io::Error) -> DeviceError {
    move |source| DeviceError::Host { op, source }
}

fn refusal(path: &str, source: io::Error) -> OpenError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::NotFound
        | io::ErrorKind::ConnectionRefused
        | io::ErrorKind::PermissionDenied
        | io::ErrorKind::InvalidFilename
        | io::ErrorKind::WouldBlock => OpenError::Connect { path, source },
        _ => OpenError::Unsuitable { path, source },
    }
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}
