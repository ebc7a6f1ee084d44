//! [`Mem`]: the device.

use std::io;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::blocks::{BlockState, Blocks, Part};
use super::request::{Kind, Request, Response};
use super::{Config, Metrics, Patch, Status};
use crate::memory_host::{MemoryHost, MemoryHostError, SlottedMemory};
use crate::virtio::{
    Blob, Chain, DeviceError, DeviceInfo, DeviceKind, Histogram, Io, QueueError, StateError, UpdateError,
    Vector, VirtioDevice, feature,
};

/// The driver must not touch unplugged memory (virtio 1.2 §5.15.3).
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

const QUEUE_SIZE: u16 = 64;
/// The most requests served before other devices have their turn.
const TURN: usize = 8;
/// The largest piece in which Linux adds memory; with less, one that does could not use any of it.
const LINUX_BLOCK: u64 = 2 << 30;
/// Bytes of `struct virtio_mem_config`.
const CONFIG_SIZE: usize = 56;

const KIND: &str = "memory_hotplug";
const STATE_VERSION: u32 = 1;

/// What a snapshot keeps beside the content of the plugged blocks.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// Guest address of the region.
    start: u64,
    /// Bytes that the guest should have.
    requested: u64,
    /// Bytes of the region in which it may plug.
    usable: u64,
    /// The plugged blocks: first, and how many.
    plugged: Vec<(u64, u64)>,
}

/// The memory device.
pub struct Mem {
    info: DeviceInfo,
    config: Config,
    config_space: [u8; CONFIG_SIZE],
    memory: Box<dyn SlottedMemory>,
    blocks: Blocks,
    /// Bytes that the guest should have.
    requested: u64,
    /// Bytes from the start of the region that the guest may plug.
    usable: u64,
    metrics: Metrics,
}

impl Mem {
    /// Takes guest addresses for a valid config and makes the device.
    pub(super) fn new(config: Config, host: &dyn MemoryHost) -> Result<Self, MemoryHostError> {
        let memory = host.reserve(mib(config.total_size_mib), mib(config.slot_size_mib))?;
        let mut device = Self {
            info: DeviceInfo {
                kind: DeviceKind::Mem,
                queue_sizes: vec![QUEUE_SIZE],
                features: feature::COMMON | F_UNPLUGGED_INACCESSIBLE,
            },
            blocks: Blocks::new(config.slot_size_mib / config.block_size_mib),
            config,
            config_space: [0; CONFIG_SIZE],
            memory,
            requested: 0,
            usable: 0,
            metrics: Metrics::default(),
        };
        device.renew_config_space();
        Ok(device)
    }

    fn block_size(&self) -> u64 {
        mib(self.config.block_size_mib)
    }

    fn plugged_size(&self) -> u64 {
        self.blocks.plugged() * self.block_size()
    }

    /// How much of the region the guest must be able to use to have `requested` bytes.
    fn usable_for(&self, requested: u64) -> u64 {
        let total = mib(self.config.total_size_mib);
        requested.next_multiple_of(LINUX_BLOCK).min(total)
    }

    /// `struct virtio_mem_config` (virtio 1.2 §5.15.4): block_size, node_id with padding, addr, region_size,
    /// usable_region_size, plugged_size, requested_size.
    fn renew_config_space(&mut self) {
        let fields = [
            self.block_size(),
            0,
            self.memory.start(),
            mib(self.config.total_size_mib),
            self.usable,
            self.plugged_size(),
            self.requested,
        ];
        let bytes = fields.map(u64::to_le_bytes);
        self.config_space.copy_from_slice(bytes.as_flattened());
    }

    /// Answers what the driver has asked, at most one turn of it, and interrupts it once.
    fn serve_turn(&mut self, io: &mut Io<'_>) -> Result<(), QueueError> {
        let mut chain = Chain::new();
        let mut ring = io.queues[0].open(io.mem)?;
        ring.disable_notify();
        io.again = Some(0);
        for _ in 0..TURN {
            if ring.pop(&mut chain)? {
                let began = io.clock.now();
                let request = Request::read(&chain.readable);
                let response = self.serve(request);
                // The driver may look at the sizes as soon as it has its answer.
                self.renew_config_space();
                io.config.set(&self.config_space);
                if let Some(Request { kind, .. }) = request {
                    let time = io.clock.now().saturating_duration_since(began);
                    self.count(kind, response).record(time);
                }
                ring.push(chain.head(), response.write(&chain));
            } else if !ring.enable_notify()? {
                io.again = None;
                break;
            }
        }
        ring.publish();
        if ring.needs_interrupt() {
            io.irq.raise(Vector::Queue(0));
        }
        Ok(())
    }

