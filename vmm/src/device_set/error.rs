//! [`DeviceSetError`]: why a device could not be attached, changed or detached.

use std::io;

use devices::bus::BusError;
use devices::catalog::BuildError;
use devices::pci::PciError;
use devices::virtio::{DeviceKind, UpdateError};

use crate::kvm::KvmError;

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
    /// The machine has no place or no connection for it.
    #[error("device '{id}' cannot be connected to the machine")]
    Connect {
        /// Which one.
        id: String,
        /// Why.
        source: WiringError,
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
    #[error("{}", subject(*kind, id))]
    Update {
        /// What it is.
        kind: DeviceKind,
        /// Which one.
        id: String,
        /// Why.
        source: UpdateError,
    },
    /// Devices come and go on a PCI bus only.
    #[error(
        "PCI is not enabled: for devices that come and go start without --no-pci, and without pci=off in boot_args"
    )]
    NoPci,
    /// The id of a device to be plugged in.
    #[error("Device ID in use: detach '{0}' first, or choose another id")]
    InUse(String),
    /// The guest runs from it.
    #[error("Cannot unplug root device '{0}'")]
    Root(String),
    /// The guest cannot be asked.
    #[error("the guest is paused, so it cannot release device '{0}': resume it, or use \"force\": true")]
    Paused(String),
    /// The guest is being asked already.
    #[error("device '{0}' is being detached already: wait for that, or detach it with \"force\": true")]
    Leaving(String),
    /// The guest was asked, and did not answer in time.
    #[error(
        "the guest has not released device '{0}' in time; it is still attached: \
         try again with a longer timeout_ms, or with \"force\": true"
    )]
    NotReleased(String),
}

/// Why a device cannot be connected to the machine.
#[derive(Debug, thiserror::Error)]
pub enum WiringError {
    /// KVM refused an interrupt or a notification.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The host has no descriptor left.
    #[error("cannot make an event descriptor")]
    Host(#[from] io::Error),
    /// The addresses are taken.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The PCI bus refused it.
    #[error(transparent)]
    Pci(#[from] PciError),
}

impl DeviceSetError {
    /// Names the device that cannot be connected.
    pub(super) fn connecting(id: &str) -> impl Fn(WiringError) -> Self {
        move |source| Self::Connect {
            id: id.into(),
            source,
        }
    }
}

/// How an error names a device.
fn subject(kind: DeviceKind, id: &str) -> String {
    match kind {
        DeviceKind::Balloon => "Balloon".into(),
        _ => format!("device '{id}'"),
    }
}
