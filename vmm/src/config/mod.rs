//! What the user asks for. These types are the API bodies, the sections of the config file and the answer of
//! `GET /vm/config` all at once; a config is plain data, and nothing is opened while it is checked.

mod cpu;
mod file;
mod machine;
mod metadata;
mod process;
#[cfg(test)]
mod tests;

use devices::catalog::DeviceConfig;
use devices::mmds;
use devices::virtio::{DeviceKind, balloon, block, mem, net, pmem, rng, vsock};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::boot::cmdline::{CommandLine, CommandLineError};

pub use cpu::{
    Bitmap, Capability, CpuConfig, CpuConfigFileError, CpuConfigSource, CpuidModifier, MsrModifier,
    RegisterModifier,
};
pub use file::{ConfigFileError, read_config_file};
pub use machine::{CpuTemplate, HugePages, MachineConfig, MachinePatch};
pub use metadata::{MetadataFileError, read_metadata};
pub use process::{LogLevel, LoggerConfig, MetricsConfig, SerialConfig};

/// The largest guest: vCPUs.
pub const MAX_VCPUS: u8 = 32;
/// The smallest guest memory that holds the boot structures and a kernel, in MiB.
pub const MIN_MEMORY_MIB: usize = 16;
/// The most threads that run devices.
pub const MAX_IO_THREADS: u8 = 16;

/// Why a config was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The count of vCPUs is out of range.
    #[error(
        "Machine config error: vcpu_count is {0}; it must be 1 to {MAX_VCPUS}, and 1 or an even number with smt"
    )]
    VcpuCount(u8),
    /// The size of memory is out of range.
    #[error("Machine config error: mem_size_mib is {0}; it must be at least {MIN_MEMORY_MIB}")]
    MemorySize(usize),
    /// Memory is not made of whole huge pages.
    #[error("Machine config error: mem_size_mib is {0}; with huge_pages it must be a multiple of 2")]
    HugePages(usize),
    /// The count of io threads is out of range.
    #[error("Machine config error: io_threads is {0}; it must be 1 to {MAX_IO_THREADS}")]
    IoThreads(u8),
    /// Memory that a vhost-user backend would not see.
    #[error(
        "drive '{0}' has a vhost-user backend, which does not see memory that is plugged in: leave out one of them, \
         the drive or memory-hotplug"
    )]
    UnseenMemory(String),
    /// Memory that vhost-net would not see.
    #[error(
        "interface '{0}' has vhost, and vhost-net does not see memory that is plugged in: leave out one of them, vhost \
         or memory-hotplug"
    )]
    UnseenByVhost(String),
    /// No kernel could be given that command line.
    #[error("Boot source error")]
    BootArgs(#[from] CommandLineError),
    /// The balloon is larger than memory.
    #[error(
        "Balloon config error: Amount of pages requested is too large. amount_mib is {amount_mib}, and the machine has \
         {limit_mib} MiB of memory"
    )]
    BalloonSize {
        /// What was asked for.
        amount_mib: u32,
        /// How much there is.
        limit_mib: usize,
    },
    /// Memory is smaller than the balloon.
    #[error(
        "Machine config error: The memory size (MiB) is smaller than the previously set balloon device target size. \
         mem_size_mib is {mem_size_mib}, and the balloon's amount_mib {target_mib}: lower that one first"
    )]
    MemoryBelowBalloon {
        /// What was asked for.
        mem_size_mib: usize,
        /// The balloon's target.
        target_mib: u32,
    },
    /// Two root devices.
    #[error("{section} config error: '{new}' cannot be the root device: {kind} '{old}' is it already")]
    SecondRoot {
        /// The section of the device in question.
        section: &'static str,
        /// What the present root device is.
        kind: &'static str,
        /// The present root device.
        old: String,
        /// The device in question.
        new: String,
    },
    /// Two network interfaces with one address.
    #[error("Network config error: the MAC address {mac} is already used by interface '{id}'")]
    MacInUse {
        /// The address.
        mac: String,
        /// Who has it.
        id: String,
    },
    /// The metadata service on an interface whose frames Mayfly does not see.
    #[error(
        "Network config error: interface '{0}' has vhost, so it cannot serve metadata: remove vhost, or the interface from \
         mmds-config"
    )]
    VhostMmds(String),
    /// Two network interfaces with one inherited tap.
    #[error("Network config error: host_fd {fd} is already used by interface '{id}'")]
    DescriptorInUse {
        /// The descriptor's number.
        fd: i32,
        /// Who has it.
        id: String,
    },
    /// Two network interfaces on one tap.
    #[error("Network config error: the tap '{tap}' is already used by interface '{id}'")]
    TapInUse {
        /// The tap.
        tap: String,
        /// Who has it.
        id: String,
    },
    /// The metadata service could not be reached; the prefix is spelled as clients of the API know it.
    #[error("MMMDS config error: {0}")]
    Mmds(#[from] mmds::ConfigError),
    /// A resource id breaks the rules.
    #[error("{0}")]
    Id(&'static str),
}

/// What to boot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "struct BootSourceConfig")]
pub struct BootSource {
    /// An ELF `vmlinux` or a `bzImage`.
    pub kernel_image_path: String,
    /// An initial RAM disk.
    pub initrd_path: Option<String>,
    /// The kernel command line; the default is [`crate::boot::cmdline::DEFAULT`].
    pub boot_args: Option<String>,
}

/// Stands for what this version does not have: only `null` is taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Absent;

impl Serialize for Absent {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_none()
    }
}

