//! [`Balloon`]: the device.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::hinting::Hinting;
use super::metrics::Metrics;
use super::reclaim::{Released, release, release_piece};
use super::stats::{StatisticsStatus, Stats};
use super::{Config, PAGES_PER_MIB, Patch, PatchError, feature, ranges};
use crate::GuestMemory;
use crate::timer::Timer;
use crate::virtio::{
    Blob, Chain, ChainStorage, DeviceError, DeviceInfo, DeviceKind, Io, QueueError, StateError, UpdateError,
    Vector, VirtioDevice, feature as common,
};

const QUEUE_SIZE: u16 = 256;
/// The most requests served before other devices have their turn.
const TURN: usize = 16;
/// The timer of the statistics.
const TIMER_TOKEN: u32 = 0;

const KIND: &str = "balloon";
const STATE_VERSION: u32 = 1;

/// Fields of `struct virtio_balloon_config` (virtio 1.2 §5.5.4).
mod field {
    pub(super) const NUM_PAGES: usize = 0;
    pub(super) const ACTUAL: usize = 4;
    pub(super) const FREE_PAGE_HINT_CMD_ID: usize = 8;
    pub(super) const END: usize = 12;
}

/// The device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The count of pages has 32 bits.
    #[error(
        "Amount of pages requested is too large: amount_mib is {0}, and {max} is the most",
        max = u32::MAX / PAGES_PER_MIB
    )]
    TooLarge(u32),
    /// The host has no timer left for the statistics.
    #[error("cannot make the timer of the statistics")]
    Timer(#[source] io::Error),
}

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Hinting,
    Reporting,
}

/// The roles in the order of their queues, with the feature that each needs.
const ROLES: [(Role, u64); 5] = [
    (Role::Inflate, 0),
    (Role::Deflate, 0),
    (Role::Statistics, feature::STATS_VQ),
    (Role::Hinting, feature::FREE_PAGE_HINT),
    (Role::Reporting, feature::REPORTING),
];

/// What a snapshot keeps.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    target_pages: u32,
    actual_pages: u32,
    statistics: Stats,
    held_statistics: Option<u16>,
    hinting: Hinting,
}

/// The statistics: what the guest has told, and how it is asked for more.
struct Statistics {
    timer: Timer,
    interval: Duration,
    last: Stats,
    /// The driver's buffer; giving it back asks for the next set.
    held: Option<u16>,
}

impl Statistics {
    /// Waits for the moment at which the next set is due.
    fn wait(&mut self) -> Result<(), DeviceError> {
        let set = self.timer.set(self.interval);
        set.map_err(host("set the timer of the balloon's statistics"))
    }
}

/// The memory balloon.
pub struct Balloon {
    info: DeviceInfo,
    config_space: [u8; field::END],
    /// None when the user wants none.
    statistics: Option<Statistics>,
    hinting: Hinting,
    /// What the running queues are for.
    roles: Vec<Option<Role>>,
    /// Kept from request to request, so that serving one allocates nothing.
    pfns: Vec<u32>,
    storage: ChainStorage,
    metrics: Metrics,
}

impl Balloon {
    pub(super) fn new(config: &Config) -> Result<Self, OpenError> {
        let pages = config.amount_mib.checked_mul(PAGES_PER_MIB);
        let pages = pages.ok_or(OpenError::TooLarge(config.amount_mib))?;
        let statistics = match config.stats_polling_interval_s {
            0 => None,
            seconds => Some(Statistics {
                timer: Timer::new().map_err(OpenError::Timer)?,
                interval: Duration::from_secs(seconds.into()),
                last: Stats::default(),
                held: None,
            }),
        };
        let features = config.features();
        // Every queue has room at its place, whichever of those before it there are.
        let last = ROLES.iter().rposition(|(_, needs)| features & needs == *needs);
        let queues = last.expect("two need no feature") + 1;
        let mut balloon = Self {
            info: DeviceInfo {
                kind: DeviceKind::Balloon,
                queue_sizes: vec![QUEUE_SIZE; queues],
                features: common::COMMON | features,
            },
            config_space: [0; field::END],
            statistics,
            hinting: Hinting::default(),
            roles: Vec::new(),
            pfns: Vec::new(),
            storage: ChainStorage::default(),
            metrics: Metrics::default(),
        };
        balloon.set(field::NUM_PAGES, pages);
        Ok(balloon)
    }

