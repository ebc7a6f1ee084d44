//! The virtio block device (virtio 1.2 §5.2).
//!
//! [`Config`] is what the user asks for and [`Patch`] how a live drive changes; [`Block`] is the device. A request is
//! taken apart and checked by `request` with no I/O, then carried out on a `Backend`, of which `raw` is the one for raw
//! images and `qcow2` the one for copy-on-write images. To add a backend, implement the trait and let `backend::open`
//! choose it.
//!
//! With several queues there is a part of the device for each, all over one backend and one rate limiter; each runs by
//! itself, perhaps on a loop of its own.
//!
//! The control thread builds the device. From DRIVER_OK to reset it runs on an io loop. With synchronous system calls a
//! slow disk holds up the devices of its loop, but no vCPU; with the asynchronous engine (`overlap`, over `uring`) it holds
//! up nobody, as long as the kernel can carry requests out by itself: where it can, a backend says (`Backend::place`).

mod announced;
mod backend;
mod config;
mod device;
mod direct;
mod metrics;
mod overlap;
pub mod qcow2;
mod raw;
mod request;
mod settle;
mod uring;

pub use backend::OpenError;
pub use config::{BackingRule, CacheType, Config, ConfigError, Format, IoEngine, MAX_QUEUES, Patch};
pub use device::Block;
pub use metrics::Metrics;

use backend::Backend;

/// Bytes in a sector, the unit of every size and position in the protocol (virtio 1.2 §5.2.4).
pub const SECTOR: u64 = 512;

#[cfg(test)]
mod tests;
