//! The devices of a machine: attaching them gives them addresses and interrupts and puts them on the buses, before the
//! guest runs or while it does; on a PCI bus they can go again.
//!
//! Owned by the control thread. vCPU threads reach the devices through the buses, and this module's callbacks when
//! the guest programs MSIs or moves BARs.

mod error;
mod pci;
mod wiring;

use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use devices::SharedMemory;
use devices::acpi::ged::Ged;
use devices::bus::Bus;
use devices::catalog::{DeviceConfig, Services};
use devices::mmds::Mmds;
use devices::virtio::mmio::{self, MmioVirtio};
use devices::virtio::{DeviceKind, LaneHost, Report, Transport, VirtioDevice};
use serde_json::{Map, Value, json};
use vmm_sys_util::eventfd::EventFd;

pub use error::{DeviceSetError, WiringError};
use pci::PciBus;

use crate::device_memory::DeviceMemory;
use crate::events::{Event, EventBus};
use crate::interrupt_lines::Edge;
use crate::kvm;
use crate::metrics::prometheus::Exposition;
use crate::metrics::{DeviceMetrics, Totals, add_to_sum};
use crate::x86_64::layout;

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
    /// The loops that run the devices.
    pub host: Arc<dyn LaneHost>,
    /// The metadata service.
    pub mmds: Option<Arc<Mmds>>,
    /// Where broken devices are told of.
    pub events: EventBus,
    /// The event device, which tells the guest of changes on the bus.
    pub ged: Arc<Mutex<Ged>>,
}

type SharedTransport = Arc<Mutex<dyn Transport>>;

struct Attached {
    config: DeviceConfig,
    transport: SharedTransport,
    /// Its slot on the PCI bus.
    slot: Option<u8>,
}

impl Attached {
    fn lock(&self) -> MutexGuard<'_, dyn Transport + 'static> {
        self.transport.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is(&self, kind: DeviceKind, id: &str) -> bool {
        self.config.kind() == kind && self.config.id() == id
    }

    /// Ends a device that the guest no longer reaches. A vCPU may be in the middle of an access to it, or to its `kicks`:
    /// its thread may not make the system calls by which they end, so it must not be their last owner. Gives what the
    /// device has counted.
    fn end(self, kicks: &[Arc<EventFd>]) -> Value {
        wait_for_others(&self.transport);
        // It counts no more then.
        self.lock().slot().reset();
        let mut totals = Totals::default();
        self.collect_metrics(&mut totals);
        drop(self);
        kicks.iter().for_each(wait_for_others);
        totals.into_sums().into()
    }

    fn collect_metrics(&self, totals: &mut Totals) {
        let (counters, interrupts) = {
            let mut transport = self.lock();
            (transport.slot().metrics(), transport.interrupts())
        };
        add_to_sum(&mut totals.groups, &json!({"interrupts": interrupts}));
        totals.devices.push(DeviceMetrics {
            kind: self.config.kind(),
            id: self.config.id().into(),
            group: self.config.metrics_group(),
            counters,
        });
    }
}

/// Waits until nobody else owns what `shared` owns. No new owner can come, and those that are there leave soon.
fn wait_for_others<T: ?Sized>(shared: &Arc<T>) {
    while Arc::strong_count(shared) > 1 {
        thread::sleep(Duration::from_micros(50));
    }
}

/// How devices appear to the guest.
enum Wiring {
    Pci(Box<PciBus>),
    /// Register window and interrupt of each device so far.
    Mmio {
        places: Vec<(u64, u32)>,
    },
}

/// The devices of a machine.
pub struct DeviceSet {
    platform: Platform,
    wiring: Wiring,
    devices: Vec<Attached>,
    /// What those that are gone have counted.
    departed: Map<String, Value>,
}

/// Whether devices of this kind can be attached to and detached from a running machine.
pub(crate) fn can_come_and_go(kind: DeviceKind) -> bool {
    matches!(kind, DeviceKind::Block | DeviceKind::Net | DeviceKind::Pmem)
}

impl DeviceSet {
    /// A set without devices; with `pci` there is a bus for them.
    pub fn new(platform: Platform, pio: &Arc<Bus>, pci: bool) -> Result<Self, WiringError> {
        let wiring = if pci {
            Wiring::Pci(Box::new(PciBus::new(&platform, pio)?))
        } else {
            Wiring::Mmio { places: Vec::new() }
        };
        Ok(Self {
            platform,
            wiring,
            devices: Vec::new(),
            departed: Map::new(),
        })
    }

    /// Makes the device and plugs it in, before the guest runs.
    pub fn attach(&mut self, config: DeviceConfig) -> Result<(), DeviceSetError> {
        self.plug(config).map(drop)
    }

    /// Makes the device, plugs it into the running machine and tells the guest.
    pub fn hotplug(&mut self, config: DeviceConfig) -> Result<(), DeviceSetError> {
        self.bus()?;
        if self.find(config.kind(), config.id()).is_ok() {
            return Err(DeviceSetError::InUse(config.id().into()));
        }
        let slot = self.plug(config)?;
        self.tell_of_memory();
        if let (Some(slot), Ok(bus)) = (slot, self.bus()) {
            bus.announce(slot);
        }
        Ok(())
    }

    /// Asks the guest to let go of a device. It says so by way of [`Self::take_ejected`].
    pub fn ask_to_release(&mut self, kind: DeviceKind, id: &str) -> Result<(), DeviceSetError> {
        let slot = self.slot_of(kind, id)?;
        if self.bus()?.ask(slot) {
            return Ok(());
        }
        Err(DeviceSetError::Leaving(id.into()))
    }

