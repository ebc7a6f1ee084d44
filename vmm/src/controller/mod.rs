//! The control thread's decisions: every [`Action`] is carried out here, once.
//!
//! Before start there is only a config: a PUT checks it, opens what it names to see that it can be opened, and keeps
//! plain data. `InstanceStart` makes a [`Vm`] of it, or leaves everything as it was.

mod balloon;
mod error;
mod file;
mod observe;

use std::sync::Arc;
use std::time::Instant;

use devices::catalog::DeviceConfig;
use devices::mmds;
use devices::virtio::{DeviceKind, mem};
use serde::Serialize;
use serde_json::{Value, json};

use crate::api::{Action, Reply, RequestMetrics};
use crate::boot::image::{Image, ImageKind};
use crate::config::{LoggerConfig, MachineConfig, SerialConfig, VmConfig};
use crate::device_set::{DeviceSetError, can_come_and_go};
use crate::events::Event;
use crate::logger::LOGGER;
use crate::metrics::prometheus::CONTENT_TYPE;
use crate::metrics::{MetricsSink, device_group};
use crate::unplug::{Otherwise, Unplug, UnplugConfig};
use crate::vm::{HotplugError, Settings, Vm, VmError};

use observe::Latencies;

pub use error::ControlError;
pub use file::SectionError;

/// The API level that Mayfly implements.
pub const API_VERSION: &str = "1.16.1";

/// The names of the states that clients see.
const STATES: [&str; 3] = ["Not started", "Running", "Paused"];

enum State {
    Configuring(Box<VmConfig>),
    Running(Box<Vm>),
}

/// What the process was started with.
#[derive(Debug, Clone)]
pub struct Instance {
    /// Its name.
    pub id: String,
    /// How machines are built.
    pub settings: Settings,
    /// `process_startup_time_us` and `process_startup_time_cpu_us` of the metrics.
    pub startup_us: (u64, u64),
}

/// The state of the process, owned by the control thread.
pub struct Controller {
    instance: Instance,
    state: State,
    metrics: MetricsSink,
    requests: Arc<RequestMetrics>,
    latencies: Latencies,
}

impl Controller {
    /// A process without a machine yet.
    pub fn new(instance: Instance, requests: Arc<RequestMetrics>) -> Self {
        let state = State::Configuring(Box::default());
        Self {
            instance,
            state,
            metrics: MetricsSink::default(),
            requests,
            latencies: Latencies::default(),
        }
    }