    fn serve(&mut self, request: Option<Request>) -> Response {
        let Some(request) = request else {
            self.metrics.queue_event_fails += 1;
            return Response::Error;
        };
        match (request.kind, self.range(request)) {
            (Kind::UnplugAll, _) => self.unplug_all(),
            (_, None) => Response::Error,
            (Kind::Plug, Some(range)) => self.plug(range),
            (Kind::Unplug, Some(range)) => self.unplug(range),
            (Kind::State, Some(range)) => Response::State(self.blocks.state(range)),
        }
    }

    /// The blocks that a request names; none when they are not whole blocks of the usable region.
    fn range(&self, request: Request) -> Option<Range<u64>> {
        let offset = request.address.checked_sub(self.memory.start())?;
        if !offset.is_multiple_of(self.block_size()) || request.count == 0 {
            return None;
        }
        let start = offset / self.block_size();
        let end = start + u64::from(request.count);
        (end <= self.usable / self.block_size()).then_some(start..end)
    }

    fn plug(&mut self, range: Range<u64>) -> Response {
        if self.blocks.state(range.clone()) != BlockState::Unplugged {
            return Response::Error;
        }
        let size = (range.end - range.start) * self.block_size();
        if self.plugged_size() + size > self.requested {
            return Response::Nack;
        }
        if let Err(error) = self.connect(&range) {
            log::warn!("the host has no memory for {size} bytes that the guest wants to plug in: {error}");
            return Response::Busy;
        }
        self.blocks.plug(range);
        self.metrics.plug_bytes += size;
        Response::Ack
    }

    /// Connects the slots of a range that are not there yet; all or none.
    fn connect(&mut self, range: &Range<u64>) -> io::Result<()> {
        let parts = self.blocks.parts(range.clone());
        let missing: Vec<_> = parts
            .map(|part| part.slot)
            .filter(|slot| !self.blocks.has_slot(*slot))
            .collect();
        for (index, slot) in missing.iter().enumerate() {
            if let Err(error) = self.memory.connect(*slot) {
                missing[..index]
                    .iter()
                    .for_each(|slot| self.memory.disconnect(*slot));
                return Err(error);
            }
        }
        Ok(())
    }

    fn unplug(&mut self, range: Range<u64>) -> Response {
        if self.blocks.state(range.clone()) != BlockState::Plugged {
            return Response::Error;
        }
        let parts = self.blocks.parts(range.clone());
        let (gone, partly): (Vec<Part>, Vec<Part>) = parts.partition(|part| self.blocks.is_last(part));
        // What can fail comes first, so that a request is carried out wholly or not at all.
        for part in &partly {
            if let Err(error) = self.discard(part) {
                log::warn!("the host does not take memory back that the guest unplugs: {error}");
                self.metrics.unplug_discard_fails += 1;
                return Response::Busy;
            }
        }
        gone.iter().for_each(|part| self.memory.disconnect(part.slot));
        self.metrics.unplug_bytes += (range.end - range.start) * self.block_size();
        self.blocks.unplug(range);
        Response::Ack
    }

    fn discard(&mut self, part: &Part) -> io::Result<()> {
        let bytes = |block: u32| u64::from(block) * self.block_size();
        let range = bytes(part.blocks.start)..bytes(part.blocks.end);
        self.memory.discard(part.slot, range)
    }

    /// Takes everything back. Only now may the usable region shrink (virtio 1.2 §5.15.4).
    fn unplug_all(&mut self) -> Response {
        self.metrics.unplug_bytes += self.plugged_size();
        self.disconnect_all();
        self.blocks.clear();
        self.usable = self.usable_for(self.requested);
        Response::Ack
    }

    fn disconnect_all(&mut self) {
        let slots: Vec<_> = self.blocks.slots().collect();
        slots.into_iter().for_each(|slot| self.memory.disconnect(slot));
    }

    /// Counts a request; gives the place for its time.
    fn count(&mut self, kind: Kind, response: Response) -> &mut crate::virtio::Latency {
        let metrics = &mut self.metrics;
        let (count, fails, time) = match kind {
            Kind::Plug => (
                &mut metrics.plug_count,
                &mut metrics.plug_fails,
                &mut metrics.plug_agg,
            ),
            Kind::Unplug => (
                &mut metrics.unplug_count,
                &mut metrics.unplug_fails,
                &mut metrics.unplug_agg,
            ),
            Kind::UnplugAll => (
                &mut metrics.unplug_all_count,
                &mut metrics.unplug_all_fails,
                &mut metrics.unplug_all_agg,
            ),
            Kind::State => (
                &mut metrics.state_count,
                &mut metrics.state_fails,
                &mut metrics.state_agg,
            ),
        };
        *count += 1;
        *fails += u64::from(!response.is_done());
        time
    }

