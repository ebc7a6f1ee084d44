//! [`Vhost`]: a network device whose frames the host's kernel moves. Mayfly sets it up, and is out of the way then: what the
//! driver notifies goes straight to the kernel, and only interrupts pass through the io thread, which knows how the driver
//! wants them.
//!
//! ```text
//! Idle ──driver ready──► Waiting ──first notification──► Running
//!   ▲                       ▲                                │
//!   └─────────reset─────────┴─────────────pause──────────────┘
//! ```
//!
//! A machine may be restored into a pause, so the kernel starts with the first notification, as every driver sends one, or
//! with those that are replayed after a pause.

mod kernel;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::AsRawFd;

use serde_json::Value;
use vmm_sys_util::eventfd::EventFd;

use self::kernel::{Kernel, Signals};
use super::backend::{self, Backend, MAX_FRAME_LEN};
use super::{
    Config, LinkState, MacAddr, Metrics, OpenError, Patch, RX, TX, Tap, config_space, device_info, feature,
    host, link,
};
use crate::virtio::{
    Blob, DeviceError, DeviceInfo, Io, StateError, UpdateError, Vector, VirtioDevice, feature as virtio,
};

const KIND: &str = "net-vhost";
/// The device's descriptors: what the kernel signals for the queues, by their indexes, and when it cannot go on.
const ERROR_TOKEN: u32 = 2;
/// Features of which the kernel must know.
const OF_QUEUES: u64 = virtio::COMMON | feature::MRG_RXBUF;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// There is no driver.
    Idle,
    /// The kernel knows the queues.
    Waiting,
    /// Frames pass while the link is up.
    Running,
}

/// A network device on vhost-net and a tap.
pub(super) struct Vhost {
    info: DeviceInfo,
    iface_id: String,
    guest_mac: Option<MacAddr>,
    config_space: [u8; 12],
    kernel: Kernel,
    /// What the kernel knows of [`OF_QUEUES`].
    known: u64,
    tap: Tap,
    offloads: u64,
    link: LinkState,
    phase: Phase,
    /// The loop listens to the driver's notifications.
    listens: bool,
    calls: [EventFd; 2],
    error: EventFd,
    metrics: Metrics,
}

impl Vhost {
    pub(super) fn new(config: &Config, tap: Tap) -> Result<Self, OpenError> {
        let kernel = Kernel::open()?;
        let known = kernel.features()? & OF_QUEUES;
        let mut info = device_info(config, tap.offloads());
        info.features &= known | !OF_QUEUES;
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let events = || Ok(([event()?, event()?], event()?));
        let (calls, error) = events().map_err(|source: io::Error| OpenError::Descriptors { source })?;
        Ok(Self {
            info,
            iface_id: config.iface_id.clone(),
            guest_mac: config.guest_mac,
            config_space: config_space(config),
            kernel,
            known,
            offloads: tap.offloads() & feature::GUEST_OFFLOADS,
            tap,
            link: config.link_state.unwrap_or_default(),
            phase: Phase::Idle,
            listens: false,
            calls,
            error,
            metrics: Metrics::default(),
        })
    }

    /// Tells the kernel all that it must know, and does not let it start yet.
    fn set_up(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let offloads = io.features & feature::GUEST_OFFLOADS;
        if offloads != self.offloads {
            let set = self.tap.set_offloads(offloads);
            set.map_err(host("set the offloads of the tap"))?;
            if self.offloads & !offloads != 0 {
                discard(&mut self.tap);
            }
            self.offloads = offloads;
        }
        let kernel = &self.kernel;
        let set = kernel.set_memory(io.mem);
        set.map_err(refused("tell vhost-net of the guest's memory"))?;
        let set = kernel.set_features(io.features & self.known);
        set.map_err(refused("set the features of vhost-net"))?;
        for (index, queue) in io.queues.iter().enumerate() {
            if !queue.config().ready {
                continue;
            }
            let signals = Signals {
                kick: &io.kicks[index],
                call: &self.calls[index],
                error: &self.error,
            };
            let set = kernel.set_up(index, queue, &signals);
            set.map_err(refused("give a queue to vhost-net"))?;
        }
        for (token, call) in (0..).zip(&self.calls) {
            let watched = io.watch.add(call.as_raw_fd(), token);
            watched.map_err(host("watch the interrupts of vhost-net"))?;
        }
        let watched = io.watch.add(self.error.as_raw_fd(), ERROR_TOKEN);
        watched.map_err(host("watch the errors of vhost-net"))?;
        (self.phase, self.listens) = (Phase::Waiting, true);
        Ok(())
    }

    /// Lets the kernel move the frames of all queues that there are, or stops it.
    fn connect(&self, io: &Io<'_>, tap: Option<&Tap>) -> Result<(), vhost::Error> {
        for (index, queue) in io.queues.iter().enumerate() {
            if queue.config().ready {
                self.kernel.set_tap(index, tap.map(Tap::file))?;
            }
        }
        Ok(())
    }

    /// The driver's queues are to be served from now on.
    fn run(&mut self, io: &Io<'_>) -> Result<(), DeviceError> {
        if self.phase != Phase::Waiting {
            return Ok(());
        }
        if self.link == LinkState::Up {
            let connected = self.connect(io, Some(&self.tap));
            connected.map_err(refused("start vhost-net"))?;
        }
        self.phase = Phase::Running;
        if std::mem::take(&mut self.listens) {
            // The kernel listens now. What cannot be removed costs time, and does no harm.
            io.kicks
                .iter()
                .for_each(|kick| _ = io.watch.remove(kick.as_raw_fd()));
        }
        Ok(())
    }