    /// Carries an action out.
    pub fn handle(&mut self, action: Action) -> Result<Reply, ControlError> {
        match action {
            Action::GetInstance => Ok(self.instance_info()),
            Action::GetVersion => {
                let version = env!("CARGO_PKG_VERSION");
                Ok(reply(
                    &json!({"firecracker_version": API_VERSION, "mayfly_version": version}),
                ))
            }
            Action::GetMachineConfig => Ok(reply(&self.any_config().machine_config)),
            Action::GetVmConfig => Ok(reply(&self.any_config().shown())),
            Action::GetMetrics => Ok(Reply::Text(CONTENT_TYPE, self.exposition())),
            Action::GetEvents if self.events().has_room() => Ok(Reply::Events),
            Action::GetEvents => Err(ControlError::Subscribers),
            Action::GetBalloon(view) => self.get_balloon(view),
            Action::PutMachineConfig(config) => self.set_machine(config),
            Action::PatchMachineConfig(patch) => {
                let config = self.config()?.machine_config.patched(&patch);
                self.set_machine(config)
            }
            Action::PutCpuConfig(config) => {
                self.config()?.put_cpu_config(*config);
                Ok(Reply::Done)
            }
            Action::PutBootSource(source) => {
                let config = self.config()?;
                check_image(ImageKind::Kernel, Some(&source.kernel_image_path))?;
                check_image(ImageKind::Initrd, source.initrd_path.as_ref())?;
                config.put_boot_source(source)?;
                Ok(Reply::Done)
            }
            Action::GetMemoryHotplug => self.memory_hotplug(),
            Action::PutDevice(device) => match &self.state {
                State::Running(_) if can_come_and_go(device.kind()) => self.hotplug(*device),
                _ => self.put_device(*device),
            },
            Action::DeleteDevice { kind, id, unplug } => self.unplug(kind, &id, unplug),
            Action::PatchDevice { kind, id, patch } => self.patch_device(kind, &id, patch),
            Action::PutMmdsConfig(mmds) => {
                self.config()?.put_mmds_config(mmds)?;
                Ok(Reply::Done)
            }
            Action::GetMmds => Ok(reply(&*self.metadata()?.get())),
            Action::PutMmds(document) => metadata_done(self.metadata()?.put(document)),
            Action::PatchMmds(patch) => metadata_done(self.metadata()?.patch(patch)),
            Action::PutSerial(serial) => self.put_serial(serial),
            Action::PutLogger(logger) => {
                self.config()?;
                configure_logger(&logger)?;
                Ok(Reply::Done)
            }
            Action::PutMetrics(metrics) => {
                self.config()?;
                self.set_metrics(metrics)?;
                Ok(Reply::Done)
            }
            Action::InstanceStart => self.start(),
            Action::FlushMetrics => {
                self.vm()?;
                self.write_metrics().map_err(ControlError::MetricsWrite)?;
                Ok(Reply::Done)
            }
            Action::SendCtrlAltDel => done(self.vm()?.send_ctrl_alt_del()),
            Action::PowerButton => {
                self.vm()?.press_power_button();
                Ok(Reply::Done)
            }
            Action::Pause => self.pause(),
            Action::Resume => self.resume(),
        }
    }

    /// The running machine.
    pub fn running(&mut self) -> Option<&mut Vm> {
        match &mut self.state {
            State::Running(vm) => Some(vm),
            State::Configuring(_) => None,
        }
    }

    fn config(&mut self) -> Result<&mut VmConfig, ControlError> {
        match &mut self.state {
            State::Configuring(config) => Ok(config),
            State::Running(_) => Err(ControlError::AfterStart),
        }
    }

    fn vm(&mut self) -> Result<&mut Vm, ControlError> {
        self.running().ok_or(ControlError::BeforeStart)
    }

    fn any_config(&self) -> &VmConfig {
        match &self.state {
            State::Configuring(config) => config,
            State::Running(vm) => vm.config(),
        }
    }

