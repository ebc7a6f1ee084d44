//! The virtio block device (virtio 1.2 §5.2) over a raw image.
//!
//! [`Config`] is what the user asks for and [`Patch`] how a live drive changes; [`Block`] is the device. A request is
//! taken apart and checked by `request` with no I/O, then carried out on the image in `file`, straight between the
//! guest's pages and the host's page cache.
//!
//! The control thread builds the device. From DRIVER_OK to reset it runs on an io loop, with synchronous system calls:
//! a slow disk holds up the devices of its loop, but no vCPU.

mod config;
mod device;
mod file;
mod metrics;
mod request;

pub use config::{CacheType, Config, ConfigError, IoEngine, Patch};
pub use device::Block;
pub use file::OpenError;
pub use metrics::Metrics;

/// Bytes in a sector, the unit of every size and position in the protocol (virtio 1.2 §5.2.4).
pub const SECTOR: u64 = 512;

#[cfg(test)]
mod tests;