    /// Stops the kernel, and takes over how far it has come.
    fn stop(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        if self.phase != Phase::Running {
            return Ok(());
        }
        self.phase = Phase::Waiting;
        let stop = || {
            self.connect(io, None)?;
            (0..2).map(|index| self.kernel.position(index)).collect()
        };
        let positions: Result<Vec<u16>, _> = stop();
        let positions = positions.map_err(refused("stop vhost-net"))?;
        for (queue, position) in io.queues.iter_mut().zip(positions) {
            queue.set_position(position);
        }
        Ok(())
    }

    /// Makes the changes that the user asks for. What can fail comes first.
    fn change(&mut self, patch: &Patch, io: &Io<'_>) -> Result<(), UpdateError> {
        let mut other = match &patch.host_dev_name {
            Some(name) => link::open_other(&self.tap, name, 1, self.offloads)?.pop(),
            None => None,
        };
        let before = self.link;
        let after = patch.link_state.unwrap_or(before);
        let came = before == LinkState::Down && after == LinkState::Up;
        if came {
            discard(other.as_mut().unwrap_or(&mut self.tap));
        }
        if self.phase == Phase::Running && (other.is_some() || before != after) {
            let old = (before == LinkState::Up).then_some(&self.tap);
            let new = (after == LinkState::Up).then_some(other.as_ref().unwrap_or(&self.tap));
            if let Err(error) = self.connect(io, new) {
                if self.connect(io, old).is_err() {
                    // The loop comes to know that the device is broken.
                    let _ = self.error.write(1);
                }
                return Err(UpdateError::Device(error.into()));
            }
        }
        let moved = other.is_some();
        if let Some(other) = other {
            self.tap = other;
        }
        self.link = after;
        self.config_space[link::STATUS].copy_from_slice(&link::status(after == LinkState::Up));
        if after == LinkState::Up && (moved || came) {
            link::announce(&mut self.tap, self.guest_mac, &self.iface_id);
        }
        Ok(())
    }

    /// Stops the kernel, in whatever state the queues are.
    fn halt(&mut self) {
        self.phase = Phase::Waiting;
        for index in 0..2 {
            // Of a queue that the driver has not set up there is nothing to be stopped.
            let _ = self.kernel.set_tap(index, None);
        }
    }

    /// Ends an event. After an error nobody calls before the driver's reset, not for a pause either, so nothing may go on.
    fn checked(&mut self, result: Result<(), DeviceError>) -> Result<(), DeviceError> {
        if result.is_err() {
            self.metrics.event_fails += 1;
            self.halt();
        }
        result
    }
}

impl VirtioDevice for Vhost {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn config_space(&self) -> &[u8] {
        &self.config_space
    }

    fn activate(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let result = self.set_up(io);
        self.metrics.activate_fails += u64::from(result.is_err());
        result
    }

    fn on_queue(&mut self, queue: u16, io: &mut Io<'_>) -> Result<(), DeviceError> {
        match queue {
            TX => self.metrics.tx_queue_event_count += 1,
            _ => self.metrics.rx_queue_event_count += 1,
        }
        let result = self.run(io);
        self.checked(result)
    }

    fn on_event(&mut self, token: u32, io: &mut Io<'_>) -> Result<(), DeviceError> {
        match u16::try_from(token) {
            Ok(queue @ (RX | TX)) => io.irq.raise(Vector::Queue(queue)),
            // Events are replayed after a pause, so it counts only what was really signalled.
            _ if self.error.read().is_ok() => {
                let broken = io::Error::from(io::ErrorKind::InvalidData);
                return self.checked(Err(host(
                    "go on with vhost-net: it cannot use a queue of the driver",
                )(broken)));
            }
            _ => {}
        }
        Ok(())
    }

    fn memory_changed(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        if self.phase == Phase::Idle {
            return Ok(());
        }
        let set = self.kernel.set_memory(io.mem);
        self.checked(set.map_err(refused("tell vhost-net of the guest's memory")))
    }

    fn quiesce(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let result = self.stop(io);
        self.checked(result)
    }

    fn reset(&mut self) {
        if self.phase == Phase::Running {
            self.halt();
        }
        self.phase = Phase::Idle;
        self.kernel.forget_memory();
    }

    fn update(&mut self, patch: Value, io: &mut Io<'_>) -> Result<(), UpdateError> {
        self.change(&serde_json::from_value(patch)?, io)
    }

    fn save(&self) -> Blob {
        Blob::new(KIND, 1, &())
    }

    fn load(&mut self, state: Blob) -> Result<(), StateError> {
        state.open(KIND, 1)
    }

    fn metrics(&self) -> Value {
        serde_json::to_value(&self.metrics).expect("counters are plain data")
    }
}

/// Throws away what waits in the tap: it came while the link was down, or was made for a driver that could take more.
fn discard(tap: &mut Tap) {
    backend::discard(tap, &mut vec![0; MAX_FRAME_LEN]);
}

fn refused(op: &'static str) -> impl Fn(vhost::Error) -> DeviceError {
    move |error| host(op)(io::Error::other(error))
}