impl<'de> Deserialize<'de> for Absent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Option::<serde::de::IgnoredAny>::deserialize(deserializer)? {
            None => Ok(Self),
            Some(_) => Err(serde::de::Error::custom(
                "this setting is not supported by this version of Mayfly",
            )),
        }
    }
}

/// The whole machine, in the key order of `GET /vm/config`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(
    rename_all = "kebab-case",
    deny_unknown_fields,
    expecting = "struct VmmConfig"
)]
pub struct VmConfig {
    /// The memory balloon.
    #[serde(default)]
    pub balloon: Option<balloon::Config>,
    /// Disks; the root disk comes first.
    pub drives: Vec<block::Config>,
    /// What to boot.
    pub boot_source: BootSource,
    /// A custom CPU template, which goes before one that the machine config names; kept out of answers.
    #[serde(default)]
    pub cpu_config: Option<CpuConfigSource>,
    /// Applied at once and not kept.
    #[serde(default)]
    pub logger: Option<LoggerConfig>,
    /// Size and shape.
    #[serde(default, deserialize_with = "null_is_default")]
    pub machine_config: MachineConfig,
    /// Applied at once and not kept.
    #[serde(default)]
    pub metrics: Option<MetricsConfig>,
    /// The metadata service.
    #[serde(default)]
    pub mmds_config: Option<mmds::Config>,
    /// Network cards.
    #[serde(default, deserialize_with = "null_is_default")]
    pub network_interfaces: Vec<net::Config>,
    /// Sockets between guest and host.
    #[serde(default)]
    pub vsock: Option<vsock::Config>,
    /// The entropy device.
    #[serde(default)]
    pub entropy: Option<rng::Config>,
    /// Files as memory.
    #[serde(default, deserialize_with = "null_is_default")]
    pub pmem: Vec<pmem::Config>,
    /// Memory that is plugged in and out.
    #[serde(default)]
    pub memory_hotplug: Option<mem::Config>,
    /// The serial port; kept out of answers, as clients of the API expect.
    #[serde(default, skip_serializing)]
    pub serial: Option<SerialConfig>,
}

fn null_is_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    Option::deserialize(from).map(Option::unwrap_or_default)
}

impl VmConfig {
    /// What users see, which makes the same machine again: without cards that would serve metadata, and are detached. Those
    /// do it again when they are attached.
    pub fn shown(&self) -> Self {
        let mut shown = self.clone();
        let is_there = |id: &String| self.network_interfaces.iter().any(|net| net.iface_id == *id);
        if let Some(mmds) = &mut shown.mmds_config {
            mmds.network_interfaces.retain(is_there);
        }
        shown.mmds_config = shown
            .mmds_config
            .filter(|mmds| !mmds.network_interfaces.is_empty());
        shown
    }

    /// Whether other processes have to see the guest's memory.
    pub fn shares_memory(&self) -> bool {
        self.devices().iter().any(DeviceConfig::shares_memory)
    }

    /// The virtio devices, in the order in which the guest finds them.
    pub fn devices(&self) -> Vec<DeviceConfig> {
        let drives = self.drives.iter().cloned().map(DeviceConfig::Block);
        let nets = self.network_interfaces.iter().cloned().map(DeviceConfig::Net);
        let entropy = self.entropy.iter().cloned().map(DeviceConfig::Entropy);
        let balloon = self.balloon.iter().cloned().map(DeviceConfig::Balloon);
        let pmem = self.pmem.iter().cloned().map(DeviceConfig::Pmem);
        let vsock = self.vsock.iter().cloned().map(DeviceConfig::Vsock);
        let mem = self.memory_hotplug.iter().cloned().map(DeviceConfig::Mem);
        drives
            .chain(nets)
            .chain(vsock)
            .chain(balloon)
            .chain(entropy)
            .chain(pmem)
            .chain(mem)
            .collect()
    }

