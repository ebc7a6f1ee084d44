//! The list of virtio devices: what a config section becomes.

use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;

use crate::memory_host::MemoryHost;
use crate::mmds::Mmds;
use crate::virtio::vhost_user::{self, VhostUserBlock};
use crate::virtio::{DeviceKind, UpdateError, VirtioDevice, balloon, block, mem, net, pmem, rng, vsock};

/// The config of any device.
#[derive(Debug, Clone, PartialEq)]
pub enum DeviceConfig {
    /// A disk.
    Block(block::Config),
    /// A network card.
    Net(net::Config),
    /// The entropy device.
    Entropy(rng::Config),
    /// The memory balloon.
    Balloon(balloon::Config),
    /// A file as memory.
    Pmem(pmem::Config),
    /// Sockets between guest and host.
    Vsock(vsock::Config),
    /// Memory that is plugged in and out.
    Mem(mem::Config),
}

/// All kinds of devices.
pub const KINDS: [DeviceKind; 7] = [
    DeviceKind::Block,
    DeviceKind::Net,
    DeviceKind::Entropy,
    DeviceKind::Balloon,
    DeviceKind::Pmem,
    DeviceKind::Vsock,
    DeviceKind::Mem,
];

/// The counters of a device that has done nothing, as one JSON object.
pub fn blank_metrics(kind: DeviceKind) -> Value {
    fn blank<M: Default + Serialize>() -> Value {
        serde_json::to_value(M::default()).expect("counters are plain data")
    }
    match kind {
        DeviceKind::Block => blank::<block::Metrics>(),
        DeviceKind::Net => blank::<net::Metrics>(),
        DeviceKind::Entropy => blank::<rng::Metrics>(),
        DeviceKind::Balloon => blank::<balloon::Metrics>(),
        DeviceKind::Pmem => blank::<pmem::Metrics>(),
        DeviceKind::Vsock => blank::<vsock::Metrics>(),
        DeviceKind::Mem => blank::<mem::Metrics>(),
    }
}

/// What a machine has for its devices to use.
pub struct Services<'a> {
    /// Memory beside its RAM.
    pub memory: &'a dyn MemoryHost,
    /// The metadata service, when it is configured.
    pub mmds: Option<&'a Arc<Mmds>>,
}

