//! The machine: built by one function, then run, paused and resumed by the control thread.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use devices::SharedMemory;
use devices::bus::{Bus, BusError};
use devices::catalog::DeviceConfig;
use devices::legacy::i8042::CtrlAltDelError;
use devices::mmds::{self, Mmds};
use devices::virtio::{DeviceKind, UpdateError};
use serde_json::{Value, json};
use vmm_sys_util::eventfd::EventFd;

use crate::boot::{self, BootError};
use crate::config::{ConfigError, CpuConfigFileError, CpuConfigSource, VmConfig};
use crate::device_memory::DeviceMemory;
use crate::device_set::{DeviceSet, DeviceSetError, Platform, WiringError, can_come_and_go};
use crate::event_loop::IoLoops;
use crate::events::EventBus;
use crate::kvm::{self, KvmError};
use crate::legacy::{Legacy, LegacyError};
use crate::memory::{self, MemoryError, Sharing};
use crate::metrics::prometheus::Exposition;
use crate::metrics::{TickRate, Totals, add_to_sum};
use crate::seccomp::{self, Filters, SeccompError};
use crate::vcpu::{Ended, VcpuHandle, VcpuShared};
use crate::x86_64::cpu::{Cpu, CpuError};
use crate::x86_64::{layout, tsc};