    /// The virtio device of this kind and name.
    pub fn device(&self, kind: DeviceKind, id: &str) -> Option<DeviceConfig> {
        let mut devices = self.devices().into_iter();
        devices.find(|device| device.kind() == kind && device.id() == id)
    }

    /// Forgets a virtio device that can come and go.
    pub fn remove_device(&mut self, kind: DeviceKind, id: &str) {
        match kind {
            DeviceKind::Block => self.drives.retain(|drive| drive.drive_id != id),
            DeviceKind::Net => self.network_interfaces.retain(|net| net.iface_id != id),
            DeviceKind::Pmem => self.pmem.retain(|pmem| pmem.id != id),
            // The others stay as long as the machine.
            _ => {}
        }
    }

    /// Adds a virtio device, or replaces the one of its kind with its id.
    pub fn put_device(&mut self, device: DeviceConfig) -> Result<(), ConfigError> {
        if self.memory_hotplug.is_some() {
            check_sees_plugged_memory(&device)?;
        }
        match device {
            DeviceConfig::Block(drive) => self.put_drive(drive)?,
            DeviceConfig::Net(net) => self.put_net(net)?,
            DeviceConfig::Entropy(entropy) => self.entropy = Some(entropy),
            DeviceConfig::Balloon(balloon) => self.put_balloon(balloon)?,
            DeviceConfig::Pmem(pmem) => self.put_pmem(pmem)?,
            DeviceConfig::Vsock(vsock) => self.vsock = Some(vsock),
            DeviceConfig::Mem(mem) => {
                self.devices().iter().try_for_each(check_sees_plugged_memory)?;
                self.memory_hotplug = Some(mem);
            }
        }
        Ok(())
    }

    fn put_drive(&mut self, drive: block::Config) -> Result<(), ConfigError> {
        if drive.is_root_device {
            self.check_only_root("Drive", DeviceKind::Block, &drive.drive_id)?;
        }
        put_by(&mut self.drives, drive, |d| &d.drive_id);
        // The root disk is the guest's first, whatever the order of requests.
        self.drives.sort_by_key(|d| !d.is_root_device);
        Ok(())
    }

    fn put_balloon(&mut self, balloon: balloon::Config) -> Result<(), ConfigError> {
        let limit_mib = self.machine_config.mem_size_mib;
        if !holds(limit_mib, balloon.amount_mib) {
            let amount_mib = balloon.amount_mib;
            return Err(ConfigError::BalloonSize {
                amount_mib,
                limit_mib,
            });
        }
        self.balloon = Some(balloon);
        Ok(())
    }

    fn put_pmem(&mut self, pmem: pmem::Config) -> Result<(), ConfigError> {
        if pmem.root_device {
            self.check_only_root("Pmem", DeviceKind::Pmem, &pmem.id)?;
        }
        put_by(&mut self.pmem, pmem, |p| &p.id);
        Ok(())
    }

    /// Checks that no device but this one is the root device.
    fn check_only_root(&self, section: &'static str, kind: DeviceKind, id: &str) -> Result<(), ConfigError> {
        let drives = self.drives.iter().filter(|d| d.is_root_device);
        let pmem = self.pmem.iter().filter(|p| p.root_device);
        let drives = drives.map(|d| (DeviceKind::Block, "drive", &d.drive_id));
        let mut roots = drives.chain(pmem.map(|p| (DeviceKind::Pmem, "pmem device", &p.id)));
        match roots.find(|root| (root.0, root.2.as_str()) != (kind, id)) {
            None => Ok(()),
            Some((_, kind, old)) => Err(ConfigError::SecondRoot {
                section,
                kind,
                old: old.clone(),
                new: id.into(),
            }),
        }
    }

    fn put_net(&mut self, net: net::Config) -> Result<(), ConfigError> {
        let twin = |n: &&net::Config| n.iface_id != net.iface_id && n.guest_mac == net.guest_mac;
        if let (Some(mac), Some(other)) = (&net.guest_mac, self.network_interfaces.iter().find(twin)) {
            return Err(ConfigError::MacInUse {
                mac: mac.to_string(),
                id: other.iface_id.clone(),
            });
        }
        let twin = |n: &&net::Config| n.iface_id != net.iface_id && n.host_fd == net.host_fd;
        if let (Some(fd), Some(other)) = (net.host_fd, self.network_interfaces.iter().find(twin)) {
            return Err(ConfigError::DescriptorInUse {
                fd,
                id: other.iface_id.clone(),
            });
        }
        let twin = |n: &&net::Config| n.iface_id != net.iface_id && n.host_dev_name == net.host_dev_name;
        if let (Some(tap), Some(other)) = (&net.host_dev_name, self.network_interfaces.iter().find(twin)) {
            return Err(ConfigError::TapInUse {
                tap: tap.clone(),
                id: other.iface_id.clone(),
            });
        }
        let serves = |mmds: &mmds::Config| mmds.network_interfaces.contains(&net.iface_id);
        if net.has_vhost() && self.mmds_config.as_ref().is_some_and(serves) {
            return Err(ConfigError::VhostMmds(net.iface_id));
        }
        put_by(&mut self.network_interfaces, net, |n| &n.iface_id);
        Ok(())
    }

