//! What the user says about a drive: [`Config`] for a new one, [`Patch`] for a live one.

use serde::{Deserialize, Serialize, Serializer};

use super::{Block, OpenError};
use crate::rate_limiter::{RateLimiterConfig, serialize_effective};

/// A drive: API body, section of the config file, answer to `GET` and config in a snapshot.
///
/// The order of the fields is part of the wire format, also of arrays: their elements are the fields, and Mayfly's own,
/// which come last, have a default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "struct BlockDeviceConfig")]
pub struct Config {
    /// Names the drive; its first 20 bytes are the serial number that the guest sees (`/dev/disk/by-id/virtio-...`).
    pub drive_id: String,
    /// Partition of the root drive to boot from; the whole drive when absent.
    pub partuuid: Option<String>,
    /// True for the drive that the guest boots from.
    pub is_root_device: bool,
    /// What a flush by the guest does.
    #[serde(default)]
    pub cache_type: CacheType,
    /// True to refuse writes. Absent is false.
    #[serde(serialize_with = "or_default")]
    pub is_read_only: Option<bool>,
    /// The image: a regular file or a block device.
    pub path_on_host: Option<String>,
    /// Limits requests, and the bytes read and written.
    #[serde(serialize_with = "serialize_effective")]
    pub rate_limiter: Option<RateLimiterConfig>,
    /// How requests are carried out. Absent is [`IoEngine::Sync`].
    #[serde(serialize_with = "or_default")]
    pub io_engine: Option<IoEngine>,
    /// Socket of a vhost-user backend, in place of an image.
    pub socket: Option<String>,
    /// True to go past the host's page cache (O_DIRECT).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub direct: bool,
    /// Queues for requests, 1 to [`MAX_QUEUES`]. Absent is 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// How the image holds the bytes of the disk. Absent is [`Format::Raw`]; the image itself is never asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// Whether backing files that a qcow2 image names are opened. Absent is [`BackingRule::Deny`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing: Option<BackingRule>,
    /// The backing files of a qcow2 image, the one nearest to it first, in place of those that it names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing_files: Option<Vec<String>>,
}

/// How an image holds the bytes of a disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// As they are.
    #[default]
    Raw,
    /// Those that differ from a backing file, in clusters that are allocated when they are written.
    Qcow2,
}

/// What happens to the backing file that an image names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackingRule {
    /// It is not opened, and neither is the image.
    #[default]
    Deny,
    /// It is opened, whatever file that is: only for images that can be trusted.
    Allow,
}

/// The most queues of a drive: more than that many vCPUs gain little from one each.
pub const MAX_QUEUES: u16 = 16;

/// Whether the guest can make its writes durable.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheType {
    /// The guest is offered no flush. A crash of the host may lose writes that the guest believes to be on disk.
    #[default]
    Unsafe,
    /// A flush writes everything to the host's disk.
    Writeback,
}

/// How requests are carried out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoEngine {
    /// Requests of one drive overlap, by io_uring.
    Async,
    /// One at a time, by system calls that wait for the disk.
    #[default]
    Sync,
}

/// A change of a live drive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "struct BlockDeviceUpdateConfig")]
pub struct Patch {
    /// Names the drive.
    pub drive_id: String,
    /// The image to be used from now on.
    pub path_on_host: Option<String>,
    /// New limits; a bucket that is left out stays as it is, one of size or refill time zero is removed.
    pub rate_limiter: Option<RateLimiterConfig>,
    /// The backing files of the image; those of the old one when absent.
    #[serde(default)]
    pub backing_files: Option<Vec<String>>,
}

/// Why a drive's config is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// Neither an image nor a socket, or both.
    #[error("drive '{drive_id}' needs either path_on_host or socket, and not both")]
    Backend {
        /// Which drive.
        drive_id: String,
    },
    /// A setting that a vhost-user backend has.
    #[error("drive '{drive_id}' has a vhost-user backend, which decides on {setting}: leave that out")]
    VhostUser {
        /// Which drive.
        drive_id: String,
        /// Which setting.
        setting: &'static str,
    },
    /// The partition goes to the kernel's command line, so it must not smuggle other arguments in.
    #[error(
        "drive '{drive_id}' has the partuuid '{partuuid}': only 1 to 36 hexadecimal digits and '-' are allowed"
    )]
    PartUuid {
        /// Which drive.
        drive_id: String,
        /// What was given.
        partuuid: String,
    },
    /// The count of queues is out of range.
    #[error("drive '{drive_id}' asks for {queues} queues; it must be 1 to {MAX_QUEUES}")]
    Queues {
        /// Which drive.
        drive_id: String,
        /// What was given.
        queues: u16,
    },
    /// What is said of the format does not fit together.
    #[error("drive '{drive_id}': {problem}")]
    Format {
        /// Which drive.
        drive_id: String,
        /// What is wrong, and the remedy.
        problem: &'static str,
    },
    /// A patch that says nothing.
    #[error("the change of drive '{drive_id}' is empty: give path_on_host or rate_limiter")]
    EmptyPatch {
        /// Which drive.
        drive_id: String,
    },
}