    fn state_name(&self) -> &'static str {
        match &self.state {
            State::Configuring(_) => STATES[0],
            State::Running(vm) if vm.is_paused() => STATES[2],
            State::Running(_) => STATES[1],
        }
    }

    fn instance_info(&self) -> Reply {
        #[derive(Serialize)]
        struct Info<'a> {
            id: &'a str,
            state: &'a str,
            vmm_version: &'a str,
            app_name: &'a str,
        }
        reply(&Info {
            id: &self.instance.id,
            state: self.state_name(),
            vmm_version: API_VERSION,
            app_name: "Mayfly",
        })
    }

    fn set_machine(&mut self, config: MachineConfig) -> Result<Reply, ControlError> {
        self.config()?.put_machine(config)?;
        Ok(Reply::Done)
    }

    fn put_device(&mut self, device: DeviceConfig) -> Result<Reply, ControlError> {
        let mut config = self.config()?.clone();
        config.put_device(device.clone())?;
        device.check().map_err(|source| ControlError::Device {
            kind: device.kind(),
            source,
        })?;
        *self.config()? = config;
        Ok(Reply::Done)
    }

    fn hotplug(&mut self, device: DeviceConfig) -> Result<Reply, ControlError> {
        let (kind, id) = (device.kind(), device.id().to_owned());
        let group = device_group(kind, device.metrics_group(), &id);
        let plugged = self.vm()?.hotplug(device);
        plugged.map_err(|error| match error {
            HotplugError::Config(error) => ControlError::Config(error),
            source => ControlError::Hotplug { kind, source },
        })?;
        self.metrics.begin_group(&group);
        let (kind, id) = (kind.name(), id.as_str());
        self.events().publish(&Event::DeviceAttached { kind, id });
        Ok(Reply::Done)
    }

    /// Detaches a device now, or asks the guest to let go of it. Clients that send no body know nothing of guests that
    /// do not let go, so their device goes in any case: at once if the guest is paused, as it would not answer.
    fn unplug(
        &mut self,
        kind: DeviceKind,
        id: &str,
        unplug: Option<UnplugConfig>,
    ) -> Result<Reply, ControlError> {
        let UnplugConfig { timeout_ms, force } = unplug.unwrap_or_default();
        if force || (unplug.is_none() && self.vm()?.is_paused()) {
            self.take_away(kind, id)?;
            return Ok(Reply::Done);
        }
        let asked = self.vm()?.ask_to_release(kind, id);
        asked.map_err(|source| ControlError::Unplug { kind, source })?;
        let otherwise = match unplug {
            Some(_) => Otherwise::Keep,
            None => Otherwise::TakeAway,
        };
        Ok(Reply::Later(Unplug::new(kind, id, timeout_ms, otherwise)))
    }

    /// Detaches the devices that the guest has let go of; gives their names.
    pub fn take_ejected(&mut self) -> Vec<(DeviceKind, String)> {
        let ejected = self.running().map(Vm::take_ejected).unwrap_or_default();
        for (kind, id) in &ejected {
            let kind = kind.name();
            self.events().publish(&Event::DeviceDetached { kind, id });
        }
        ejected
    }

    /// Does with a device what is to be done when the guest has not let go of it in time.
    pub fn expire(&mut self, unplug: &Unplug) -> Result<Reply, ControlError> {
        let Unplug { kind, id, .. } = unplug;
        let kind = *kind;
        if unplug.otherwise == Otherwise::TakeAway {
            return self.take_away(kind, id).map(|()| Reply::Done);
        }
        let kept = self.vm()?.keep(kind, id);
        let kept = kept.and_then(|()| Err(DeviceSetError::NotReleased(id.clone())));
        kept.map_err(|source| ControlError::Unplug { kind, source })
    }

    fn take_away(&mut self, kind: DeviceKind, id: &str) -> Result<(), ControlError> {
        let taken = self.vm()?.take_away(kind, id);
        taken.map_err(|source| ControlError::Unplug { kind, source })?;
        let kind = kind.name();
        self.events().publish(&Event::DeviceDetached { kind, id });
        Ok(())
    }

    /// What guests can read. After start it is there if it was used before: nobody could read what comes later.
    fn metadata(&self) -> Result<&mmds::Store, ControlError> {
        let store = &*self.instance.settings.metadata;
        match &self.state {
            State::Running(vm) if vm.config().mmds_config.is_none() && !store.is_initialized() => {
                Err(ControlError::Metadata(mmds::StoreError::NotInitialized))
            }
            _ => Ok(store),
        }
    }

    fn put_serial(&mut self, serial: SerialConfig) -> Result<Reply, ControlError> {
        let config = self.config()?;
        if let Some(path) = &serial.serial_out_path {
            let failed = |source| ControlError::Sink {
                section: "Serial",
                path: path.clone(),
                source,
            };
            crate::logger::open_sink(path).map_err(failed)?;
        }
        config.serial = Some(serial);
        Ok(Reply::Done)
    }

    fn memory_hotplug(&mut self) -> Result<Reply, ControlError> {
        let vm = self.vm()?;
        check_memory_hotplug(vm, "Memory hotplug status error")?;
        let status = vm.device_status(DeviceKind::Mem, mem::ID);
        let status = status.expect("a machine has the memory of its config");
        // By way of its type, as clients expect its order of keys.
        let status: mem::Status = serde_json::from_value(status).expect("the device's own status");
        Ok(reply(&status))
    }

    fn patch_device(&mut self, kind: DeviceKind, id: &str, patch: Value) -> Result<Reply, ControlError> {
        let vm = self.vm()?;
        // Clients know that a change of a pmem device without limits does nothing, whatever its id.
        if kind == DeviceKind::Pmem && patch.get("rate_limiter").is_none_or(Value::is_null) {
            return Ok(Reply::Done);
        }
        if kind == DeviceKind::Balloon {
            balloon::check_patch(vm, &patch)?;
        }
        if kind == DeviceKind::Mem {
            check_memory_hotplug(vm, "Memory hotplug update error")?;
        }
        let patched = vm.patch_device(kind, id, patch);
        patched.map_err(|source| ControlError::Patch { kind, source })?;
        let kind = kind.name();
        self.events().publish(&Event::DeviceUpdated { kind, id });
        Ok(Reply::Done)
    }

    fn start(&mut self) -> Result<Reply, ControlError> {
        let config = self.config()?.clone();
        let mut vm = Vm::build(config, &self.instance.settings).map_err(ControlError::Start)?;
        vm.resume().map_err(ControlError::Start)?;
        if let Some(vsock) = &vm.config().vsock {
            crate::signals::remove_on_fault(&vsock.uds_path);
        }
        self.state = State::Running(Box::new(vm));
        log::info!("The microVM is running.");
        self.events().publish(&Event::Started);
        crate::start::let_go();
        Ok(Reply::Done)
    }

    fn pause(&mut self) -> Result<Reply, ControlError> {
        let start = Instant::now();
        if !self.vm()?.is_paused() {
            self.vm()?.pause().map_err(ControlError::Vm)?;
            self.events().publish(&Event::Paused);
        }
        self.latencies.pause_vm = micros(start);
        self.latencies.vmm_pause_vm = self.latencies.pause_vm;
        Ok(Reply::Done)
    }

    fn resume(&mut self) -> Result<Reply, ControlError> {
        let start = Instant::now();
        if self.vm()?.is_paused() {
            self.vm()?.resume().map_err(ControlError::Vm)?;
            self.events().publish(&Event::Resumed);
        }
        self.latencies.resume_vm = micros(start);
        self.latencies.vmm_resume_vm = self.latencies.resume_vm;
        Ok(Reply::Done)
    }
}

