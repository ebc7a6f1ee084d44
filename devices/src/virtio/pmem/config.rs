//! What the user says about a pmem device: [`Config`] for a new one, [`Patch`] for a live one.

use serde::{Deserialize, Serialize};

use super::{OpenError, Pmem};
use crate::memory_host::MemoryHost;
use crate::rate_limiter::{RateLimiterConfig, serialize_effective};

/// A pmem device: API body, section of the config file, answer to `GET` and config in a snapshot.
///
/// The order of the fields is part of the wire format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "struct PmemConfig")]
pub struct Config {
    /// Names the device.
    pub id: String,
    /// The file: a regular file or a block device. It is opened when the machine is built.
    pub path_on_host: String,
    /// True for the device that the guest boots from.
    #[serde(default)]
    pub root_device: bool,
    /// True when the guest's writes must not reach the file.
    #[serde(default)]
    pub read_only: bool,
    /// Limits flushes.
    #[serde(serialize_with = "serialize_effective")]
    pub rate_limiter: Option<RateLimiterConfig>,
}

/// A change of a live pmem device.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, expecting = "struct PmemDeviceUpdateConfig")]
pub struct Patch {
    /// Names the device.
    pub id: String,
    /// New limits; without them nothing changes.
    pub rate_limiter: Option<RateLimiterConfig>,
}

/// Why a pmem device's config is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// A rate limiter that limits something.
    #[error(
        "pmem device '{id}' asks for a rate limiter, which this version does not have yet: leave rate_limiter out"
    )]
    RateLimiter {
        /// Which device.
        id: String,
    },
}

impl Config {
    /// Checks all that can be told without the host's file system.
    pub fn validate(&self) -> Result<(), ConfigError> {
        refuse_rate_limiter(&self.id, self.rate_limiter)
    }

    /// Checks the config, opens the file, gives it to the guest of `host` and makes the device.
    pub fn build(&self, host: &dyn MemoryHost) -> Result<Pmem, OpenError> {
        self.validate()?;
        Pmem::new(self, host)
    }
}

impl Patch {
    /// Checks all that can be told without the device.
    pub fn validate(&self) -> Result<(), ConfigError> {
        refuse_rate_limiter(&self.id, self.rate_limiter)
    }
}

fn refuse_rate_limiter(id: &str, limits: Option<RateLimiterConfig>) -> Result<(), ConfigError> {
    match limits {
        Some(limits) if limits.is_effective() => Err(ConfigError::RateLimiter { id: id.into() }),
        _ => Ok(()),
    }
}
