//! The metadata service (MMDS): a JSON document that the API sets and guests read over HTTP, at a link-local address
//! and through chosen network interfaces.
//!
//! [`Store`] holds the document. The control thread writes it, io threads read it: the lock in between is held for the
//! exchange of a pointer. [`Mmds`] is the running service, shared by all interfaces that serve it, and answers single
//! requests (`http.rs`) with their session tokens (`token.rs`). Each interface has a [`Stack`] of its own, which speaks ARP
//! and TCP to the guest; `packet.rs` decides what is let into it. The network device brings the frames.

mod connection;
mod http;
mod metrics;
mod packet;
mod stack;
mod store;
#[cfg(test)]
pub(crate) mod tests;
mod token;
mod wire;

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Deserializer, Serialize};

pub use metrics::Metrics;
pub use packet::{HEAD_LEN, MAC, is_for};
pub use stack::{MAX_FRAME_LEN, Now, Stack};
pub use store::{Store, StoreError};

use self::metrics::count;
use self::token::Tokens;

/// Where guests find the service unless the config says otherwise.
pub const DEFAULT_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// The link-local addresses that may be given out (RFC 3927 §2.1 reserves the first and the last 256).
const ADDRESSES: std::ops::RangeInclusive<Ipv4Addr> =
    Ipv4Addr::new(169, 254, 1, 0)..=Ipv4Addr::new(169, 254, 254, 255);

/// How the service is reached: the API body, the config file's section and the answer to `GET`, in one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "struct MmdsConfig")]
pub struct Config {
    /// What a guest must do to read.
    #[serde(default)]
    pub version: Version,
    /// Ids of the network interfaces that serve it.
    pub network_interfaces: Vec<String>,
    /// The address that guests ask, always at port 80.
    #[serde(default = "default_address", deserialize_with = "address_or_default")]
    pub ipv4_address: Ipv4Addr,
    /// Answer in text even to who accepts JSON, as the EC2 metadata service does.
    #[serde(default)]
    pub imds_compat: bool,
}

/// What a guest must do to read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Version {
    /// Ask.
    #[default]
    V1,
    /// Ask with a session token.
    V2,
}

/// Why a config was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Nobody could reach the service.
    #[error("network_interfaces is empty; name at least one network interface that is to serve MMDS")]
    NoInterfaces,
    /// One of the interfaces does not exist.
    #[error("there is no network interface '{0}'; add it with PUT /network-interfaces/{0} first")]
    UnknownInterface(String),
    /// The address could be a real host's.
    #[error("ipv4_address {0} is not link-local; take one from {first} to {last}", first = ADDRESSES.start(), last = ADDRESSES.end())]
    Address(Ipv4Addr),
}

fn default_address() -> Ipv4Addr {
    DEFAULT_ADDRESS
}

/// `null` is the default too, as for every optional field of the API.
fn address_or_default<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Ipv4Addr, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(DEFAULT_ADDRESS))
}

impl Config {
    /// Checks all that can be checked without knowing the machine's interfaces.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.network_interfaces.is_empty() {
            return Err(ConfigError::NoInterfaces);
        }
        if !ADDRESSES.contains(&self.ipv4_address) {
            return Err(ConfigError::Address(self.ipv4_address));
        }
        Ok(())
    }
}

/// The running service.
#[derive(Debug)]
pub struct Mmds {
    config: Config,
    store: Arc<Store>,
    tokens: Mutex<Tokens>,
    /// The first look at the clock, from which [`Mmds::age`] counts.
    origin: OnceLock<Instant>,
    metrics: Metrics,
}

impl Mmds {
    /// A service of what is and will be in `store`.
    pub fn new(config: Config, store: Arc<Store>) -> Self {
        Self {
            config,
            store,
            tokens: Mutex::default(),
            origin: OnceLock::new(),
            metrics: Metrics::default(),
        }
    }

    /// Whether the interface of this id serves it.
    pub fn is_served_by(&self, iface_id: &str) -> bool {
        self.config.network_interfaces.iter().any(|id| id == iface_id)
    }

    /// The address that guests ask.
    pub fn address(&self) -> Ipv4Addr {
        self.config.ipv4_address
    }

    /// The time by which tokens end: the same on all interfaces, as they share the tokens. It goes on while the machine is
    /// paused.
    pub fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(*self.origin.get_or_init(|| now))
    }

    /// The counters of all interfaces together.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    fn issue_token(&self, ttl: u32, now: Duration) -> std::io::Result<String> {
        self.lock_tokens().issue(ttl, now)
    }

    /// Whether a request with this token may read, also counting those that may not: with V1 too, where they are
    /// answered all the same, so that users see who is not ready for V2.
    fn admits(&self, token: Option<&str>, now: Duration) -> Result<(), Denied> {
        let denied = match token {
            Some(token) if self.lock_tokens().is_valid(token, now) => return Ok(()),
            Some(_) => Denied::InvalidToken,
            None => Denied::NoToken,
        };
        count(match denied {
            Denied::InvalidToken => &self.metrics.rx_invalid_token,
            Denied::NoToken => &self.metrics.rx_no_token,
        });
        match self.config.version {
            Version::V1 => Ok(()),
            Version::V2 => Err(denied),
        }
    }

    fn lock_tokens(&self) -> std::sync::MutexGuard<'_, Tokens> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a request may not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Denied {
    NoToken,
    InvalidToken,
}
