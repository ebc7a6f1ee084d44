//! The list of virtio devices: what a config section becomes.

use serde::Serialize;
use serde_json::Value;

use crate::virtio::{DeviceKind, UpdateError, VirtioDevice, block, net, rng};

/// The config of any device.
#[derive(Debug, Clone, PartialEq)]
pub enum DeviceConfig {
    /// A disk.
    Block(block::Config),
    /// A network card.
    Net(net::Config),
    /// The entropy device.
    Entropy(rng::Config),
}

/// All kinds of devices.
pub const KINDS: [DeviceKind; 3] = [DeviceKind::Block, DeviceKind::Net, DeviceKind::Entropy];

/// The counters of a device that has done nothing, as one JSON object.
pub fn blank_metrics(kind: DeviceKind) -> Value {
    fn blank<M: Default + Serialize>() -> Value {
        serde_json::to_value(M::default()).expect("counters are plain data")
    }
    match kind {
        DeviceKind::Block => blank::<block::Metrics>(),
        DeviceKind::Net => blank::<net::Metrics>(),
        DeviceKind::Entropy => blank::<rng::Metrics>(),
    }
}

/// Why a device could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A disk.
    #[error("Unable to create the virtio block device")]
    Block(#[from] block::OpenError),
    /// A network card.
    #[error("Could not create the network device")]
    Net(#[from] net::OpenError),
}

impl DeviceConfig {
    /// What kind of device it is.
    pub fn kind(&self) -> DeviceKind {
        match self {
            Self::Block(_) => DeviceKind::Block,
            Self::Net(_) => DeviceKind::Net,
            Self::Entropy(_) => DeviceKind::Entropy,
        }
    }

    /// The id under which users know the device; it is unique among devices of its kind.
    pub fn id(&self) -> &str {
        match self {
            Self::Block(config) => &config.drive_id,
            Self::Net(config) => &config.iface_id,
            Self::Entropy(_) => "entropy",
        }
    }

    /// Takes in the change of a live device that its `Patch` describes.
    pub fn patch(&mut self, patch: &Value) -> Result<(), UpdateError> {
        match self {
            Self::Block(config) => config.patch(serde_json::from_value(patch.clone())?),
            Self::Net(config) => config.patch(serde_json::from_value(patch.clone())?),
            Self::Entropy(_) => {
                return Err(UpdateError::Refused("this device takes no changes".into()));
            }
        }
        Ok(())
    }

    /// Opens what the device needs and makes it.
    pub fn build(&self) -> Result<Box<dyn VirtioDevice>, BuildError> {
        Ok(match self {
            Self::Block(config) => Box::new(config.build()?),
            Self::Net(config) => Box::new(config.build()?),
            Self::Entropy(config) => Box::new(config.build()),
        })
    }
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
}
