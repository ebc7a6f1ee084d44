//! [`VirtioSlot`]: the front half of a virtio device. It is what the registers of a transport touch: features, the
//! status machine, queue set-up and a copy of the configuration space.
//!
//! It holds the device while the driver is not ready. At DRIVER_OK it moves the device and its queues into a
//! [`Lane`](super::Lane) on an io loop, and each sibling into one of its own; a reset brings them back. vCPU threads and the control thread use it under the
//! transport's lock; the io loop never does, so waiting for the loop while holding that lock is safe.

mod family;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vmm_sys_util::eventfd::EventFd;

use self::family::Devices;
use super::{
    Blob, ConfigSpace, DeviceInfo, Health, Histogram, InterruptMetrics, Irq, LaneHost, LaneId, Queue,
    QueueConfig, Report, StateError, UpdateError, Vector, VirtioDevice, Watch, feature,
};
use crate::SharedMemory;
use crate::bus::BusDevice;

/// Device status bits (virtio 1.2 §2.1).
pub mod status {
    /// The guest has seen the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest has a driver.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Feature negotiation is complete.
    pub const FEATURES_OK: u8 = 8;
    /// The device met an error that only a reset clears.
    pub const NEEDS_RESET: u8 = 0x40;
    /// The guest has given up on the device.
    pub const FAILED: u8 = 0x80;
}

/// A transport: register decoding over a slot.
pub trait Transport: BusDevice {
    /// The slot behind the registers.
    fn slot(&mut self) -> &mut VirtioSlot;
    /// The device's interrupts so far.
    fn interrupts(&self) -> InterruptMetrics;
}

/// What the driver has written, as registers hold it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriverState {
    /// Which 32 bits of the offered features are read.
    pub device_features_select: u32,
    /// Which 32 bits of the accepted features are written.
    pub driver_features_select: u32,
    /// Features the driver accepted.
    pub features: u64,
    /// Which queue the queue registers mean.
    pub queue_select: u16,
    status: u8,
    queues: Vec<QueueConfig>,
}

/// The saved state of slot and device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlotState {
    driver: DriverState,
    config_generation: u8,
    needs_reset: bool,
    /// The running queues, when the driver was ready.
    running: Option<Vec<Queue>>,
    device: Blob,
}

/// Where the device is with its siblings; the device itself comes first.
enum Half {
    Idle(Devices),
    Running(Vec<LaneId>),
}

/// The front half of a device.
pub struct VirtioSlot {
    /// What the driver has written.
    pub driver: DriverState,
    info: DeviceInfo,
    config: Arc<ConfigSpace>,
    health: Arc<Health>,
    irq: Arc<dyn Irq>,
    kicks: Vec<Arc<EventFd>>,
    memory: SharedMemory,
    host: Arc<dyn LaneHost>,
    half: Half,
    /// For each queue, which sibling serves it.
    owners: Vec<usize>,
}

/// A device that is unplugged while it runs leaves its loops.
impl Drop for VirtioSlot {
    fn drop(&mut self) {
        self.deactivate();
    }
}

struct NoWatch;

impl Watch for NoWatch {
    fn add(&self, _: std::os::fd::RawFd, _: u32) -> std::io::Result<()> {
        Ok(())
    }
    fn remove(&self, _: std::os::fd::RawFd) -> std::io::Result<()> {
        Ok(())
    }
}

