//! [`Lane`]: the back half of a virtio device. It owns the running device and its queues, lives on an io loop, and
//! exists only between DRIVER_OK and reset.
//!
//! The lane is the loop's only event subscriber: it calls the device, guards it against a broken driver, and holds
//! events back while the machine is paused.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use serde_json::Value;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::{
    Blob, ConfigSpace, DeviceError, Health, Histogram, Io, Irq, Queue, UpdateError, VirtioDevice, Watch,
};
use crate::SharedMemory;
use crate::timer::HostClock;

/// Names a lane among those of all loops.
pub type LaneId = u64;

/// Work to be done on the loop's thread with the lane in hand.
pub type Job = Box<dyn FnOnce(&mut Lane, &dyn Watch) + Send>;

/// The io loops as slots see them.
pub trait LaneHost: Send + Sync {
    /// Hands the lane to a loop, which calls [`Lane::start`] and then feeds it events. Waits until it has started.
    fn attach(&self, lane: Box<Lane>) -> LaneId;
    /// Takes the lane back, which has ended; its loop has forgotten all its descriptors and called [`Lane::reset`].
    fn detach(&self, id: LaneId) -> Box<Lane>;
    /// Runs `job` on the lane's loop, soon.
    fn run(&self, id: LaneId, job: Job);
}

/// Tokens below are queue indexes, those from here on the device's own.
const DEVICE_TOKENS: u32 = 1 << 16;

/// A running device, or one of its siblings.
pub struct Lane {
    pub(super) device: Box<dyn VirtioDevice>,
    /// All queues by index; those of a sibling are not ready here.
    pub(super) queues: Vec<Queue>,
    pub(super) kicks: Vec<Arc<EventFd>>,
    pub(super) memory: SharedMemory,
    pub(super) irq: Arc<dyn Irq>,
    pub(super) config: Arc<ConfigSpace>,
    pub(super) features: u64,
    pub(super) health: Arc<Health>,
    pub(super) paused: bool,
    /// The device's own tokens, to be replayed after a pause.
    pub(super) tokens: Vec<u32>,
}

/// Maps the device's tokens behind those of its queues, and notes them for replay.
struct DeviceWatch<'a> {
    watch: &'a dyn Watch,
    tokens: std::cell::RefCell<&'a mut Vec<u32>>,
}

impl Watch for DeviceWatch<'_> {
    fn add(&self, fd: RawFd, token: u32) -> io::Result<()> {
        self.watch.add(fd, DEVICE_TOKENS + token)?;
        let mut tokens = self.tokens.borrow_mut();
        if !tokens.contains(&token) {
            tokens.push(token);
        }
        Ok(())
    }

    fn remove(&self, fd: RawFd) -> io::Result<()> {
        self.watch.remove(fd)
    }
}

impl Lane {
    /// Watches the queues' kicks and activates the device. Called once by the loop. A restored lane then holds
    /// events back until [`Lane::resume`], which replays those that the snapshot lost.
    pub fn start(&mut self, watch: &dyn Watch) {
        for (token, (kick, queue)) in (0u32..).zip(self.kicks.iter().zip(&self.queues)) {
            if !queue.config().ready {
                continue;
            }
            if let Err(source) = watch.add(std::os::fd::AsRawFd::as_raw_fd(&**kick), token) {
                return self.fail(&DeviceError::Host {
                    op: "watch a queue's notifications",
                    source,
                });
            }
        }
        // A restored lane stays paused, but its device has to be activated.
        let paused = std::mem::take(&mut self.paused);
        self.call(watch, |device, io| device.activate(io));
        self.paused = paused;
    }

    /// A descriptor with `token` became ready.
    pub fn on_event(&mut self, token: u32, watch: &dyn Watch) {
        // A token behind the queues' range is never a queue: `start` gave out the indexes.
        match u16::try_from(token) {
            Ok(queue) if !self.serves(queue) => {}
            Ok(queue) => self.call(watch, |device, io| device.on_queue(queue, io)),
            Err(_) => self.call(watch, |device, io| device.on_event(token - DEVICE_TOKENS, io)),
        }
    }

    /// Finishes what is in flight and holds events back until [`Lane::resume`]; false when that was so already.
    pub fn pause(&mut self, watch: &dyn Watch) -> bool {
        if self.health.is_broken() {
            // It has no queue to answer in, but the host may still be at work for it.
            self.device.end();
        }
        self.call(watch, |device, io| device.quiesce(io));
        !std::mem::replace(&mut self.paused, true)
    }

