//! The devices of a running machine: attaching them gives them addresses and interrupts and puts them on the buses.
//!
//! Owned by the control thread. vCPU threads reach the devices through the buses, and this module's callbacks when
//! the guest programs MSIs or moves BARs.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::SharedMemory;
use devices::bus::{Bus, BusError};
use devices::catalog::{BuildError, DeviceConfig};
use devices::pci::root::{CONFIG_PORTS, CONFIG_PORTS_LEN, ECAM_LEN};
use devices::pci::{ConfigPorts, Ecam, PciError, PciSegment};
use devices::virtio::mmio::{self, MmioVirtio};
use devices::virtio::pci::{BAR_LEN, PciResources, PciVirtio};
use devices::virtio::{DeviceKind, LaneHost, Report, Transport, UpdateError, VirtioDevice};
use serde_json::{Value, json};

use crate::device_memory::DeviceMemory;
use crate::events::{Event, EventBus};
use crate::kvm::{self, KvmError};
use crate::metrics::prometheus::Exposition;
use crate::metrics::{DeviceMetrics, Totals, add_to_sum};
use crate::pci_wiring::{Bars, Lines, MsiGsis};
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
    /// The PCI bus refused it.
    #[error("device '{id}' cannot be plugged in")]
    Pci {
        /// Which one.
        id: String,
        /// Why.
        source: PciError,
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

/// Notification ports set aside for each slot: enough for 32 queues.
const PORTS_PER_SLOT: u16 = 0x80;

/// What all devices are connected to.
pub struct Platform {
    /// The machine.
    pub vm: Arc<kvm::Vm>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// Guest memory.
    pub memory: SharedMemory,
    /// Memory that devices add to it.
    pub device_memory: DeviceMemory,
    /// The loop that runs the devices.
    pub host: Arc<dyn LaneHost>,
    /// Where broken devices are told of.
    pub events: EventBus,
}

struct Attached {
    config: DeviceConfig,
    transport: Arc<Mutex<dyn Transport>>,
}

impl Attached {
    fn lock(&self) -> MutexGuard<'_, dyn Transport + 'static> {
        self.transport.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How devices appear to the guest.
enum Wiring {
    Pci {
        segment: Arc<PciSegment>,
        bars: Arc<Bars>,
        lines: Lines,
    },
    /// Register window and interrupt of each device so far.
    Mmio { places: Vec<(u64, u32)> },
}

/// The devices of a machine.
pub struct DeviceSet {
    platform: Platform,
    wiring: Wiring,
    devices: Vec<Attached>,
}

impl DeviceSet {
    /// A set without devices; with `pci` there is a bus for them.
    pub fn new(platform: Platform, pio: &Arc<Bus>, pci: bool) -> Result<Self, BusError> {
        let wiring = if pci {
            let bars = Arc::new(Bars::new(&platform.mmio, pio, Arc::clone(&platform.vm)));
            let segment = Arc::new(PciSegment::new(bars.clone()));
            let ecam = Ecam::new(Arc::clone(&segment));
            platform
                .mmio
                .insert(layout::PCI_ECAM.start, ECAM_LEN, Arc::new(Mutex::new(ecam)))?;
            let ports = ConfigPorts::new(Arc::clone(&segment));
            pio.insert(CONFIG_PORTS, CONFIG_PORTS_LEN, Arc::new(Mutex::new(ports)))?;
            Wiring::Pci {
                segment,
                bars,
                lines: Lines::new(Arc::clone(&platform.vm)),
            }
        } else {
            Wiring::Mmio { places: Vec::new() }
        };
        Ok(Self {
            platform,
            wiring,
            devices: Vec::new(),
        })
    }

    /// Makes the device and plugs it in.
    pub fn attach(&mut self, config: DeviceConfig) -> Result<(), DeviceSetError> {
        let id = config.id();
        let device = config
            .build(&self.platform.device_memory)
            .map_err(|source| DeviceSetError::Build {
                id: id.into(),
                source,
            })?;
        let transport = match self.wiring {
            Wiring::Pci { .. } => self.attach_pci(id, device)?,
            Wiring::Mmio { .. } => self.attach_mmio(id, device)?,
        };
        let attached = Attached { config, transport };
        attached.lock().slot().report_to(self.report(&attached.config));
        self.devices.push(attached);
        Ok(())
    }

    /// Tells that this device is broken.
    fn report(&self, config: &DeviceConfig) -> Report {
        let (events, kind) = (self.platform.events.clone(), config.kind().name());
        let id = config.id().to_owned();
        Box::new(move |reason| {
            let id = &id;
            events.publish(&Event::DeviceNeedsReset { kind, id, reason });
        })
    }

    /// Register window and interrupt of each virtio-mmio device.
    pub fn mmio_places(&self) -> &[(u64, u32)] {
        match &self.wiring {
            Wiring::Mmio { places } => places,
            Wiring::Pci { .. } => &[],
        }
    }

    /// What a device tells about itself beyond its config.
    pub fn status(&self, kind: DeviceKind, id: &str) -> Result<Value, DeviceSetError> {
        Ok(self.find(kind, id)?.lock().slot().device_status())
    }

    /// Changes a device as its own patch says.
    pub fn update(&self, kind: DeviceKind, id: &str, patch: Value) -> Result<(), DeviceSetError> {
        let updated = self.find(kind, id)?.lock().slot().update(patch);
        updated.map_err(|source| DeviceSetError::Update {
            id: id.into(),
            source,
        })
    }

    /// Lets every device finish what is in flight and hold events back. The vCPUs have stopped before.
    pub fn pause(&self) {
        self.devices
            .iter()
            .for_each(|device| device.lock().slot().pause());
    }

    /// Lets every device go on. The vCPUs start after.
    pub fn resume(&self) {
        self.devices
            .iter()
            .for_each(|device| device.lock().slot().resume());
    }

    /// Adds the devices' counters.
    pub fn collect_metrics(&self, totals: &mut Totals) {
        for device in &self.devices {
            let (counters, interrupts) = {
                let mut transport = device.lock();
                (transport.slot().metrics(), transport.interrupts())
            };
            add_to_sum(&mut totals.groups, &json!({"interrupts": interrupts}));
            totals.devices.push(DeviceMetrics {
                kind: device.config.kind(),
                id: device.config.id().into(),
                counters,
            });
        }
    }

    /// How long what the devices did took.
    pub fn collect_histograms(&self, text: &mut Exposition) {
        for device in &self.devices {
            let kind = device.config.kind();
            let label = kind.label().map(|label| (label, device.config.id()));
            for (name, histogram) in device.lock().slot().histograms() {
                text.histogram(&format!("{}_{name}", kind.name()), label.as_slice(), &histogram);
            }
        }
    }

    fn find(&self, kind: DeviceKind, id: &str) -> Result<&Attached, DeviceSetError> {
        let is_it = |device: &&Attached| device.config.kind() == kind && device.config.id() == id;
        let device = self.devices.iter().find(is_it);
        device.ok_or_else(|| DeviceSetError::NotFound(id.into()))
    }

    fn attach_pci(
        &self,
        id: &str,
        device: Box<dyn VirtioDevice>,
    ) -> Result<Arc<Mutex<dyn Transport>>, DeviceSetError> {
        let Wiring::Pci { segment, bars, lines } = &self.wiring else {
            unreachable!("the caller has matched")
        };
        let host_failed = |source| DeviceSetError::Host {
            id: id.into(),
            source,
        };
        let kvm_failed = |source| DeviceSetError::Kvm {
            id: id.into(),
            source,
        };
        let limit = usize::from(layout::PCI_SLOTS) - 1;
        let slot = segment
            .free_slot()
            .ok_or_else(|| DeviceSetError::Full { id: id.into(), limit })?;
        let gsis = MsiGsis::new(
            Arc::clone(&self.platform.vm),
            PciVirtio::vector_count(device.info()),
        );
        let gsis = Arc::new(gsis.map_err(kvm_failed)?);
        let resources = PciResources {
            bar_address: layout::PCI_MEMORY_WINDOW.start + u64::from(slot) * BAR_LEN,
            notify_ports: layout::PCI_IO_WINDOW.start + u16::from(slot) * PORTS_PER_SLOT,
            interrupt_line: u8::try_from(layout::pci_intx_gsi(slot)).expect("one of the I/O APIC's 24 lines"),
            router: gsis.clone(),
            intx: lines.connect(slot),
        };
        let (memory, host) = (self.platform.memory.clone(), Arc::clone(&self.platform.host));
        let mut function = PciVirtio::new(device, resources, memory, host).map_err(host_failed)?;
        gsis.bind(function.irqfds()).map_err(kvm_failed)?;
        let kicks = function.slot().kicks().to_vec();
        let function = Arc::new(Mutex::new(function));
        bars.add(slot, function.clone(), kicks);
        segment
            .attach(slot, function.clone())
            .map_err(|source| DeviceSetError::Pci {
                id: id.into(),
                source,
            })?;
        Ok(function)
    }

    fn attach_mmio(
        &mut self,
        id: &str,
        device: Box<dyn VirtioDevice>,
    ) -> Result<Arc<Mutex<dyn Transport>>, DeviceSetError> {
        let Wiring::Mmio { places } = &mut self.wiring else {
            unreachable!("the caller has matched")
        };
        let Platform { vm, memory, host, .. } = &self.platform;
        let kvm_failed = |source| DeviceSetError::Kvm {
            id: id.into(),
            source,
        };
        let limit = layout::VIRTIO_MMIO_GSIS.len();
        let place = layout::virtio_mmio_device(places.len());
        let (base, gsi) = place.ok_or_else(|| DeviceSetError::Full { id: id.into(), limit })?;
        let transport = MmioVirtio::new(device, memory.clone(), Arc::clone(host));
        let mut transport = transport.map_err(|source| DeviceSetError::Host {
            id: id.into(),
            source,
        })?;
        vm.register_irqfd(transport.irqfd(), gsi).map_err(kvm_failed)?;
        for (queue, kick) in (0u32..).zip(transport.slot().kicks()) {
            vm.register_ioevent_value(kick, base + mmio::QUEUE_NOTIFY, queue)
                .map_err(kvm_failed)?;
        }
        let transport = Arc::new(Mutex::new(transport));
        self.platform
            .mmio
            .insert(base, layout::VIRTIO_MMIO_SIZE, transport.clone())
            .map_err(|source| DeviceSetError::Bus {
                id: id.into(),
                source,
            })?;
        places.push((base, gsi));
        Ok(transport)
    }
}
