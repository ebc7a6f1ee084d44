//! What the user asks of a network interface: [`Config`] is the API body, the config file's section, the answer to
//! `GET` and the snapshot's config, all in one.

use std::fmt;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::vhost::Vhost;
use super::{Backend, MacAddr, Net, OpenError, Passt, Tap};
use crate::mmds::Mmds;
use crate::rate_limiter::{RateLimiterConfig, serialize_effective};
use crate::virtio::VirtioDevice;

/// The smallest MTU: what every IPv4 link must carry (RFC 791).
pub const MIN_MTU: u16 = 68;
/// The most pairs of queues of an interface: more than that many vCPUs gain little from one each.
pub const MAX_QUEUES: u16 = 16;
/// The most bytes in an interface's name: the kernel's IFNAMSIZ less the final NUL.
const MAX_NAME_LEN: usize = libc::IFNAMSIZ - 1;

/// Whether the guest's end of the cable is plugged in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LinkState {
    /// Frames pass.
    #[default]
    Up,
    /// No frame passes, and the guest sees that there is no carrier.
    Down,
}

/// What the host's end of an interface is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendKind {
    /// An interface of the host's kernel.
    #[default]
    Tap,
    /// A program that speaks passt's stream protocol.
    Passt,
}

/// A network interface as the user describes it.
///
/// Mayfly's own fields come last, and are shown only when they are set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, remote = "Self")]
pub struct Config {
    /// The interface's id in the API.
    pub iface_id: String,
    /// The host's tap; one that does not exist is created and vanishes with the VM. Absent when the host's end of the
    /// interface is something else.
    #[serde(default, deserialize_with = "text", skip_serializing_if = "Option::is_none")]
    pub host_dev_name: Option<String>,
    /// The guest's Ethernet address; without one the guest makes up its own.
    pub guest_mac: Option<MacAddr>,
    /// The MTU that the guest is told. The tap's own MTU stays as the host's administrator set it.
    pub mtu: Option<u16>,
    /// Limits what the guest receives.
    #[serde(serialize_with = "serialize_effective")]
    pub rx_rate_limiter: Option<RateLimiterConfig>,
    /// Limits what the guest sends.
    #[serde(serialize_with = "serialize_effective")]
    pub tx_rate_limiter: Option<RateLimiterConfig>,
    /// The link at first; up when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_state: Option<LinkState>,
    /// In place of `host_dev_name`: the number of a descriptor that this process inherited, of an open tap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_fd: Option<RawFd>,
    /// What the host's end is; a tap when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<BackendKind>,
    /// Where passt listens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// The host's kernel moves the frames between queues and tap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost: Option<bool>,
    /// Pairs of queues, 1 to [`MAX_QUEUES`]; 1 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
}

/// What may be left out, and is a text if it is there.
fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    String::deserialize(deserializer).map(Some)
}

impl Serialize for Config {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, serializer)
    }
}

/// Clients know that `host_dev_name` is missing, and where, unless something stands in its place.
impl<'de> Deserialize<'de> for Config {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_struct("NetworkInterfaceConfig", &[], ConfigVisitor)
    }
}

struct ConfigVisitor;