fn check_memory_hotplug(vm: &Vm, prefix: &'static str) -> Result<(), ControlError> {
    match vm.config().memory_hotplug {
        Some(_) => Ok(()),
        None => Err(ControlError::Single {
            prefix,
            what: "there is no memory to be plugged in. Add it with PUT /hotplug/memory before the start"
                .into(),
        }),
    }
}

fn done(result: Result<(), VmError>) -> Result<Reply, ControlError> {
    result.map(|()| Reply::Done).map_err(ControlError::Vm)
}

fn metadata_done(result: Result<(), mmds::StoreError>) -> Result<Reply, ControlError> {
    result.map(|()| Reply::Done).map_err(ControlError::Metadata)
}

fn reply(body: &impl Serialize) -> Reply {
    Reply::Json(serde_json::to_string(body).expect("configs are plain data"))
}

fn micros(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// Applies logger settings.
pub fn configure_logger(config: &LoggerConfig) -> Result<(), ControlError> {
    let path = config.log_path.clone().unwrap_or_default();
    LOGGER.configure(config).map_err(|source| ControlError::Sink {
        section: "Logger",
        path,
        source,
    })
}

fn check_image(kind: ImageKind, path: Option<&String>) -> Result<(), ControlError> {
    if let Some(path) = path {
        Image::open(kind, path.as_ref()).map_err(ControlError::BootSource)?;
    }
    Ok(())
}