    /// Makes the state of a snapshot this device's; it has none yet.
    fn restore(&mut self, state: &State) -> Result<(), String> {
        let (total, block) = (mib(self.config.total_size_mib), self.block_size());
        if state.start != self.memory.start() {
            return Err(format!(
                "hotpluggable memory was at {:#x} and is at {:#x}: restore it in a machine with the same memory and devices",
                state.start,
                self.memory.start()
            ));
        }
        if state.requested > state.usable || state.usable > total {
            return Err("more memory is requested than usable, or more usable than there is".into());
        }
        if [state.requested, state.usable]
            .iter()
            .any(|size| !size.is_multiple_of(block))
        {
            return Err("sizes are not whole blocks".into());
        }
        let mut end = 0;
        for (first, count) in &state.plugged {
            let next = first.checked_add(*count).filter(|_| *count > 0 && *first >= end);
            end = next.ok_or("plugged blocks are not in order")?;
            if end > state.usable / block {
                return Err("blocks are plugged outside the usable region".into());
            }
        }
        for (first, count) in &state.plugged {
            let range = *first..first + count;
            self.connect(&range)
                .map_err(|error| format!("the host has no memory for it: {error}"))?;
            self.blocks.plug(range);
        }
        (self.requested, self.usable) = (state.requested, state.usable);
        self.renew_config_space();
        Ok(())
    }
}

impl VirtioDevice for Mem {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn config_space(&self) -> &[u8] {
        &self.config_space
    }

    fn activate(&mut self, _io: &mut Io<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn on_queue(&mut self, _queue: u16, io: &mut Io<'_>) -> Result<(), DeviceError> {
        self.metrics.queue_event_count += 1;
        let result = self.serve_turn(io);
        self.metrics.queue_event_fails += u64::from(result.is_err());
        Ok(result?)
    }

    fn update(&mut self, patch: Value, io: &mut Io<'_>) -> Result<(), UpdateError> {
        let patch: Patch = serde_json::from_value(patch)?;
        self.config
            .check(&patch)
            .map_err(|error| UpdateError::Device(error.into()))?;
        if io.queues.is_empty() {
            let reason = "the guest has no running virtio-mem driver: wait until it has, and check that its kernel has one";
            return Err(UpdateError::Refused(reason.into()));
        }
        self.requested = mib(patch.requested_size_mib);
        self.usable = self.usable.max(self.usable_for(self.requested));
        self.renew_config_space();
        Ok(())
    }

    fn save(&self) -> Blob {
        let state = State {
            start: self.memory.start(),
            requested: self.requested,
            usable: self.usable,
            plugged: self.blocks.runs(),
        };
        Blob::new(KIND, STATE_VERSION, &state)
    }

    fn load(&mut self, state: Blob) -> Result<(), StateError> {
        let state: State = state.open(KIND, STATE_VERSION)?;
        self.restore(&state).map_err(|what| {
            self.disconnect_all();
            self.blocks.clear();
            StateError::Inconsistent { kind: KIND, what }
        })
    }

    fn status(&self) -> Value {
        let status = Status {
            block_size_mib: self.config.block_size_mib,
            total_size_mib: self.config.total_size_mib,
            slot_size_mib: self.config.slot_size_mib,
            plugged_size_mib: to_mib(self.plugged_size()),
            requested_size_mib: to_mib(self.requested),
        };
        serde_json::to_value(status).expect("sizes are plain data")
    }

    fn metrics(&self) -> Value {
        serde_json::to_value(&self.metrics).expect("counters are plain data")
    }

    fn histograms(&self) -> Vec<(&'static str, Histogram)> {
        let metrics = &self.metrics;
        vec![
            ("plug", metrics.plug_agg.spread),
            ("unplug", metrics.unplug_agg.spread),
            ("state", metrics.state_agg.spread),
            ("unplug_all", metrics.unplug_all_agg.spread),
        ]
    }
}

fn mib(size: u32) -> u64 {
    u64::from(size) << 20
}

fn to_mib(bytes: u64) -> u32 {
    u32::try_from(bytes >> 20).expect("no size is above the total, which is a u32 of MiB")
}
