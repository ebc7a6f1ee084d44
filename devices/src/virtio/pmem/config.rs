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
    /// Limits flushes: each is one operation and has as many bytes as the file.
    #[serde(serialize_with = "serialize_effective")]
    pub rate_limiter: Option<RateLimiterConfig>,
}

/// A change of a live pmem device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "struct PmemDeviceUpdateConfig")]
pub struct Patch {
    /// Names the device.
    pub id: String,
    /// Changes of the limits; without them nothing changes.
    pub rate_limiter: Option<RateLimiterConfig>,
}

impl Config {
    /// Takes in what a patch changes.
    pub fn patch(&mut self, patch: &Patch) {
        RateLimiterConfig::patch(&mut self.rate_limiter, patch.rate_limiter.as_ref());
    }

    /// Opens the file, gives it to the guest of `host` and makes the device.
    pub fn build(&self, host: &dyn MemoryHost) -> Result<Pmem, OpenError> {
        Pmem::new(self, host)
    }
}