impl VirtioSlot {
    /// A slot that holds `device` and will run it on `host`. Fails when the host has no descriptor left for the
    /// queues' notifications.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        irq: Arc<dyn Irq>,
        memory: SharedMemory,
        host: Arc<dyn LaneHost>,
    ) -> std::io::Result<Self> {
        let info = device.info().clone();
        let queues: Vec<_> = info
            .queue_sizes
            .iter()
            .map(|&size| QueueConfig::new(size))
            .collect();
        let kick = |_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map(Arc::new);
        let kicks = queues.iter().map(kick).collect::<Result<_, _>>()?;
        let config = Arc::new(ConfigSpace::new(device.config_space()));
        let (devices, owners) = family::split(device);
        Ok(Self {
            driver: DriverState {
                device_features_select: 0,
                driver_features_select: 0,
                features: 0,
                queue_select: 0,
                status: 0,
                queues,
            },
            kicks,
            config,
            health: Arc::default(),
            half: Half::Idle(devices),
            owners,
            info,
            irq,
            memory,
            host,
        })
    }

    /// Tells `report` from now on when the device comes to need a reset; only the first call has an effect.
    pub fn report_to(&self, report: Report) {
        self.health.report_to(report);
    }

    /// Facts about the device.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// One descriptor per queue; the driver's notifications are bound to them, and they stay the same for ever.
    pub fn kicks(&self) -> &[Arc<EventFd>] {
        &self.kicks
    }

    /// Notifies a queue from a register write that no ioeventfd took.
    pub fn kick(&self, queue: u16) {
        if let Some(kick) = self.kicks.get(usize::from(queue)) {
            // Only a full counter refuses, and then the loop is awake already.
            let _ = kick.write(1);
        }
    }

    /// The selected 32 bits of the offered features.
    pub fn device_features(&self) -> u32 {
        match self.driver.device_features_select {
            0 => low(self.info.features),
            1 => low(self.info.features >> 32),
            _ => 0,
        }
    }

    /// The selected 32 bits of the accepted features.
    pub fn driver_features(&self) -> u32 {
        match self.driver.driver_features_select {
            0 => low(self.driver.features),
            1 => low(self.driver.features >> 32),
            _ => 0,
        }
    }

    /// Accepts features; after FEATURES_OK the driver must not (virtio 1.2 §2.2.1), so it has no effect.
    pub fn set_driver_features(&mut self, value: u32) {
        if self.driver.status & status::FEATURES_OK != 0 {
            return;
        }
        let value = u64::from(value);
        match self.driver.driver_features_select {
            0 => self.driver.features = self.driver.features & !0xffff_ffff | value,
            1 => self.driver.features = self.driver.features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    /// The set-up of the selected queue.
    pub fn queue(&self) -> Option<&QueueConfig> {
        self.driver.queues.get(usize::from(self.driver.queue_select))
    }

    /// The set-up of the selected queue, while the driver may change it: after FEATURES_OK and before DRIVER_OK.
    pub fn queue_mut(&mut self) -> Option<&mut QueueConfig> {
        let phase = self.driver.status & (status::FEATURES_OK | status::DRIVER_OK);
        if phase != status::FEATURES_OK {
            return None;
        }
        self.driver.queues.get_mut(usize::from(self.driver.queue_select))
    }

    /// How many queues there are.
    pub fn queue_count(&self) -> u16 {
        u16::try_from(self.driver.queues.len()).expect("a device has few queues")
    }

    /// The device status, with NEEDS_RESET when the device met an error.
    pub fn status(&self) -> u8 {
        self.driver.status
            | if self.health.is_broken() {
                status::NEEDS_RESET
            } else {
                0
            }
    }

    /// Advances the status machine (virtio 1.2 §3.1.1). Zero resets; a bit once set stays set until then.
    pub fn set_status(&mut self, value: u8) {
        if value == 0 {
            return self.reset();
        }
        let value = value & !status::NEEDS_RESET;
        let old = self.driver.status;
        if value & old != old {
            log::warn!(
                "{:?} device: the driver tried to clear status bits",
                self.info.kind
            );
            return;
        }
        let mut new = value;
        if new & !old & status::FEATURES_OK != 0 && !self.features_acceptable() {
            // The driver reads the bit back to learn that its choice was refused.
            new &= !status::FEATURES_OK;
        }
        self.driver.status = new;
        let ready = status::FEATURES_OK | status::DRIVER_OK;
        if new & ready == ready && new & status::FAILED == 0 && old & status::DRIVER_OK == 0 {
            self.activate(None);
        }
    }

    /// Generation of the configuration space (virtio 1.2 §2.5.1).
    pub fn config_generation(&self) -> u8 {
        self.config.generation()
    }

    /// Reads the configuration space; bytes behind its end read as zero.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    /// Writes to the configuration space. Wider writes than 8 bytes and those that end behind it have no effect.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 8];
        let (len, place) = (data.len(), self.config.place(offset, data.len()));
        let (Some(offset), Some(copy)) = (place, bytes.get_mut(..len)) else {
            return;
        };
        copy.copy_from_slice(data);
        match &mut self.half {
            Half::Idle(devices) => {
                devices[0].write_config(offset, data);
                self.config.set(devices[0].config_space());
            }
            Half::Running(lanes) => {
                let first = lanes[0];
                self.on_lane(first, move |lane, _| lane.write_config(offset, &bytes[..len]));
            }
        }
    }

    /// Takes the device back from the loop and forgets the driver.
    pub fn reset(&mut self) {
        self.deactivate();
        self.health.set_broken(false);
        self.driver = DriverState {
            device_features_select: 0,
            driver_features_select: 0,
            features: 0,
            queue_select: 0,
            status: 0,
            queues: self
                .info
                .queue_sizes
                .iter()
                .map(|&size| QueueConfig::new(size))
                .collect(),
        };
    }

    /// Changes the device; the driver, if there is one, is told when its configuration space is another one then.
    pub fn update(&mut self, patch: Value) -> Result<(), UpdateError> {
        let changed = self.change(patch)?;
        // Without a driver nobody would end the interrupt, on a pin that devices may share.
        if changed && self.driver.status & status::DRIVER != 0 {
            self.irq.raise(Vector::Config);
        }
        Ok(())
    }

    /// What the device tells about itself beyond its config.
    pub fn device_status(&self) -> Value {
        match &self.half {
            Half::Idle(devices) => devices[0].status(),
            Half::Running(lanes) => self.on_lane(lanes[0], |lane, _| lane.device_status()),
        }
    }

    /// The device's counters, those of its siblings included.
    pub fn metrics(&self) -> Value {
        family::sum_metrics(match &self.half {
            Half::Idle(devices) => devices.iter().map(|device| device.metrics()).collect(),
            Half::Running(lanes) => self.on_lanes(lanes, |lane, _| lane.metrics()),
        })
    }

    /// How long what the device and its siblings did took.
    pub fn histograms(&self) -> Vec<(&'static str, Histogram)> {
        family::sum_histograms(match &self.half {
            Half::Idle(devices) => devices.iter().map(|device| device.histograms()).collect(),
            Half::Running(lanes) => self.on_lanes(lanes, |lane, _| lane.histograms()),
        })
    }

    /// Lets the device finish what is in flight and hold events back. The vCPUs have stopped before.
    pub fn pause(&self) {
        if let Half::Running(lanes) = &self.half {
            self.on_lanes(lanes, |lane, watch| lane.pause(watch));
        }
    }

    /// Tells the device that the guest's memory has gained or lost a region.
    pub fn memory_changed(&self) {
        if let Half::Running(lanes) = &self.half {
            self.on_lanes(lanes, |lane, watch| lane.memory_changed(watch));
        }
    }

    /// Lets the device go on. The vCPUs start after.
    pub fn resume(&self) {
        if let Half::Running(lanes) = &self.half {
            self.on_lanes(lanes, |lane, watch| lane.resume(watch));
        }
    }

    /// The state of slot and device. The machine is paused.
    pub fn save(&self) -> SlotState {
        let (device, running) = match &self.half {
            Half::Running(lanes) => {
                let device = self.on_lane(lanes[0], |lane, _| lane.save());
                let queues = self.on_lanes(lanes, |lane, _| lane.queues());
                (device, Some(self.join_queues(&queues)))
            }
            Half::Idle(devices) => (devices[0].save(), None),
        };
        SlotState {
            driver: self.driver.clone(),
            config_generation: self.config.generation(),
            needs_reset: self.health.is_broken(),
            running,
            device,
        }
    }

    /// Takes a saved state into a new slot with a device of the same config. A device that ran is activated, and
    /// holds events back until [`VirtioSlot::resume`], as it did when it was saved.
    pub fn load(&mut self, state: SlotState) -> Result<(), StateError> {
        let inconsistent = |what: &str| StateError::Inconsistent {
            kind: "slot",
            what: what.into(),
        };
        let sizes_match =
            |queues: &mut dyn Iterator<Item = u16>| queues.eq(self.info.queue_sizes.iter().copied());
        if !sizes_match(&mut state.driver.queues.iter().map(|q| q.max_size)) {
            return Err(inconsistent("the queues are not those of this device"));
        }
        // Before FEATURES_OK the driver may have written anything.
        let negotiated = state.driver.status & status::FEATURES_OK != 0 || state.running.is_some();
        if negotiated && state.driver.features & !self.info.features != 0 {
            return Err(inconsistent(
                "the driver accepted features that this device does not offer",
            ));
        }
        let running = state.running.as_deref();
        if running.is_some_and(|queues| !sizes_match(&mut queues.iter().map(|q| q.config().max_size))) {
            return Err(inconsistent("the running queues are not those of this device"));
        }
        if running.is_some() && state.driver.status & status::DRIVER_OK == 0 {
            return Err(inconsistent("the device runs, but its driver is not ready"));
        }
        let Half::Idle(devices) = &mut self.half else {
            return Err(inconsistent("the slot is in use"));
        };
        devices[0].load(state.device)?;
        self.config
            .restore(devices[0].config_space(), state.config_generation);
        self.refresh_idle();
        self.driver = state.driver;
        self.health.set_broken(state.needs_reset);
        if let Some(queues) = state.running {
            self.activate(Some(queues));
        }
        Ok(())
    }

    fn features_acceptable(&self) -> bool {
        let accepted = self.driver.features;
        accepted & !self.info.features == 0 && accepted & feature::VERSION_1 != 0
    }
}

fn low(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).expect("masked to 32 bits")
}

#[cfg(test)]
mod tests;
