//! What the user asks for. These types are the API bodies, the sections of the config file and the answer of
//! `GET /vm/config` all at once; a config is plain data, and nothing is opened while it is checked.

use std::path::PathBuf;

use devices::virtio::{block, net, rng};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The largest guest: vCPUs.
pub const MAX_VCPUS: u8 = 32;
/// The smallest guest memory that holds the boot structures and a kernel, in MiB.
pub const MIN_MEMORY_MIB: usize = 16;
/// The longest kernel command line, in bytes without the terminating zero.
pub const MAX_BOOT_ARGS: usize = 2047;

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
    /// The command line is too long.
    #[error("Boot source error: boot_args is {0} bytes long; at most {MAX_BOOT_ARGS} fit")]
    BootArgs(usize),
    /// Two root devices.
    #[error("Drive config error: '{new}' cannot be the root device: '{old}' is it already")]
    SecondRoot {
        /// The present root device.
        old: String,
        /// The drive in question.
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
    /// A value that later versions will have.
    #[error("{section} error: {what} is not supported by this version of Mayfly")]
    Unsupported {
        /// Which section.
        section: &'static str,
        /// Which value.
        what: String,
    },
    /// A resource id breaks the rules.
    #[error("{0}")]
    Id(&'static str),
}

/// Size and shape of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpu_count: u8,
    /// Guest memory, in MiB.
    pub mem_size_mib: usize,
    /// Whether two vCPUs share a core in the guest's topology.
    #[serde(default)]
    pub smt: bool,
    /// A named CPU template; only `None` so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
    /// Whether a snapshot may hold only the pages that changed. Takes effect together with snapshots.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Page size behind guest memory.
    #[serde(default)]
    pub huge_pages: HugePages,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            cpu_template: None,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
        }
    }
}

/// Named CPU templates of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are the API's")]
pub enum CpuTemplate {
    C3,
    T2,
    T2S,
    None,
    T2CL,
    T2A,
}

/// Page sizes of the API.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// Ordinary pages, and whatever the host's policy makes of them.
    #[default]
    None,
    /// Transparent huge pages.
    Transparent,
    /// Pages of hugetlbfs.
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}

/// The body of `PATCH /machine-config`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "as in MachineConfig")]
pub struct MachinePatch {
    pub vcpu_count: Option<u8>,
    pub mem_size_mib: Option<usize>,
    pub smt: Option<bool>,
    pub cpu_template: Option<CpuTemplate>,
    pub track_dirty_pages: Option<bool>,
    pub huge_pages: Option<HugePages>,
}

impl MachinePatch {
    /// True when nothing is to be changed.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl MachineConfig {
    /// This config with the patch's values in place of its own.
    pub fn patched(&self, patch: &MachinePatch) -> Self {
        Self {
            vcpu_count: patch.vcpu_count.unwrap_or(self.vcpu_count),
            mem_size_mib: patch.mem_size_mib.unwrap_or(self.mem_size_mib),
            smt: patch.smt.unwrap_or(self.smt),
            cpu_template: patch.cpu_template.or(self.cpu_template),
            track_dirty_pages: patch.track_dirty_pages.unwrap_or(self.track_dirty_pages),
            huge_pages: patch.huge_pages.unwrap_or(self.huge_pages),
        }
    }

    /// Checks the values, and leaves out a template that changes nothing.
    pub fn validated(mut self) -> Result<Self, ConfigError> {
        let odd = self.smt && self.vcpu_count > 1 && !self.vcpu_count.is_multiple_of(2);
        if self.vcpu_count == 0 || self.vcpu_count > MAX_VCPUS || odd {
            return Err(ConfigError::VcpuCount(self.vcpu_count));
        }
        if self.mem_size_mib < MIN_MEMORY_MIB {
            return Err(ConfigError::MemorySize(self.mem_size_mib));
        }
        let unsupported = |what: String| ConfigError::Unsupported {
            section: "Machine config",
            what,
        };
        match self.cpu_template.take() {
            None | Some(CpuTemplate::None) => {}
            Some(template) => return Err(unsupported(format!("cpu_template {template:?}"))),
        }
        if self.huge_pages != HugePages::None {
            return Err(unsupported(format!("huge_pages {:?}", self.huge_pages)));
        }
        Ok(self)
    }
}

/// What to boot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// An ELF `vmlinux` or a `bzImage`.
    pub kernel_image_path: String,
    /// An initial RAM disk.
    pub initrd_path: Option<String>,
    /// The kernel command line; the default is [`crate::boot::cmdline::DEFAULT`].
    pub boot_args: Option<String>,
}

/// Where the first serial port is connected.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialConfig {
    /// A file for the output, instead of standard output. Standard input is then not read.
    pub serial_out_path: Option<PathBuf>,
    /// Not supported yet.
    #[serde(default)]
    pub rate_limiter: Absent,
}