impl Config {
    /// Checks all that can be told without the host's file system.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let drive_id = || self.drive_id.clone();
        if self.path_on_host.is_some() == self.socket.is_some() {
            return Err(ConfigError::Backend { drive_id: drive_id() });
        }
        if let Some(setting) = self.socket.as_ref().and_then(|_| self.backends_setting()) {
            let drive_id = drive_id();
            return Err(ConfigError::VhostUser { drive_id, setting });
        }
        let queues = self.queue_count();
        if !(1..=MAX_QUEUES).contains(&queues) {
            let drive_id = drive_id();
            return Err(ConfigError::Queues { drive_id, queues });
        }
        if let Some(problem) = self.format_problem() {
            let drive_id = drive_id();
            return Err(ConfigError::Format { drive_id, problem });
        }
        match &self.partuuid {
            Some(partuuid) if !is_partuuid(partuuid) => Err(ConfigError::PartUuid {
                drive_id: drive_id(),
                partuuid: partuuid.clone(),
            }),
            _ => Ok(()),
        }
    }

    fn format_problem(&self) -> Option<&'static str> {
        let (rule, files) = (self.backing.unwrap_or_default(), self.backing_files.is_some());
        match self.format.unwrap_or_default() {
            Format::Raw if files || self.backing.is_some() => Some(
                "a raw image has no backing file: leave out backing and backing_files, or set format to \"qcow2\"",
            ),
            Format::Qcow2 if files && rule == BackingRule::Allow => Some(
                "backing \"allow\" opens the files that the image names and backing_files others: leave one of them out",
            ),
            _ => None,
        }
    }

    /// A setting that says other than its default and that is the backend's with vhost-user.
    fn backends_setting(&self) -> Option<&'static str> {
        let settings = [
            (self.read_only(), "is_read_only"),
            (self.rate_limiter.is_some(), "rate_limiter"),
            (self.io_engine == Some(IoEngine::Async), "io_engine"),
            (self.direct, "direct"),
            (self.format.is_some(), "format"),
            (self.backing.is_some(), "backing"),
            (self.backing_files.is_some(), "backing_files"),
        ];
        settings.iter().find(|setting| setting.0).map(|setting| setting.1)
    }

    /// True when the guest must not write.
    pub fn read_only(&self) -> bool {
        self.is_read_only.unwrap_or_default()
    }

    /// How many queues it has.
    pub fn queue_count(&self) -> u16 {
        self.queues.unwrap_or(1)
    }

    /// Takes in what a patch changes, and checks what comes of it. What a vhost-user backend has, its device refuses.
    pub fn patch(&mut self, patch: Patch) -> Result<(), ConfigError> {
        RateLimiterConfig::patch(&mut self.rate_limiter, patch.rate_limiter.as_ref());
        if patch.path_on_host.is_some() {
            self.path_on_host = patch.path_on_host;
            self.backing_files = patch.backing_files.or(self.backing_files.take());
        }
        if self.socket.is_some() {
            Ok(())
        } else {
            self.validate()
        }
    }

    /// Checks the config, opens the image and makes the device.
    pub fn build(&self) -> Result<Block, OpenError> {
        self.validate()?;
        Block::new(self)
    }
}

impl Patch {
    /// Checks all that can be told without the host's file system.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.backing_files.is_some() && self.path_on_host.is_none() {
            return Err(ConfigError::Format {
                drive_id: self.drive_id.clone(),
                problem: "backing_files belong to a new image: give path_on_host too",
            });
        }
        if self.path_on_host.is_none() && self.rate_limiter.is_none() {
            return Err(ConfigError::EmptyPatch {
                drive_id: self.drive_id.clone(),
            });
        }
        Ok(())
    }
}

fn is_partuuid(text: &str) -> bool {
    (1..=36).contains(&text.len()) && text.bytes().all(|c| c.is_ascii_hexdigit() || c == b'-')
}

/// Prints the default in place of an absent value.
fn or_default<T, S>(value: &Option<T>, serializer: S) -> Result<S::Ok, S::Error>
where
    T: Copy + Default + Serialize,
    S: Serializer,
{
    value.unwrap_or_default().serialize(serializer)
}
