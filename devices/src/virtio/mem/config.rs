//! What the user says about hotpluggable memory: [`Config`] before start, [`Patch`] after it; and what users see:
//! [`Status`].

use serde::{Deserialize, Serialize};

use super::Mem;
use crate::memory_host::{MemoryHost, MemoryHostError};

/// The id of the only device of its kind.
pub const ID: &str = "memory_hotplug";

const MIN_BLOCK_MIB: u32 = 2;
const MIN_SLOT_MIB: u32 = 128;

/// Hotpluggable memory: API body, section of the config file, answer to `GET` and config in a snapshot. All sizes are
/// in MiB.
///
/// The order of the fields is part of the wire format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "struct MemoryHotplugConfig")]
pub struct Config {
    /// The most memory that the guest can have of it; a multiple of the slot size.
    pub total_size_mib: u32,
    /// The unit in which the guest takes and gives back; a power of two, at least 2.
    #[serde(default = "default_block_size")]
    pub block_size_mib: u32,
    /// The unit in which memory is kept from the guest; a multiple of the block size, at least 128.
    #[serde(default = "default_slot_size")]
    pub slot_size_mib: u32,
}

fn default_block_size() -> u32 {
    MIN_BLOCK_MIB
}

fn default_slot_size() -> u32 {
    MIN_SLOT_MIB
}

/// A change of the amount of memory that the guest should have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "struct MemoryHotplugSizeUpdate")]
pub struct Patch {
    /// The new amount in MiB; a multiple of the block size, at most the total size.
    pub requested_size_mib: u32,
}

/// What `GET` shows, in MiB. The order of the fields is part of the wire format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// As in [`Config`].
    pub block_size_mib: u32,
    /// As in [`Config`].
    pub total_size_mib: u32,
    /// As in [`Config`].
    pub slot_size_mib: u32,
    /// What the guest has.
    pub plugged_size_mib: u32,
    /// What it should have.
    pub requested_size_mib: u32,
}

/// Why sizes are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The block is too small.
    #[error("block_size_mib is {0}; it must be at least {MIN_BLOCK_MIB}")]
    SmallBlock(u32),
    /// The block is no power of two.
    #[error("block_size_mib is {0}; it must be a power of 2")]
    OddBlock(u32),
    /// The slot is too small.
    #[error("slot_size_mib is {0}; it must be at least {MIN_SLOT_MIB}")]
    SmallSlot(u32),
    /// The slot has no whole blocks.
    #[error("slot_size_mib is {slot}; it must be a multiple of block_size_mib, {block}")]
    OddSlot {
        /// Slot size.
        slot: u32,
        /// Block size.
        block: u32,
    },
    /// There is not one slot, or no whole number of them.
    #[error("total_size_mib is {total}; it must be a multiple of slot_size_mib, {slot}, and not 0")]
    OddTotal {
        /// Total size.
        total: u32,
        /// Slot size.
        slot: u32,
    },
    /// More is requested than there is, or a part of a block.
    #[error("requested_size_mib is {requested}; it must be a multiple of {block} and at most {total}")]
    Requested {
        /// Requested size.
        requested: u32,
        /// Block size.
        block: u32,
        /// Total size.
        total: u32,
    },
}

/// Why the device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The config is not valid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The host has no room for it.
    #[error("there is no room for total_size_mib")]
    Memory(#[from] MemoryHostError),
}

impl Config {
    /// Checks all that can be told without a machine.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let (total, block, slot) = (self.total_size_mib, self.block_size_mib, self.slot_size_mib);
        if block < MIN_BLOCK_MIB {
            return Err(ConfigError::SmallBlock(block));
        }
        if !block.is_power_of_two() {
            return Err(ConfigError::OddBlock(block));
        }
        if slot < MIN_SLOT_MIB {
            return Err(ConfigError::SmallSlot(slot));
        }
        if !slot.is_multiple_of(block) {
            return Err(ConfigError::OddSlot { slot, block });
        }
        if total == 0 || !total.is_multiple_of(slot) {
            return Err(ConfigError::OddTotal { total, slot });
        }
        Ok(())
    }

    /// Checks a patch of this device.
    pub fn check(&self, patch: &Patch) -> Result<(), ConfigError> {
        let (requested, block, total) = (patch.requested_size_mib, self.block_size_mib, self.total_size_mib);
        if requested > total || !requested.is_multiple_of(block) {
            return Err(ConfigError::Requested {
                requested,
                block,
                total,
            });
        }
        Ok(())
    }

    /// Checks the config, takes guest addresses from `host` and makes the device.
    pub fn build(&self, host: &dyn MemoryHost) -> Result<Mem, BuildError> {
        self.validate()?;
        Ok(Mem::new(self.clone(), host)?)
    }
}
