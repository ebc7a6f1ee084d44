//! The virtio pmem device (virtio 1.2 §5.19): a file that the guest has as memory.
//!
//! Reads and writes are loads and stores of the guest in the host's page cache; no request is made for them. The one
//! request that there is makes writes durable. It is carried out by a thread of the device's own, so that a slow disk
//! holds up no other device.
//!
//! The control thread builds the device; from DRIVER_OK to reset it runs on an io loop.

mod config;
mod device;
mod flusher;
mod image;

pub use config::{Config, Patch};
pub use device::{Metrics, Pmem};
pub use image::OpenError;

#[cfg(test)]
mod tests;
