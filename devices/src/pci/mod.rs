//! Conventional PCI as guests see it: the bus with its two ways to configuration space, and the parts that a function
//! is made of. What a virtio function adds is in [`crate::virtio::pci`].
//!
//! vCPU threads come in through the [`root`]; io loops only raise interrupts, with no lock ([`msix`], [`intx`]).

pub mod config_space;
pub mod intx;
pub mod msix;
pub mod root;

pub use config_space::ConfigSpace;
pub use intx::Intx;
pub use msix::{MsiMessage, MsiRouter, Msix, MsixVectors};
pub use root::{BarMapper, ConfigPorts, Ecam, PciError, PciFunction, PciSegment};