impl<'de> Visitor<'de> for ConfigVisitor {
    type Value = Config;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("struct NetworkInterfaceConfig")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Config, A::Error> {
        Config::deserialize(MapAccessDeserializer::new(map))?.complete()
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Config, A::Error> {
        Config::deserialize(SeqAccessDeserializer::new(seq))?.complete()
    }
}

/// A change of a live interface. A bucket that is left out stays as it is, one of size or refill time zero is removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "struct NetworkInterfaceUpdateConfig")]
pub struct Patch {
    /// The interface's id in the API.
    pub iface_id: String,
    /// Limits what the guest receives; unchanged when absent.
    pub rx_rate_limiter: Option<RateLimiterConfig>,
    /// Limits what the guest sends; unchanged when absent.
    pub tx_rate_limiter: Option<RateLimiterConfig>,
    /// Plugs the cable in or pulls it; unchanged when absent.
    #[serde(default)]
    pub link_state: Option<LinkState>,
    /// Moves the interface to another tap; it stays where it is when absent.
    #[serde(default)]
    pub host_dev_name: Option<String>,
}

/// Why a config cannot work on any host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The kernel has no interface of such a name.
    #[error(
        "host_dev_name '{name}' is not an interface name: use 1 to {MAX_NAME_LEN} bytes without white space, '/', ':' or '%'"
    )]
    Name {
        /// What the user wrote.
        name: String,
    },
    /// Two ends on the host, or none.
    #[error(
        "interface '{iface_id}' has not one end on the host: give host_dev_name, host_fd, or backend passt with socket"
    )]
    Ends {
        /// Which interface.
        iface_id: String,
    },
    /// The kernel moves the frames, and knows no limits.
    #[error(
        "interface '{iface_id}' has vhost, where no rate limiter reaches: remove rx_rate_limiter and tx_rate_limiter, or vhost"
    )]
    VhostLimits {
        /// Which interface.
        iface_id: String,
    },
    /// The kernel moves frames between queues and taps only.
    #[error("interface '{iface_id}' has vhost, which needs a tap: remove vhost, or backend passt")]
    VhostTap {
        /// Which interface.
        iface_id: String,
    },
    /// The count of pairs of queues is out of range.
    #[error("interface '{iface_id}' asks for {queues} queues; it must be 1 to {MAX_QUEUES}")]
    Queues {
        /// Which interface.
        iface_id: String,
        /// What the user wrote.
        queues: u16,
    },
    /// Several pairs of queues, and what works with one only.
    #[error(
        "interface '{iface_id}' has several queues, which work on a tap by host_dev_name only and without vhost: \
         remove queues, or {what}"
    )]
    QueuesAnd {
        /// Which interface.
        iface_id: String,
        /// The fields in the way.
        what: &'static str,
    },
    /// A move to a tap of what is on none.
    #[error("only an interface on a tap can move to another: this one's backend is passt")]
    NoTap,
    /// The MTU is too small.
    #[error("MTU {mtu} is out of range [{MIN_MTU}, {}]", u16::MAX)]
    Mtu {
        /// What the user wrote.
        mtu: u16,
    },
}