    /// Takes events again, and replays every one that may have come during the pause.
    pub fn resume(&mut self, watch: &dyn Watch) {
        if !std::mem::take(&mut self.paused) {
            return;
        }
        let count = u16::try_from(self.queues.len()).expect("a device has few queues");
        for queue in 0..count {
            if self.serves(queue) {
                self.call(watch, |device, io| device.on_queue(queue, io));
            }
        }
        for token in self.tokens.clone() {
            self.call(watch, |device, io| device.on_event(token, io));
        }
    }

    /// Tells the device that the guest's memory has gained or lost a region.
    pub fn memory_changed(&mut self, watch: &dyn Watch) {
        if let Err(error) = self.lend(watch, |device, io| device.memory_changed(io)) {
            self.fail(&error);
        }
    }

    /// Changes the device; true when its configuration space is another one then.
    pub fn update(&mut self, patch: Value, watch: &dyn Watch) -> Result<bool, UpdateError> {
        self.lend(watch, |device, io| device.update(patch, io))?;
        Ok(self.config.set(self.device.config_space()))
    }

    /// Follows the first of the siblings, which has changed or was loaded.
    pub fn refresh(&mut self, watch: &dyn Watch) {
        let followed = self.lend(watch, |device, io| {
            device.refresh(io);
            Ok::<(), std::convert::Infallible>(())
        });
        let Ok(()) = followed;
    }

    /// The driver writes to the configuration space, inside of it.
    pub fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.device.write_config(offset, data);
        self.config.set(self.device.config_space());
    }

    /// The device's state.
    pub fn save(&self) -> Blob {
        self.device.save()
    }

    /// All queues; those of siblings are not ready.
    pub fn queues(&self) -> Vec<Queue> {
        self.queues.clone()
    }

    /// What the device tells about itself beyond its config.
    pub fn device_status(&self) -> Value {
        self.device.status()
    }

    /// The device's counters.
    pub fn metrics(&self) -> Value {
        self.device.metrics()
    }

    /// How long what the device did took.
    pub fn histograms(&self) -> Vec<(&'static str, Histogram)> {
        self.device.histograms()
    }

    /// Whether the driver has set a queue up, and no sibling serves it.
    fn serves(&self, queue: u16) -> bool {
        let queue = self.queues.get(usize::from(queue));
        queue.is_some_and(|queue| queue.config().ready)
    }

    /// Takes no more events, and waits for what could still touch the guest's memory.
    pub fn end(&mut self) {
        self.paused = true;
        self.device.end();
    }

    /// Forgets the driver. Called by the loop, which may make the system calls for that, and lets go of the lane next;
    /// this lane and its siblings have ended before.
    pub fn reset(&mut self) {
        self.device.reset();
    }

    /// The device goes back to its slot.
    pub fn into_device(self) -> Box<dyn VirtioDevice> {
        self.device
    }

    fn call(
        &mut self,
        watch: &dyn Watch,
        work: impl FnOnce(&mut dyn VirtioDevice, &mut Io<'_>) -> Result<(), DeviceError>,
    ) {
        if self.paused || self.health.is_broken() {
            return;
        }
        if let Err(error) = self.lend(watch, work) {
            self.fail(&error);
        }
    }

    /// Lends the device what it works with, and sees to it that it is called again when it asks for that.
    fn lend<E>(
        &mut self,
        watch: &dyn Watch,
        work: impl FnOnce(&mut dyn VirtioDevice, &mut Io<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let memory = self.memory.memory();
        let watch = DeviceWatch {
            watch,
            tokens: (&mut self.tokens).into(),
        };
        let mut io = Io {
            mem: &memory,
            queues: &mut self.queues,
            kicks: &self.kicks,
            irq: &*self.irq,
            watch: &watch,
            config: &self.config,
            clock: &HostClock,
            features: self.features,
            again: None,
        };
        work(&mut *self.device, &mut io)?;
        let again = io.again;
        self.kick(again);
        Ok(())
    }

    /// Posts the queue's own notification, so that it comes up again behind what else is ready.
    fn kick(&self, queue: Option<u16>) {
        if let Some(kick) = queue.and_then(|queue| self.kicks.get(usize::from(queue))) {
            // Only a full counter refuses, and then the loop is awake already.
            let _ = kick.write(1);
        }
    }

    /// Marks the device as needing a reset (virtio 1.2 §2.1.2); until then it is deaf, so this is logged once.
    fn fail(&self, error: &DeviceError) {
        self.health.fail(self.device.info().kind, error, &*self.irq);
    }
}