    /// Does not wait for the guest any more; the device stays.
    pub fn keep(&mut self, kind: DeviceKind, id: &str) -> Result<(), DeviceSetError> {
        let slot = self.slot_of(kind, id)?;
        self.bus()?.withdraw(slot);
        Ok(())
    }

    /// Unplugs the devices that the guest has let go of when asked; gives their names.
    pub fn take_ejected(&mut self) -> Vec<(DeviceKind, String)> {
        let Ok(bus) = self.bus() else { return Vec::new() };
        let ejected = bus.take_ejected().into_iter();
        let emptied: Vec<_> = ejected.map(|slot| (slot, bus.unplug(slot))).collect();
        let gone: Vec<_> = emptied
            .into_iter()
            .filter_map(|(slot, kicks)| self.end(slot, &kicks))
            .collect();
        // A guest ejects what nobody asked for as often as it likes.
        if !gone.is_empty() {
            self.tell_of_memory();
        }
        gone
    }

    /// Takes a device away from the guest without asking, and has the guest look.
    pub fn take_away(&mut self, kind: DeviceKind, id: &str) -> Result<(), DeviceSetError> {
        let slot = self.slot_of(kind, id)?;
        let kicks = self.bus()?.take_away(slot);
        self.end(slot, &kicks);
        self.tell_of_memory();
        Ok(())
    }

    /// Ends the device of a slot that was emptied, and keeps what it has counted; gives its name.
    fn end(&mut self, slot: u8, kicks: &[Arc<EventFd>]) -> Option<(DeviceKind, String)> {
        let index = self.devices.iter().position(|device| device.slot == Some(slot))?;
        let device = self.devices.remove(index);
        let name = (device.config.kind(), device.config.id().to_owned());
        add_to_sum(&mut self.departed, &device.end(kicks));
        Some(name)
    }

    /// Tells the devices that one of them may have come or gone with memory of its own.
    fn tell_of_memory(&self) {
        self.devices
            .iter()
            .for_each(|device| device.lock().slot().memory_changed());
    }

    /// Signalled when the guest has let go of a device; none where devices cannot go.
    pub fn ejection_event(&self) -> Option<RawFd> {
        match &self.wiring {
            Wiring::Pci(bus) => Some(bus.ejection()),
            Wiring::Mmio { .. } => None,
        }
    }

    /// Makes the device and connects it; gives its slot on the PCI bus.
    fn plug(&mut self, config: DeviceConfig) -> Result<Option<u8>, DeviceSetError> {
        let id = config.id();
        let services = Services {
            memory: &self.platform.device_memory,
            mmds: self.platform.mmds.as_ref(),
        };
        let built = config.build(&services);
        let device = built.map_err(|source| DeviceSetError::Build {
            id: id.into(),
            source,
        })?;
        let (slot, transport) = match &self.wiring {
            Wiring::Pci(bus) => {
                let (slot, transport) = bus.plug(&self.platform, id, device)?;
                (Some(slot), transport)
            }
            Wiring::Mmio { .. } => (None, self.attach_mmio(id, device)?),
        };
        let attached = Attached {
            config,
            transport,
            slot,
        };
        attached.lock().slot().report_to(self.report(&attached.config));
        self.devices.push(attached);
        Ok(slot)
    }

    fn bus(&mut self) -> Result<&mut PciBus, DeviceSetError> {
        match &mut self.wiring {
            Wiring::Pci(bus) => Ok(bus),
            Wiring::Mmio { .. } => Err(DeviceSetError::NoPci),
        }
    }

    fn slot_of(&self, kind: DeviceKind, id: &str) -> Result<u8, DeviceSetError> {
        self.find(kind, id)?.slot.ok_or(DeviceSetError::NoPci)
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
            Wiring::Pci(_) => &[],
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
            kind,
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
        add_to_sum(&mut totals.groups, &Value::Object(self.departed.clone()));
        self.devices
            .iter()
            .for_each(|device| device.collect_metrics(totals));
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
        let device = self.devices.iter().find(|device| device.is(kind, id));
        device.ok_or_else(|| DeviceSetError::NotFound(id.into()))
    }

    fn attach_mmio(
        &mut self,
        id: &str,
        device: Box<dyn VirtioDevice>,
    ) -> Result<SharedTransport, DeviceSetError> {
        let Wiring::Mmio { places } = &mut self.wiring else {
            unreachable!("the caller has matched")
        };
        let Platform { vm, memory, host, .. } = &self.platform;
        let failed = DeviceSetError::connecting(id);
        let limit = layout::VIRTIO_MMIO_GSIS.len();
        let place = layout::virtio_mmio_device(places.len());
        let (base, gsi) = place.ok_or_else(|| DeviceSetError::Full { id: id.into(), limit })?;
        let line = Arc::new(Edge::new(Arc::clone(vm), gsi));
        let transport = MmioVirtio::new(device, line, memory.clone(), Arc::clone(host));
        let mut transport = transport.map_err(|error| failed(error.into()))?;
        for (queue, kick) in (0u32..).zip(transport.slot().kicks()) {
            vm.register_ioevent_value(kick, base + mmio::QUEUE_NOTIFY, queue)
                .map_err(|error| failed(error.into()))?;
        }
        vm.register_ioevent_value(transport.ignored(), base + mmio::INTERRUPT_ACK, mmio::ACK_QUEUES)
            .map_err(|error| failed(error.into()))?;
        let transport = Arc::new(Mutex::new(transport));
        let mmio = &self.platform.mmio;
        mmio.insert(base, layout::VIRTIO_MMIO_SIZE, transport.clone())
            .map_err(|error| failed(error.into()))?;
        places.push((base, gsi));
        Ok(transport)
    }
}