impl Config {
    /// Checks all that can be checked without touching the host.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let ends = (&self.host_dev_name, self.host_fd, &self.socket);
        match (self.backend.unwrap_or_default(), ends) {
            (BackendKind::Tap, (Some(name), None, None)) => check_name(name)?,
            (BackendKind::Tap, (None, Some(_), None)) | (BackendKind::Passt, (None, None, Some(_))) => {}
            _ => {
                return Err(ConfigError::Ends {
                    iface_id: self.iface_id.clone(),
                });
            }
        }
        if self.has_vhost() {
            self.validate_vhost()?;
        }
        self.validate_queues()?;
        if let Some(mtu) = self.mtu.filter(|&mtu| mtu < MIN_MTU) {
            return Err(ConfigError::Mtu { mtu });
        }
        Ok(())
    }

    /// Whether frames pass by the kernel, where Mayfly does not see them.
    pub fn has_vhost(&self) -> bool {
        self.vhost == Some(true)
    }

    /// How many pairs of queues it has.
    pub fn queue_count(&self) -> u16 {
        self.queues.unwrap_or(1)
    }

    fn validate_queues(&self) -> Result<(), ConfigError> {
        let (iface_id, queues) = (self.iface_id.clone(), self.queue_count());
        if !(1..=MAX_QUEUES).contains(&queues) {
            return Err(ConfigError::Queues { iface_id, queues });
        }
        let others = [
            (self.backend == Some(BackendKind::Passt), "backend passt"),
            (self.host_fd.is_some(), "host_fd"),
            (self.has_vhost(), "vhost"),
        ];
        match others.iter().find(|(is_there, _)| *is_there && queues > 1) {
            Some((_, what)) => Err(ConfigError::QueuesAnd { iface_id, what }),
            None => Ok(()),
        }
    }

    fn validate_vhost(&self) -> Result<(), ConfigError> {
        let iface_id = self.iface_id.clone();
        if self.backend == Some(BackendKind::Passt) {
            return Err(ConfigError::VhostTap { iface_id });
        }
        let limits = [&self.rx_rate_limiter, &self.tx_rate_limiter];
        if limits.into_iter().flatten().any(RateLimiterConfig::is_effective) {
            return Err(ConfigError::VhostLimits { iface_id });
        }
        Ok(())
    }

    /// Takes in what a patch changes.
    pub fn patch(&mut self, patch: Patch) -> Result<(), ConfigError> {
        if let Some(name) = patch.host_dev_name {
            check_name(&name)?;
            if self.backend == Some(BackendKind::Passt) {
                return Err(ConfigError::NoTap);
            }
            (self.host_dev_name, self.host_fd) = (Some(name), None);
        }
        self.link_state = patch.link_state.or(self.link_state);
        RateLimiterConfig::patch(&mut self.rx_rate_limiter, patch.rx_rate_limiter.as_ref());
        RateLimiterConfig::patch(&mut self.tx_rate_limiter, patch.tx_rate_limiter.as_ref());
        self.validate()
    }

    /// Checks that it says what the host's end is.
    fn complete<E: Error>(self) -> Result<Self, E> {
        match self.backend.unwrap_or_default() {
            BackendKind::Tap if self.host_dev_name.is_none() && self.host_fd.is_none() => {
                Err(E::missing_field("host_dev_name"))
            }
            BackendKind::Passt if self.socket.is_none() => Err(E::missing_field("socket")),
            _ => Ok(self),
        }
    }

    /// Checks what can be checked before there is a machine. A tap is opened, and let go of again; passt is not called,
    /// as it may be one that serves a single caller.
    pub fn check(&self) -> Result<(), OpenError> {
        self.validate()?;
        match self.backend.unwrap_or_default() {
            BackendKind::Tap if self.has_vhost() => Vhost::new(self, self.tap()?).map(drop),
            BackendKind::Tap if self.queue_count() > 1 => self.taps().map(drop),
            BackendKind::Tap => self.tap().map(drop),
            BackendKind::Passt => Ok(()),
        }
    }

    fn tap(&self) -> Result<Tap, OpenError> {
        match self.host_fd {
            Some(fd) => Tap::inherit(fd),
            None => Tap::open(self.host_dev_name.as_deref().unwrap_or_default()),
        }
    }

    fn taps(&self) -> Result<Vec<Tap>, OpenError> {
        let name = self.host_dev_name.as_deref().unwrap_or_default();
        Tap::open_queues(name, self.queue_count())
    }

    /// Opens the host's end and makes the device, which serves `mmds` when that says so.
    pub fn build(&self, mmds: Option<&Arc<Mmds>>) -> Result<Box<dyn VirtioDevice>, OpenError> {
        self.validate()?;
        if self.guest_mac.is_some_and(|mac| mac.is_multicast()) {
            log::warn!(
                "net {}: guest_mac names a group; guests refuse such an address",
                self.iface_id
            );
        }
        let mmds = mmds.filter(|mmds| mmds.is_served_by(&self.iface_id));
        match self.backend.unwrap_or_default() {
            BackendKind::Tap if self.has_vhost() => Ok(Box::new(Vhost::new(self, self.tap()?)?)),
            BackendKind::Tap if self.queue_count() > 1 => {
                let net = Net::with_pairs(self, self.taps()?);
                device(net.map_err(|source| OpenError::Descriptors { source })?, mmds)
            }
            BackendKind::Tap => device(Net::new(self, self.tap()?), mmds),
            BackendKind::Passt => {
                let path = self.socket.as_deref().unwrap_or(Path::new(""));
                device(Net::new(self, Passt::connect(path)?), mmds)
            }
        }
    }
}

fn device<B: Backend + 'static>(
    net: Net<B>,
    mmds: Option<&Arc<Mmds>>,
) -> Result<Box<dyn VirtioDevice>, OpenError> {
    Ok(match mmds {
        Some(mmds) => {
            let net = net.with_mmds(Arc::clone(mmds));
            Box::new(net.map_err(|source| OpenError::Mmds { source })?)
        }
        None => Box::new(net),
    })
}

fn check_name(name: &str) -> Result<(), ConfigError> {
    if is_interface_name(name) {
        return Ok(());
    }
    Err(ConfigError::Name { name: name.into() })
}

/// The kernel's rule, and no '%', which would make it choose a name from a template.
fn is_interface_name(name: &str) -> bool {
    let allowed = |c: char| !c.is_whitespace() && !c.is_control() && !matches!(c, '/' | ':' | '%');
    (1..=MAX_NAME_LEN).contains(&name.len()) && name != "." && name != ".." && name.chars().all(allowed)
}