    fn set(&mut self, field: usize, value: u32) {
        self.config_space[field..field + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn get(&self, field: usize) -> u32 {
        let bytes = self.config_space[field..].first_chunk();
        u32::from_le_bytes(*bytes.expect("four bytes each"))
    }

    /// The configuration space as long as the features make it.
    fn shown(&self) -> &[u8] {
        let hinting = self.info.features & feature::FREE_PAGE_HINT != 0;
        let end = if hinting {
            field::END
        } else {
            field::FREE_PAGE_HINT_CMD_ID
        };
        &self.config_space[..end]
    }

    /// Tells each queue that the driver has set up its role. The specification numbers the queues with those counted
    /// that a device does not have; Linux leaves them out. Both set up the queues of the features they accepted, in
    /// order.
    fn assign_roles(&mut self, io: &Io<'_>) {
        let mut wanted = ROLES
            .iter()
            .filter(|(_, needs)| io.features & needs == *needs)
            .map(|(role, _)| *role);
        let queues = io.queues.iter();
        self.roles = queues
            .map(|queue| queue.config().ready.then(|| wanted.next()).flatten())
            .collect();
    }

    fn start(&mut self, io: &Io<'_>) -> Result<(), DeviceError> {
        self.assign_roles(io);
        match &mut self.statistics {
            Some(statistics) if io.features & feature::STATS_VQ != 0 => {
                let fd = statistics.timer.as_raw_fd();
                let watched = io.watch.add(fd, TIMER_TOKEN);
                watched.map_err(host("watch the timer of the balloon's statistics"))?;
                statistics.wait()
            }
            _ => Ok(()),
        }
    }

    /// Serves what the driver has offered on a queue, at most one turn of it, and interrupts it once.
    fn serve(&mut self, role: Role, queue: u16, io: &mut Io<'_>) -> Result<(), QueueError> {
        let mut chain = Chain::from(std::mem::take(&mut self.storage));
        let mut ring = io.queues[usize::from(queue)].open(io.mem)?;
        ring.disable_notify();
        io.again = Some(queue);
        for _ in 0..TURN {
            if ring.pop(&mut chain)? {
                let answered = self.take(role, &chain, io.mem);
                if self.show_command() {
                    io.config.set(self.shown());
                    io.irq.raise(Vector::Config);
                }
                if let Some(head) = answered {
                    ring.push(head, 0);
                }
            } else if !ring.enable_notify()? {
                io.again = None;
                break;
            }
        }
        self.storage = chain.into_storage();
        ring.publish();
        if ring.needs_interrupt() {
            io.irq.raise(Vector::Queue(queue));
        }
        Ok(())
    }

    /// Does what a request asks; returns the head of the one that is answered by that.
    fn take(&mut self, role: Role, chain: &Chain<'_>, mem: &GuestMemory) -> Option<u16> {
        match role {
            Role::Inflate => self.inflate(chain, mem),
            // The host gives a page back when the guest touches it.
            Role::Deflate => self.metrics.deflate_count += 1,
            Role::Statistics => return self.hold_statistics(chain),
            Role::Hinting => self.take_hint(chain, mem),
            Role::Reporting => release_pieces(chain, mem, |released| self.metrics.reported(released)),
        }
        Some(chain.head())
    }

    fn inflate(&mut self, chain: &Chain<'_>, mem: &GuestMemory) {
        self.metrics.inflate_count += 1;
        let mut released = Released {
            bytes: 0,
            failed: !ranges::read(&chain.readable, &mut self.pfns),
        };
        for addresses in ranges::coalesce(&mut self.pfns) {
            released.add(release(mem, addresses));
        }
        self.metrics.event_fails += u64::from(released.failed);
    }

    /// Keeps the driver's buffer until the next set is due. A driver that offers a second one has the first back.
    fn hold_statistics(&mut self, chain: &Chain<'_>) -> Option<u16> {
        let statistics = self.statistics.as_mut()?;
        match statistics.last.read(&chain.readable) {
            true => self.metrics.stats_updates_count += 1,
            false => self.metrics.stats_update_fails += 1,
        }
        statistics.held.replace(chain.head())
    }

    /// Gives the held buffer back, so that the driver fills another one.
    fn ask_for_statistics(&mut self, io: &mut Io<'_>) -> Result<(), QueueError> {
        let held = self.statistics.as_mut().and_then(|stats| stats.held.take());
        let is_it = |role: &Option<Role>| *role == Some(Role::Statistics);
        let (Some(head), Some(queue)) = (held, self.roles.iter().position(is_it)) else {
            return Ok(());
        };
        let mut ring = io.queues[queue].open(io.mem)?;
        ring.push(head, 0);
        ring.publish();
        if ring.needs_interrupt() {
            let queue = u16::try_from(queue).expect("there are five queues");
            io.irq.raise(Vector::Queue(queue));
        }
        Ok(())
    }

    /// Follows what the driver says, and gives back the pages of the run that is going on.
    fn take_hint(&mut self, chain: &Chain<'_>, mem: &GuestMemory) {
        if !chain.readable.is_empty() {
            match chain.readable.read_obj::<u32>(0) {
                Some(command) => drop(self.hinting.follow(u32::from_le(command))),
                None => self.metrics.free_page_hint_fails += 1,
            }
        }
        if self.hinting.is_answered() {
            release_pieces(chain, mem, |released| self.metrics.hinted(released));
        } else if !chain.writable.is_empty() {
            // The driver may be using them by now.
            self.metrics.hinted(Released::FAILED);
        }
    }

    /// Brings the configuration space in line with hinting; true when that changes it.
    fn show_command(&mut self) -> bool {
        let command = self.hinting.host_cmd();
        let changes = self.get(field::FREE_PAGE_HINT_CMD_ID) != command;
        self.set(field::FREE_PAGE_HINT_CMD_ID, command);
        changes
    }

    fn change(&mut self, patch: &Patch) -> Result<(), UpdateError> {
        let refused = |error: PatchError| UpdateError::Device(error.into());
        match patch {
            Patch::Target(target) => {
                let pages = target.amount_mib.checked_mul(PAGES_PER_MIB);
                let too_large = || UpdateError::Device(OpenError::TooLarge(target.amount_mib).into());
                self.set(field::NUM_PAGES, pages.ok_or_else(too_large)?);
            }
            Patch::Statistics(patch) => {
                let interval = Duration::from_secs(patch.stats_polling_interval_s.into());
                match &mut self.statistics {
                    Some(statistics) if !interval.is_zero() => {
                        let set = statistics.timer.set(interval);
                        set.map_err(|source| UpdateError::Host {
                            op: "set the timer of the statistics".into(),
                            source,
                        })?;
                        statistics.interval = interval;
                    }
                    None if interval.is_zero() => {}
                    _ => return Err(refused(PatchError::StatisticsStateChange)),
                }
            }
            Patch::StartHinting(_) | Patch::StopHinting
                if self.info.features & feature::FREE_PAGE_HINT == 0 =>
            {
                return Err(refused(PatchError::HintingDisabled));
            }
            Patch::StartHinting(start) => self.hinting.start(start.acknowledge_on_stop),
            Patch::StopHinting => self.hinting.stop(),
        }
        self.show_command();
        Ok(())
    }

    /// The target and the size, and what the guest has told of its memory.
    fn statistics(&self) -> Option<StatisticsStatus> {
        let statistics = self.statistics.as_ref()?;
        let (target_pages, actual_pages) = (self.get(field::NUM_PAGES), self.get(field::ACTUAL));
        Some(StatisticsStatus {
            target_pages,
            actual_pages,
            target_mib: target_pages / PAGES_PER_MIB,
            actual_mib: actual_pages / PAGES_PER_MIB,
            told: statistics.last.clone(),
        })
    }
}

impl VirtioDevice for Balloon {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn config_space(&self) -> &[u8] {
        self.shown()
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let actual = field::ACTUAL..field::ACTUAL + 4;
        let end = offset.saturating_add(data.len());
        if offset >= actual.start && end <= actual.end {
            self.config_space[offset..end].copy_from_slice(data);
        }
    }

    fn activate(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let result = self.start(io);
        self.metrics.activate_fails += u64::from(result.is_err());
        result
    }

    fn on_queue(&mut self, queue: u16, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let Some(role) = self.roles.get(usize::from(queue)).copied().flatten() else {
            return Ok(());
        };
        let result = self.serve(role, queue, io);
        let fails = match role {
            Role::Statistics => &mut self.metrics.stats_update_fails,
            _ => &mut self.metrics.event_fails,
        };
        *fails += u64::from(result.is_err());
        Ok(result?)
    }

    fn on_event(&mut self, _token: u32, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let result = self.ask_for_statistics(io);
        self.metrics.stats_update_fails += u64::from(result.is_err());
        result?;
        self.statistics.as_mut().map_or(Ok(()), Statistics::wait)
    }

    fn reset(&mut self) {
        // The pages are the guest's again, and its next driver begins with none.
        self.set(field::ACTUAL, 0);
        self.hinting.reset();
        self.show_command();
        self.roles.clear();
        if let Some(statistics) = &mut self.statistics {
            statistics.held = None;
            statistics.last = Stats::default();
            if let Err(error) = statistics.timer.stop() {
                log::warn!("balloon: the timer of the statistics cannot be stopped: {error}");
            }
        }
    }

    fn update(&mut self, patch: Value, io: &mut Io<'_>) -> Result<(), UpdateError> {
        let patch: Patch = serde_json::from_value(patch)?;
        if io.queues.is_empty() {
            return Err(UpdateError::Device(PatchError::NotActive.into()));
        }
        self.change(&patch)
    }

    fn save(&self) -> Blob {
        let statistics = self.statistics.as_ref();
        let state = State {
            target_pages: self.get(field::NUM_PAGES),
            actual_pages: self.get(field::ACTUAL),
            statistics: statistics.map(|stats| stats.last.clone()).unwrap_or_default(),
            held_statistics: statistics.and_then(|stats| stats.held),
            hinting: self.hinting,
        };
        Blob::new(KIND, STATE_VERSION, &state)
    }

    fn load(&mut self, state: Blob) -> Result<(), StateError> {
        let state: State = state.open(KIND, STATE_VERSION)?;
        if state.held_statistics.is_some_and(|head| head >= QUEUE_SIZE) {
            return Err(StateError::Inconsistent {
                kind: KIND,
                what: "it holds a buffer that the queue of the statistics cannot have".into(),
            });
        }
        if let Some(statistics) = &mut self.statistics {
            statistics.last = state.statistics;
            statistics.held = state.held_statistics;
        }
        self.hinting = state.hinting;
        self.set(field::NUM_PAGES, state.target_pages);
        self.set(field::ACTUAL, state.actual_pages);
        self.show_command();
        Ok(())
    }

    fn status(&self) -> Value {
        let hinting = self.info.features & feature::FREE_PAGE_HINT != 0;
        json!({
            "statistics": self.statistics(),
            "hinting": hinting.then(|| self.hinting.status()),
        })
    }

    fn metrics(&self) -> Value {
        serde_json::to_value(&self.metrics).expect("counters are plain data")
    }
}

/// Gives back what a chain names, piece by piece.
fn release_pieces(chain: &Chain<'_>, mem: &GuestMemory, mut count: impl FnMut(Released)) {
    for piece in chain.writable.iovecs() {
        count(release_piece(mem, piece.iov_base.addr(), piece.iov_len));
    }
}

fn host(op: &'static str) -> impl Fn(io::Error) -> DeviceError {
    move |source| DeviceError::Host { op, source }
}
