//! [`ControlError`]: why an action was refused.

use std::io;
use std::path::PathBuf;

use devices::catalog::BuildError;
use devices::mmds::StoreError;
use devices::virtio::DeviceKind;

use crate::boot::image::ImageError;
use crate::config::{ConfigError, CpuConfigFileError};
use crate::device_set::DeviceSetError;
use crate::error::remedy;
use crate::events::MAX_SUBSCRIBERS;
use crate::vm::{HotplugError, VmError};

/// Why an action was refused; nothing changed.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Only before start.
    #[error("The requested operation is not supported after starting the microVM.")]
    AfterStart,
    /// Only after start.
    #[error("The requested operation is not supported before starting the microVM.")]
    BeforeStart,
    /// The values are out of range or contradict the rest of the config.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The file of a CPU template cannot be used.
    #[error("CPU config error")]
    CpuConfig(#[from] CpuConfigFileError),
    /// The kernel or the initrd cannot be used.
    #[error("Boot source error")]
    BootSource(#[source] ImageError),
    /// What a device needs cannot be opened.
    #[error("{} config error", section(*kind))]
    Device {
        /// What it is.
        kind: DeviceKind,
        /// Why.
        source: BuildError,
    },
    /// The metadata store refused a document.
    #[error("{}", refused_metadata(*.0))]
    Metadata(StoreError),
    /// A live device refused a change, or there is no such device.
    #[error("{}", refused_patch(*kind))]
    Patch {
        /// What it is.
        kind: DeviceKind,
        /// Why.
        source: DeviceSetError,
    },
    /// A device cannot be attached to the running machine.
    #[error("{} config error", section(*kind))]
    Hotplug {
        /// What it is.
        kind: DeviceKind,
        /// Why.
        source: HotplugError,
    },
    /// A device cannot be detached, or there is no such device.
    #[error("{} config error", section(*kind))]
    Unplug {
        /// What it is.
        kind: DeviceKind,
        /// Why.
        source: DeviceSetError,
    },
    /// A device of which there is only one is not there, not all of it, or too small.
    #[error("{prefix}: {what}")]
    Single {
        /// How the API begins this refusal.
        prefix: &'static str,
        /// What is missing, and how it comes to be.
        what: String,
    },
    /// A file for lines cannot be opened.
    #[error("{section} error: cannot open '{path}' for writing: {}", remedy(source), path = path.display())]
    Sink {
        /// Logger, Metrics or Serial.
        section: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Metrics have a path already.
    #[error("Metrics error: the metrics path is set already and stays until the process ends")]
    MetricsTwice,
    /// As many as may listen do already.
    #[error("Events error: {MAX_SUBSCRIBERS} clients listen already; end one of their connections")]
    Subscribers,
    /// A metrics line could not be written.
    #[error("Metrics error: cannot write a line")]
    MetricsWrite(#[source] io::Error),
    /// The machine could not be built or started.
    #[error("Start microvm error")]
    Start(#[source] VmError),
    /// The running machine could not do it.
    #[error("Internal VMM error")]
    Vm(#[source] VmError),
}

impl ControlError {
    /// True when the client has sent more than there is room for, which the API answers in a way of its own.
    pub fn is_overflow(&self) -> bool {
        matches!(self, Self::Metadata(StoreError::TooLarge))
    }
}

/// How the API begins the refusal of metadata.
fn refused_metadata(error: StoreError) -> String {
    match error {
        StoreError::NotInitialized => format!("MMDS error: {error}"),
        StoreError::TooLarge => format!("MMDS limit exceeded error: {error}"),
    }
}

/// The API's word for a kind of device.
fn section(kind: DeviceKind) -> &'static str {
    match kind {
        DeviceKind::Block => "Drive",
        DeviceKind::Net => "Network",
        DeviceKind::Entropy => "Entropy",
        DeviceKind::Balloon => "Balloon",
        DeviceKind::Pmem => "Pmem",
        DeviceKind::Vsock => "Vsock",
        DeviceKind::Mem => "Memory hotplug",
    }
}

/// How the API begins the refusal of a patch.
fn refused_patch(kind: DeviceKind) -> &'static str {
    match kind {
        DeviceKind::Block => "Drive config error: Unable to patch the block device",
        DeviceKind::Net => "Network config error: Unable to update the net device",
        DeviceKind::Entropy => "Entropy config error",
        DeviceKind::Balloon => "Balloon update error",
        DeviceKind::Pmem => "Pmem config error: Unable to patch the pmem device",
        DeviceKind::Vsock => "Vsock config error",
        DeviceKind::Mem => "Memory hotplug update error",
    }
}
