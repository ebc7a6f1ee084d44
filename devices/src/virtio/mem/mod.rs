//! The virtio memory device (virtio 1.2 §5.15): memory that the guest takes and gives back block by block.
//!
//! The user says how much memory the guest should have of a region; the driver chooses blocks and asks the device to
//! plug or unplug them. Blocks lie in slots. A slot is there, for the guest and for the monitor, only while a block
//! in it is plugged, so unplugged memory costs the host nothing and cannot be touched beyond the granularity of slots.
//!
//! The control thread builds the device; from DRIVER_OK to reset it runs on an io loop. A reset changes nothing about
//! the memory.

mod blocks;
mod config;
mod device;
mod metrics;
mod request;

pub use blocks::BlockState;
pub use config::{BuildError, Config, ConfigError, ID, Patch, Status};
pub use device::Mem;
pub use metrics::Metrics;

#[cfg(test)]
mod tests;