/// Why a machine cannot be built, or cannot do what it is asked.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// Nothing to boot.
    #[error("there is no kernel: set one with PUT /boot-source")]
    NoKernel,
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The file of a CPU template.
    #[error(transparent)]
    CpuConfig(#[from] CpuConfigFileError),
    /// The guest's CPU.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel, initrd, command line, tables, vCPU state.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Legacy devices.
    #[error(transparent)]
    Legacy(#[from] LegacyError),
    /// Virtio devices.
    #[error(transparent)]
    Devices(#[from] DeviceSetError),
    /// What virtio devices are connected to.
    #[error(transparent)]
    Wiring(#[from] WiringError),
    /// An address map.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The host refused a thread or a descriptor.
    #[error("cannot {op}")]
    Host {
        /// What was tried.
        op: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The keyboard.
    #[error(transparent)]
    CtrlAltDel(#[from] CtrlAltDelError),
}

/// Why a device cannot be plugged into a running machine; nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum HotplugError {
    /// It contradicts the rest of the config.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A guest finds its root device when it boots.
    #[error("device '{0}' cannot become the root device of a running machine")]
    Root(String),
    /// A vhost-user backend needs memory that was made for it.
    #[error(
        "device '{0}' has a vhost-user backend, which cannot see the memory of this machine: \
         start it with a drive that has a socket to have memory that is shared"
    )]
    PrivateMemory(String),
    /// It cannot be made or connected.
    #[error(transparent)]
    Device(#[from] DeviceSetError),
}

/// The filters of the threads that run this machine's devices: nothing for devices that can never come.
fn io_filters(config: &VmConfig, filters: Filters, api: bool) -> Filters {
    let present: Vec<_> = config.devices().iter().map(DeviceConfig::kind).collect();
    let possible = |kind| present.contains(&kind) || (api && can_come_and_go(kind));
    let filters = filters.for_devices(possible, api);
    filters.for_backends(config.shares_memory())
}

/// How machines are built, beyond their config.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Virtio over PCI; else over MMIO. A guest that is told `pci=off` gets MMIO in any case.
    pub pci: bool,
    /// Log the guest's boot time, counted from this moment of the monotonic clock in microseconds.
    pub boot_timer: Option<u64>,
    /// The way to whoever listens to `GET /events`.
    pub events: EventBus,
    /// What threads may do.
    pub filters: Filters,
    /// Whether there are clients who can change the machine.
    pub api: bool,
    /// What the metadata service gives to guests.
    pub metadata: Arc<mmds::Store>,
}

/// Descriptors that the control thread waits for.
pub struct Events {
    /// A vCPU has ended the machine.
    pub vcpu_ended: RawFd,
    /// The guest has reset the machine.
    pub reset: RawFd,
    /// The guest has powered the machine off.
    pub power_off: RawFd,
    /// The serial port can take input again.
    pub console_room: RawFd,
    /// The guest has let go of a device; none where devices cannot go.
    pub ejection: Option<RawFd>,
}

/// What is remembered while the machine is paused, so that the guest's clocks stand still.
struct Pause {
    kvmclock: u64,
    host_tsc: u64,
}

/// A machine. Fields are dropped in order: vCPUs first, guest memory last.
pub struct Vm {
    vcpus: Vec<VcpuHandle>,
    shared: Arc<VcpuShared>,
    devices: DeviceSet,
    legacy: Legacy,
    mmds: Option<Arc<Mmds>>,
    kvm: Arc<kvm::Vm>,
    pause: Option<Pause>,
    ticks: TickRate,
    /// Whether other processes can see its memory.
    shares_memory: bool,
    config: VmConfig,
    _memory: SharedMemory,
}

impl Vm {
    /// Builds the machine that `config` describes; its vCPUs wait for the first [`Vm::resume`]. When it fails,
    /// nothing is left of it.
    pub fn build(config: VmConfig, settings: &Settings) -> Result<Self, VmError> {
        if config.boot_source.kernel_image_path.is_empty() {
            return Err(VmError::NoKernel);
        }
        let template = config
            .cpu_config
            .as_ref()
            .map(CpuConfigSource::load)
            .transpose()?;
        let kvm = kvm::open(template.as_ref().map_or(&[], |custom| &custom.kvm_capabilities))?;
        let machine = &config.machine_config;
        let sharing = match config.shares_memory() {
            true => Sharing::Shared,
            false => Sharing::Private,
        };
        let ram = memory::create_of(machine.huge_pages, sharing, machine.mem_size_mib as u64)?;
        let vm = Arc::new(kvm::Vm::new(&kvm, &ram, machine.track_dirty_pages)?);
        let cpu = Cpu::new(&kvm, &vm, machine, template)?;
        // What devices add to it is not RAM: the memory map must not have it.
        let memory = SharedMemory::new(ram.clone());
        let free = layout::device_memory((machine.mem_size_mib as u64) << 20, memory::address_limit());
        let (pio, mmio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let legacy = Legacy::new(&vm, &pio, config.serial.as_ref())?;
        let mut command_line = boot::command_line(&config)?;
        let pci = settings.pci && !command_line.has_value("pci", "off");

        let filters = io_filters(&config, settings.filters.clone(), settings.api);
        let io_loops = IoLoops::spawn(machine.io_threads.unwrap_or(1), &filters);
        let io_loops = io_loops.map_err(|source| VmError::Host {
            op: "start an io loop",
            source,
        })?;
        let service = |config: &mmds::Config| Mmds::new(config.clone(), Arc::clone(&settings.metadata));
        let mmds = config.mmds_config.as_ref().map(service).map(Arc::new);
        let platform = Platform {
            vm: Arc::clone(&vm),
            mmio: Arc::clone(&mmio),
            memory: memory.clone(),
            device_memory: DeviceMemory::new(Arc::clone(&vm), memory.clone(), free),
            host: Arc::new(io_loops),
            events: settings.events.clone(),
            ged: legacy.event_device(),
            mmds: mmds.clone(),
        };
        let mut devices = DeviceSet::new(platform, &pio, pci)?;
        for device in config.devices() {
            devices.attach(device)?;
        }
        boot::add_device_parameters(&mut command_line, &config, devices.mmio_places())?;
        if let Some(start) = settings.boot_timer {
            crate::boot_timer::insert(&mmio, start, &settings.events)?;
        }

        let plan = boot::Plan {
            config: &config,
            command_line: &command_line,
            pci,
            mmio_devices: devices.mmio_places(),
        };
        let entry = boot::load(&ram, &plan)?;
        let ended = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let ended = ended.map_err(|source| VmError::Host {
            op: "make an event descriptor",
            source,
        })?;
        let shared = Arc::new(VcpuShared {
            pio,
            mmio,
            ended,
            reason: Mutex::default(),
            filters: settings.filters.clone(),
        });
        let vcpus = boot::create_vcpus(&vm, &ram, (&cpu, machine.vcpu_count), entry)?
            .into_iter()
            .map(|(id, fd, exit)| VcpuHandle::spawn(id, fd, exit, Arc::clone(&shared)))
            .collect::<io::Result<Vec<_>>>()
            .map_err(|source| VmError::Host {
                op: "start a vCPU's thread",
                source,
            })?;
        let pause = Some(Pause {
            kvmclock: vm.clock()?,
            host_tsc: tsc(),
        });
        Ok(Self {
            vcpus,
            shared,
            devices,
            legacy,
            mmds,
            kvm: vm,
            pause,
            ticks: TickRate::start(),
            shares_memory: sharing == Sharing::Shared,
            config,
            _memory: memory,
        })
    }

    /// Takes from the control thread what it needs no more, now that the machine runs and nobody can ask for a change.
    pub fn settle(&self) -> Result<(), SeccompError> {
        let filters = io_filters(&self.config, self.shared.filters.clone(), false);
        filters.confine(seccomp::Thread::Settled)
    }

    /// What the machine was built from, with the changes since.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// Whether the guest stands still.
    pub fn is_paused(&self) -> bool {
        self.pause.is_some()
    }

    /// Stops the guest: first its vCPUs, then its devices when they have finished what is in flight.
    pub fn pause(&mut self) -> Result<(), VmError> {
        if self.is_paused() {
            return Ok(());
        }
        self.vcpus.iter().for_each(VcpuHandle::pause);
        self.vcpus.iter().for_each(VcpuHandle::wait_parked);
        let kvmclock = self.kvm.clock().inspect_err(|_| {
            self.vcpus.iter().for_each(|vcpu| vcpu.resume(0));
        })?;
        self.pause = Some(Pause {
            kvmclock,
            host_tsc: tsc(),
        });
        self.devices.pause();
        log::info!("The microVM is paused.");
        Ok(())
    }

    /// Lets the guest go on, with its clocks as they were.
    pub fn resume(&mut self) -> Result<(), VmError> {
        let Some(pause) = &self.pause else { return Ok(()) };
        self.kvm.set_clock(pause.kvmclock)?;
        let hidden_ticks = tsc().wrapping_sub(pause.host_tsc);
        self.devices.resume();
        self.vcpus.iter().for_each(|vcpu| vcpu.resume(hidden_ticks));
        self.pause = None;
        log::info!("The microVM is resumed.");
        Ok(())
    }

    /// Plugs a device into the running machine and tells the guest.
    pub fn hotplug(&mut self, device: DeviceConfig) -> Result<(), HotplugError> {
        let mut config = self.config.clone();
        config.put_device(device.clone())?;
        if device.is_root() {
            return Err(HotplugError::Root(device.id().into()));
        }
        if device.shares_memory() && !self.shares_memory {
            return Err(HotplugError::PrivateMemory(device.id().into()));
        }
        self.devices.hotplug(device)?;
        self.config = config;
        Ok(())
    }

    /// Asks the guest to let go of a device, for [`Vm::take_ejected`] to tell.
    pub fn ask_to_release(&mut self, kind: DeviceKind, id: &str) -> Result<(), DeviceSetError> {
        self.check_removable(kind, id)?;
        if self.is_paused() {
            return Err(DeviceSetError::Paused(id.into()));
        }
        self.devices.ask_to_release(kind, id)
    }

    /// Keeps a device that the guest has not let go of.
    pub fn keep(&mut self, kind: DeviceKind, id: &str) -> Result<(), DeviceSetError> {
        self.devices.keep(kind, id)
    }

    /// Takes a device away from the guest without asking.
    pub fn take_away(&mut self, kind: DeviceKind, id: &str) -> Result<(), DeviceSetError> {
        self.check_removable(kind, id)?;
        self.devices.take_away(kind, id)?;
        self.config.remove_device(kind, id);
        Ok(())
    }

    /// Unplugs the devices that the guest has let go of; gives their names.
    pub fn take_ejected(&mut self) -> Vec<(DeviceKind, String)> {
        let ejected = self.devices.take_ejected();
        for (kind, id) in &ejected {
            self.config.remove_device(*kind, id);
        }
        ejected
    }

    fn check_removable(&self, kind: DeviceKind, id: &str) -> Result<(), DeviceSetError> {
        match self.config.device(kind, id) {
            None => Err(DeviceSetError::NotFound(id.into())),
            Some(device) if device.is_root() => Err(DeviceSetError::Root(id.into())),
            Some(_) => Ok(()),
        }
    }

    /// Changes a device while the guest uses it, wholly or not at all.
    pub fn patch_device(&mut self, kind: DeviceKind, id: &str, patch: Value) -> Result<(), DeviceSetError> {
        let config = self.config.device(kind, id);
        let mut config = config.ok_or_else(|| DeviceSetError::NotFound(id.into()))?;
        let refused = |source| DeviceSetError::Update {
            kind,
            id: id.into(),
            source,
        };
        config.patch(&patch).map_err(refused)?;
        let mut patched = self.config.clone();
        let fits = patched.put_device(config);
        fits.map_err(|error| refused(UpdateError::Device(error.into())))?;
        self.devices.update(kind, id, patch)?;
        self.config = patched;
        Ok(())
    }

    /// What a device tells about itself beyond its config.
    pub fn device_status(&self, kind: DeviceKind, id: &str) -> Result<Value, DeviceSetError> {
        self.devices.status(kind, id)
    }

    /// Presses Ctrl-Alt-Del on the guest's keyboard. Clients know that nobody may be there to read it.
    pub fn send_ctrl_alt_del(&mut self) -> Result<(), VmError> {
        match self.legacy.ctrl_alt_del() {
            Err(error @ CtrlAltDelError::KeyboardOff) => {
                log::warn!("Ctrl-Alt-Del has no effect: {error}.");
                Ok(())
            }
            pressed => Ok(pressed?),
        }
    }

    /// Presses the guest's power button.
    pub fn press_power_button(&mut self) {
        self.legacy.power_button();
    }

    /// Gives input to the guest's console; returns how many bytes it took, and none when it is to be tried again soon.
    pub fn console_input(&self, bytes: &[u8]) -> Option<usize> {
        self.legacy.console_input(bytes)
    }

    /// Whether the console is this process's standard input and output.
    pub fn console_is_stdio(&self) -> bool {
        self.legacy.console_is_stdio()
    }

    /// Descriptors to wait for.
    pub fn events(&self) -> Events {
        Events {
            vcpu_ended: self.shared.ended.as_raw_fd(),
            reset: self.legacy.reset_event(),
            power_off: self.legacy.power_off_event(),
            console_room: self.legacy.console_room_event(),
            ejection: self.devices.ejection_event(),
        }
    }

    /// Why a vCPU has ended the machine.
    pub fn ended(&self) -> Option<Ended> {
        *self.shared.reason.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the machine's counters.
    pub fn collect_metrics(&self, totals: &mut Totals) {
        for vcpu in &self.vcpus {
            let counters = vcpu.metrics().to_json(&self.ticks);
            add_to_sum(&mut totals.groups, &json!({"vcpu": counters}));
        }
        self.legacy.collect_metrics(&mut totals.groups);
        self.devices.collect_metrics(totals);
        if let Some(mmds) = &self.mmds {
            add_to_sum(&mut totals.groups, &json!({"mmds": mmds.metrics()}));
        }
    }

    /// How long what the devices did took.
    pub fn collect_histograms(&self, text: &mut Exposition) {
        self.devices.collect_histograms(text);
    }
}