    /// Sets how guests reach the metadata service, through interfaces that are there already.
    pub fn put_mmds_config(&mut self, config: mmds::Config) -> Result<(), ConfigError> {
        config.validate()?;
        let exists = |id: &String| self.network_interfaces.iter().any(|net| net.iface_id == *id);
        if let Some(unknown) = config.network_interfaces.iter().find(|id| !exists(id)) {
            return Err(mmds::ConfigError::UnknownInterface(unknown.clone()).into());
        }
        let serves =
            |net: &&net::Config| net.has_vhost() && config.network_interfaces.contains(&net.iface_id);
        if let Some(net) = self.network_interfaces.iter().find(serves) {
            return Err(ConfigError::VhostMmds(net.iface_id.clone()));
        }
        self.mmds_config = Some(config);
        Ok(())
    }

    /// Sets the size and shape of the machine. Without a CPU template in `machine` the present one stays.
    pub fn put_machine(&mut self, machine: MachineConfig) -> Result<(), ConfigError> {
        let mut machine = machine.validated()?;
        let target_mib = self.balloon.as_ref().map_or(0, |balloon| balloon.amount_mib);
        if !holds(machine.mem_size_mib, target_mib) {
            return Err(ConfigError::MemoryBelowBalloon {
                mem_size_mib: machine.mem_size_mib,
                target_mib,
            });
        }
        match machine.cpu_template {
            None => machine.cpu_template = self.machine_config.cpu_template,
            Some(CpuTemplate::None) => (machine.cpu_template, self.cpu_config) = (None, None),
            Some(_) => self.cpu_config = None,
        }
        self.machine_config = machine;
        Ok(())
    }

    /// Sets a custom CPU template in place of any other.
    pub fn put_cpu_config(&mut self, config: CpuConfig) {
        self.cpu_config = Some(CpuConfigSource::Inline(config));
        self.machine_config.cpu_template = None;
    }

    /// Sets what to boot.
    pub fn put_boot_source(&mut self, source: BootSource) -> Result<(), ConfigError> {
        if let Some(boot_args) = &source.boot_args {
            CommandLine::new(boot_args)?;
        }
        self.boot_source = source;
        Ok(())
    }
}

/// The section of a kind of device.
pub fn section(kind: DeviceKind) -> &'static str {
    match kind {
        DeviceKind::Block => "drives",
        DeviceKind::Net => "network-interfaces",
        DeviceKind::Entropy => "entropy",
        DeviceKind::Balloon => "balloon",
        DeviceKind::Pmem => "pmem",
        DeviceKind::Vsock => "vsock",
        DeviceKind::Mem => "memory-hotplug",
    }
}

/// Checks that the device would see memory that is plugged in later: others than Mayfly are not told of it.
fn check_sees_plugged_memory(device: &DeviceConfig) -> Result<(), ConfigError> {
    match device {
        DeviceConfig::Block(drive) if drive.socket.is_some() => {
            Err(ConfigError::UnseenMemory(drive.drive_id.clone()))
        }
        DeviceConfig::Net(net) if net.has_vhost() => Err(ConfigError::UnseenByVhost(net.iface_id.clone())),
        _ => Ok(()),
    }
}

/// Whether that much memory can give that much away.
fn holds(mem_size_mib: usize, amount_mib: u32) -> bool {
    usize::try_from(amount_mib).is_ok_and(|amount| amount <= mem_size_mib)
}

/// Replaces the item with the same id, or appends.
fn put_by<T>(items: &mut Vec<T>, item: T, id: impl Fn(&T) -> &String) {
    match items.iter_mut().find(|other| id(other) == id(&item)) {
        Some(place) => *place = item,
        None => items.push(item),
    }
}

/// Checks the id of a drive, network card or pmem device.
pub fn check_id(id: &str) -> Result<(), ConfigError> {
    if id.is_empty() {
        return Err(ConfigError::Id("The ID cannot be empty."));
    }
    if !id.chars().all(|c| c.is_alphanumeric() || c == '_') {
        return Err(ConfigError::Id(
            "API Resource IDs can only contain alphanumeric characters and underscores.",
        ));
    }
    Ok(())
}
