//! The devices of a running machine: attaching them gives them addresses and interrupts and puts them on the buses.
//!
//! Owned by the control thread. vCPU threads reach the devices through the buses, and this module's callbacks when
//! the guest programs MSIs or moves BARs.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::SharedMemory;
use devices::bus::{Bus, BusError, SharedDevice};
use devices::catalog::{BuildError, DeviceConfig};
use devices::virtio::{LaneHost, Transport, UpdateError};
use serde_json::{Map, Value};
use vmm_sys_util::eventfd::EventFd;

use crate::kvm::{self, KvmError};
use crate::metrics::add_to_sum;
use crate::x86_64::layout;

/// Why a device could not be attached or changed; the set is as before.
#[derive(Debug, thiserror::Error)]
pub enum DeviceSetError {
    /// The device could not be made.
    #[error("device '{id}'")]
    Build {
        /// Which one.
        id: String,
        /// Why.
        source: BuildError,
    },
    /// KVM refused an interrupt or a notification.
    #[error("device '{id}' cannot be connected")]
    Kvm {
        /// Which one.
        id: String,
        /// Why.
        source: KvmError,
    },
    /// The host refused a descriptor.
    #[error("device '{id}' cannot be connected")]
    Host {
        /// Which one.
        id: String,
        /// Why.
        source: io::Error,
    },
    /// The addresses are taken.
    #[error("device '{id}' cannot be placed")]
    Bus {
        /// Which one.
        id: String,
        /// Why.
        source: BusError,
    },
    /// No slot is left.
    #[error("device '{id}' finds no free slot; at most {limit} devices fit")]
    Full {
        /// Which one.
        id: String,
        /// How many fit.
        limit: usize,
    },
    /// No such device.
    #[error("there is no device '{0}'")]
    NotFound(String),
    /// The device refused the change.
    #[error("device '{id}'")]
    Update {
        /// Which one.
        id: String,
        /// Why.
        source: UpdateError,
    },
}

/// What all devices are connected to.
pub struct Platform {
    /// The machine.
    pub vm: Arc<kvm::Vm>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// Guest memory.
    pub memory: SharedMemory,
    /// The loop that runs the devices.
    pub host: Arc<dyn LaneHost>,
}

struct Attached {
    config: DeviceConfig,
    transport: Arc<Mutex<dyn Transport>>,
}


/// The devices of a machine.
pub struct DeviceSet {
    platform: Platform,
    devices: Vec<Attached>,
}
impl DeviceSet {
    pub fn new(platform: Platform, _pio: &Bus, _pci: bool) -> Result<Self, DeviceSetError> { Ok(Self{platform, devices: vec![]}) }
    pub fn attach(&mut self, _c: DeviceConfig) -> Result<(), DeviceSetError> { todo!() }
    pub fn mmio_places(&self) -> &[(u64,u32)] { &[] }
    pub fn pause(&self) {}
    pub fn resume(&self) {}
    pub fn update(&mut self, _id: &str, _p: Value) -> Result<(), DeviceSetError> { todo!() }
    pub fn collect_metrics(&self, _l: &mut Map<String, Value>) {}
}