/// Why a device could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A disk.
    #[error("Unable to create the virtio block device")]
    Block(#[from] block::OpenError),
    /// A disk with a vhost-user backend.
    #[error("Unable to create the vhost-user block device")]
    VhostUser(#[from] vhost_user::OpenError),
    /// A network card.
    #[error("Could not create the network device")]
    Net(#[from] net::OpenError),
    /// The memory balloon.
    #[error("Could not create the balloon device")]
    Balloon(#[from] balloon::OpenError),
    /// A file as memory.
    #[error("Unable to create the virtio pmem device")]
    Pmem(#[from] pmem::OpenError),
    /// Sockets between guest and host.
    #[error("Cannot create backend for vsock device")]
    Vsock(#[from] vsock::OpenError),
    /// Memory that is plugged in and out.
    #[error("Could not create the memory hotplug device")]
    Mem(#[from] mem::BuildError),
}

impl DeviceConfig {
    /// What kind of device it is.
    pub fn kind(&self) -> DeviceKind {
        match self {
            Self::Block(_) => DeviceKind::Block,
            Self::Net(_) => DeviceKind::Net,
            Self::Entropy(_) => DeviceKind::Entropy,
            Self::Balloon(_) => DeviceKind::Balloon,
            Self::Pmem(_) => DeviceKind::Pmem,
            Self::Vsock(_) => DeviceKind::Vsock,
            Self::Mem(_) => DeviceKind::Mem,
        }
    }

    /// Whether another process has to see the guest's memory for it.
    pub fn shares_memory(&self) -> bool {
        matches!(self, Self::Block(config) if config.socket.is_some())
    }

    /// The group of its counters, when that is another one than its kind's.
    pub fn metrics_group(&self) -> Option<&'static str> {
        self.shares_memory().then_some("vhost_user")
    }

    /// Whether the guest boots from it.
    pub fn is_root(&self) -> bool {
        match self {
            Self::Block(config) => config.is_root_device,
            Self::Pmem(config) => config.root_device,
            _ => false,
        }
    }

    /// The id under which users know the device; it is unique among devices of its kind.
    pub fn id(&self) -> &str {
        match self {
            Self::Block(config) => &config.drive_id,
            Self::Net(config) => &config.iface_id,
            Self::Entropy(_) => "entropy",
            Self::Balloon(_) => "balloon",
            Self::Pmem(config) => &config.id,
            Self::Vsock(_) => "vsock",
            Self::Mem(_) => mem::ID,
        }
    }

    /// Takes in the change of a live device that its `Patch` describes.
    pub fn patch(&mut self, patch: &Value) -> Result<(), UpdateError> {
        match self {
            Self::Block(config) => {
                let patched = config.patch(serde_json::from_value(patch.clone())?);
                patched.map_err(|error| UpdateError::Device(error.into()))?;
            }
            Self::Net(config) => {
                let patched = config.patch(serde_json::from_value(patch.clone())?);
                patched.map_err(|error| UpdateError::Device(error.into()))?;
            }
            Self::Balloon(config) => config.patch(&serde_json::from_value(patch.clone())?),
            Self::Pmem(config) => config.patch(&serde_json::from_value(patch.clone())?),
            // How much memory is requested is no part of the config.
            Self::Mem(_) => {}
            Self::Entropy(_) | Self::Vsock(_) => {
                return Err(UpdateError::Refused("this device takes no changes".into()));
            }
        }
        Ok(())
    }

    /// Checks what can be checked before there is a machine: what the device needs is opened to see that it can be,
    /// and let go of again. A pmem device's file is not, as clients may make it later.
    pub fn check(&self) -> Result<(), BuildError> {
        match self {
            Self::Block(config) if config.socket.is_some() => drop(remote_disk(config)?),
            Self::Block(config) => drop(config.build()?),
            Self::Net(config) => config.check()?,
            Self::Vsock(config) => drop(config.build()?),
            Self::Balloon(config) => drop(config.build()?),
            Self::Entropy(_) | Self::Pmem(_) => {}
            Self::Mem(config) => config.validate().map_err(mem::BuildError::from)?,
        }
        Ok(())
    }

    /// Opens what the device needs and makes it.
    pub fn build(&self, services: &Services<'_>) -> Result<Box<dyn VirtioDevice>, BuildError> {
        Ok(match self {
            Self::Block(config) if config.socket.is_some() => Box::new(remote_disk(config)?),
            Self::Block(config) => Box::new(config.build()?),
            Self::Net(config) => config.build(services.mmds)?,
            Self::Entropy(config) => Box::new(config.build()),
            Self::Balloon(config) => Box::new(config.build()?),
            Self::Pmem(config) => Box::new(config.build(services.memory)?),
            Self::Vsock(config) => Box::new(config.build()?),
            Self::Mem(config) => Box::new(config.build(services.memory)?),
        })
    }
}

/// A disk with a backend.
fn remote_disk(config: &block::Config) -> Result<VhostUserBlock, BuildError> {
    config.validate().map_err(block::OpenError::from)?;
    Ok(VhostUserBlock::new(config)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_own_name_and_counters_that_are_zero() {
        let mut names: Vec<_> = KINDS.iter().map(|kind| kind.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), KINDS.len());
        for kind in KINDS {
            let blank = blank_metrics(kind);
            let counters = blank.as_object().unwrap();
            assert_eq!(counters["activate_fails"], 0, "{kind:?}");
        }
    }

    #[test]
    fn a_patched_drive_is_checked_as_a_new_one_is() {
        let drive = serde_json::json!({"drive_id": "disk", "is_root_device": false, "path_on_host": "/a"});
        let mut config = DeviceConfig::Block(serde_json::from_value(drive).unwrap());
        let patch = serde_json::json!({"drive_id": "disk", "path_on_host": "/b", "backing_files": ["/c"]});
        let error = config.patch(&patch).unwrap_err().to_string();
        assert!(error.contains("a raw image has no backing file"), "{error}");
    }
}
