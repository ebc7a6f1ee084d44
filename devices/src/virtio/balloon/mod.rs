//! The memory balloon (virtio 1.2 §5.5): the guest hands over pages that it can do without, and the host has them back.
//!
//! There are three ways, and they can be combined:
//! - **Inflating**: the user sets a target, and the driver takes that much memory away from its system.
//! - **Hinting**: on demand, the driver tells once which pages are free.
//! - **Reporting**: the driver tells of free pages all the time, by itself.
//!
//! [`Balloon`] is the device, [`Config`] and [`Patch`] are what users say, [`StatisticsStatus`] and [`HintingStatus`] what
//! they see. `ranges` turns page numbers into runs,
//! `reclaim` gives memory back, `stats` reads what the guest tells about its memory, `hinting` follows the commands of
//! a run.

mod config;
mod device;
mod hinting;
mod metrics;
mod ranges;
mod reclaim;
mod stats;

pub use config::{Config, Patch, PatchError, StartHinting, StatisticsPatch, TargetPatch};
pub use device::{Balloon, OpenError};
pub use hinting::HintingStatus;
pub use metrics::Metrics;
pub use stats::StatisticsStatus;

#[cfg(test)]
mod tests;

/// The unit of the balloon, whatever the page sizes of guest and host are.
const PAGE_SIZE: u64 = 4096;
/// Pages in a MiB.
const PAGES_PER_MIB: u32 = 256;

/// Feature bits (virtio 1.2 §5.5.3).
mod feature {
    /// The guest tells about its memory.
    pub(super) const STATS_VQ: u64 = 1 << 1;
    /// The guest may take pages back before it runs out of memory.
    pub(super) const DEFLATE_ON_OOM: u64 = 1 << 2;
    /// The guest tells of free pages on demand.
    pub(super) const FREE_PAGE_HINT: u64 = 1 << 3;
    /// The guest tells of free pages by itself.
    pub(super) const REPORTING: u64 = 1 << 5;
}