/// Where and how to log; every field that is absent keeps what the command line said, except the level, which
/// becomes `Info`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoggerConfig {
    /// A file, created when missing, or a FIFO.
    pub log_path: Option<PathBuf>,
    /// The least severe level that is logged.
    pub level: Option<LogLevel>,
    /// Whether lines show their level.
    pub show_level: Option<bool>,
    /// Whether lines show file and line of their origin.
    pub show_log_origin: Option<bool>,
    /// Only this module is logged.
    pub module: Option<String>,
}

/// A log level, written in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogLevel(pub log::LevelFilter);

impl std::str::FromStr for LogLevel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = match text.to_ascii_lowercase().as_str() {
            "warning" => log::LevelFilter::Warn,
            other => other.parse().map_err(|_| {
                format!("Invalid LevelFilter: '{text}' is none of Off, Trace, Debug, Info, Warn, Error")
            })?,
        };
        Ok(Self(known))
    }
}

impl Serialize for LogLevel {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.0.as_str())
    }
}

impl<'de> Deserialize<'de> for LogLevel {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// Where metrics go. Unknown fields are ignored, as clients of the API expect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetricsConfig {
    /// A file, created when missing, or a FIFO.
    pub metrics_path: PathBuf,
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

/// Stands for a list of devices that this version does not have: only an empty one is taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NoDevices;

impl Serialize for NoDevices {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq::<[(); 0]>([])
    }
}

impl<'de> Deserialize<'de> for NoDevices {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let list = Vec::<serde::de::IgnoredAny>::deserialize(deserializer)?;
        if list.is_empty() {
            return Ok(Self);
        }
        Err(serde::de::Error::custom(
            "this device is not supported by this version of Mayfly",
        ))
    }
}

/// The whole machine, in the key order of `GET /vm/config`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct VmConfig {
    /// Not supported yet.
    #[serde(default)]
    pub balloon: Absent,
    /// Disks; the root disk comes first.
    pub drives: Vec<block::Config>,
    /// What to boot.
    pub boot_source: BootSource,
    /// Not supported yet.
    #[serde(default)]
    pub cpu_config: Absent,
    /// Applied at once and not kept.
    #[serde(default)]
    pub logger: Option<LoggerConfig>,
    /// Size and shape.
    #[serde(default)]
    pub machine_config: MachineConfig,
    /// Applied at once and not kept.
    #[serde(default)]
    pub metrics: Option<MetricsConfig>,
    /// Not supported yet.
    #[serde(default)]
    pub mmds_config: Absent,
    /// Network cards.
    #[serde(default)]
    pub network_interfaces: Vec<net::Config>,
    /// Not supported yet.
    #[serde(default)]
    pub vsock: Absent,
    /// The entropy device.
    #[serde(default)]
    pub entropy: Option<rng::Config>,
    /// Not supported yet.
    #[serde(default)]
    pub pmem: NoDevices,
    /// Not supported yet.
    #[serde(default)]
    pub memory_hotplug: Absent,
    /// The serial port; kept out of answers, as clients of the API expect.
    #[serde(default, skip_serializing)]
    pub serial: Option<SerialConfig>,
}

impl VmConfig {
    /// Adds a drive, or replaces the one with its id.
    pub fn put_drive(&mut self, drive: block::Config) -> Result<(), ConfigError> {
        let other_root = self
            .drives
            .iter()
            .find(|d| d.is_root_device && d.drive_id != drive.drive_id);
        if let (true, Some(root)) = (drive.is_root_device, other_root) {
            let old = root.drive_id.clone();
            return Err(ConfigError::SecondRoot {
                old,
                new: drive.drive_id,
            });
        }
        put_by(&mut self.drives, drive, |d| &d.drive_id);
        // The root disk is the guest's first, whatever the order of requests.
        self.drives.sort_by_key(|d| !d.is_root_device);
        Ok(())
    }

    /// Adds a network card, or replaces the one with its id.
    pub fn put_net(&mut self, net: net::Config) -> Result<(), ConfigError> {
        let twin = |n: &&net::Config| n.iface_id != net.iface_id && n.guest_mac == net.guest_mac;
        if let (Some(mac), Some(other)) = (&net.guest_mac, self.network_interfaces.iter().find(twin)) {
            return Err(ConfigError::MacInUse {
                mac: mac.to_string(),
                id: other.iface_id.clone(),
            });
        }
        put_by(&mut self.network_interfaces, net, |n| &n.iface_id);
        Ok(())
    }

    /// Sets what to boot.
    pub fn put_boot_source(&mut self, source: BootSource) -> Result<(), ConfigError> {
        let len = source.boot_args.as_ref().map_or(0, String::len);
        if len > MAX_BOOT_ARGS {
            return Err(ConfigError::BootArgs(len));
        }
        self.boot_source = source;
        Ok(())
    }
}

/// Replaces the item with the same id, or appends.
fn put_by<T>(items: &mut Vec<T>, item: T, id: impl Fn(&T) -> &String) {
    match items.iter_mut().find(|other| id(other) == id(&item)) {
        Some(place) => *place = item,
        None => items.push(item),
    }
}

/// Checks the id of a drive or network card.
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
