//! What the user asks of a network interface: [`Config`] is the API body, the config file's section, the answer to
//! `GET` and the snapshot's config, all in one.

use std::fmt;
use std::os::fd::RawFd;
use std::sync::Arc;

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{MacAddr, Net, OpenError, Tap};
use crate::mmds::Mmds;
use crate::rate_limiter::{RateLimiterConfig, serialize_effective};

/// The smallest MTU: what every IPv4 link must carry (RFC 791).
pub const MIN_MTU: u16 = 68;
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
    #[serde(skip_serializing_if = "Option::is_none")]
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
#[serde(deny_unknown_fields)]
pub struct Patch {
    /// The interface's id in the API.
    pub iface_id: String,
    /// Limits what the guest receives; unchanged when absent.
    pub rx_rate_limiter: Option<RateLimiterConfig>,
    /// Limits what the guest sends; unchanged when absent.
    pub tx_rate_limiter: Option<RateLimiterConfig>,
    /// Plugs the cable in or pulls it; unchanged when absent.
    pub link_state: Option<LinkState>,
    /// Moves the interface to another tap; it stays where it is when absent.
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
    /// Two ends on the host.
    #[error("interface '{iface_id}' has both host_dev_name and host_fd: give one of them")]
    TwoTaps {
        /// Which interface.
        iface_id: String,
    },
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
        match (&self.host_dev_name, self.host_fd) {
            (Some(_), Some(_)) => {
                return Err(ConfigError::TwoTaps {
                    iface_id: self.iface_id.clone(),
                });
            }
            (Some(name), None) => check_name(name)?,
            (None, _) => {}
        }
        if let Some(mtu) = self.mtu.filter(|&mtu| mtu < MIN_MTU) {
            return Err(ConfigError::Mtu { mtu });
        }
        Ok(())
    }

    /// Takes in what a patch changes.
    pub fn patch(&mut self, patch: Patch) -> Result<(), ConfigError> {
        if let Some(name) = patch.host_dev_name {
            check_name(&name)?;
            (self.host_dev_name, self.host_fd) = (Some(name), None);
        }
        self.link_state = patch.link_state.or(self.link_state);
        RateLimiterConfig::patch(&mut self.rx_rate_limiter, patch.rx_rate_limiter.as_ref());
        RateLimiterConfig::patch(&mut self.tx_rate_limiter, patch.tx_rate_limiter.as_ref());
        Ok(())
    }

    /// Checks that it says what the host's end is.
    fn complete<E: Error>(self) -> Result<Self, E> {
        if self.host_dev_name.is_none() && self.host_fd.is_none() {
            return Err(E::missing_field("host_dev_name"));
        }
        Ok(self)
    }

    fn tap(&self) -> Result<Tap, OpenError> {
        match self.host_fd {
            Some(fd) => Tap::inherit(fd),
            None => Tap::open(self.host_dev_name.as_deref().unwrap_or_default()),
        }
    }

    /// Opens the tap and makes the device, which serves `mmds` when that says so.
    pub fn build(&self, mmds: Option<&Arc<Mmds>>) -> Result<Net, OpenError> {
        self.validate()?;
        if self.guest_mac.is_some_and(|mac| mac.is_multicast()) {
            log::warn!(
                "net {}: guest_mac names a group; guests refuse such an address",
                self.iface_id
            );
        }
        let net = Net::new(self, self.tap()?);
        match mmds.filter(|mmds| mmds.is_served_by(&self.iface_id)) {
            Some(mmds) => net
                .with_mmds(Arc::clone(mmds))
                .map_err(|source| OpenError::Mmds { source }),
            None => Ok(net),
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> Config {
        serde_json::from_str(json).unwrap()
    }

    fn named(name: &str) -> Config {
        Config {
            host_dev_name: Some(name.into()),
            ..config(r#"{"iface_id":"eth0","host_dev_name":"tap0"}"#)
        }
    }

    #[test]
    fn prints_every_field_in_order_with_a_lower_case_mac() {
        let config = config(r#"{"host_dev_name":"tap0","guest_mac":"AA:FC:00:00:00:01","iface_id":"eth0"}"#);
        assert_eq!(
            serde_json::to_string(&config).unwrap(),
            r#"{"iface_id":"eth0","host_dev_name":"tap0","guest_mac":"aa:fc:00:00:00:01","mtu":null,"rx_rate_limiter":null,"tx_rate_limiter":null}"#
        );
    }

    #[test]
    fn says_that_a_mac_is_invalid() {
        for mac in [
            "",
            "aa:fc:00:00:00",
            "aa:fc:00:00:00:01:02",
            "aa:fc:00:00:00:+1",
            "aafc:00:00:00:01",
            "ag:fc:00:00:00:01",
        ] {
            let json = format!(r#"{{"iface_id":"eth0","host_dev_name":"tap0","guest_mac":"{mac}"}}"#);
            let error = serde_json::from_str::<Config>(&json).unwrap_err().to_string();
            assert!(
                error.starts_with("The provided MAC address is invalid. at line 1 column"),
                "{mac}: {error}"
            );
        }
    }

    #[test]
    fn misses_the_tap_as_clients_expect() {
        let error = serde_json::from_str::<Config>(r#"{"iface_id":"a"}"#).unwrap_err();
        let expected = "missing field `host_dev_name` at line 1 column 16";
        assert_eq!(error.to_string(), expected);
        let error = serde_json::from_str::<Config>("null").unwrap_err().to_string();
        assert!(
            error.starts_with("invalid type: null, expected struct NetworkInterfaceConfig"),
            "{error}"
        );
        let error = serde_json::from_str::<Config>("[]").unwrap_err().to_string();
        assert!(error.starts_with("invalid length 0, expected struct"), "{error}");
        assert!(serde_json::from_str::<Config>(r#"["a","tap0",null,1500,null,null]"#).is_ok());
    }

    #[test]
    fn takes_a_descriptor_in_place_of_a_name() {
        let config = config(r#"{"iface_id":"a","host_fd":9}"#);
        assert_eq!(config.validate(), Ok(()));
        let json = serde_json::to_string(&config).unwrap();
        assert!(
            json.starts_with(r#"{"iface_id":"a","guest_mac":null"#) && json.ends_with(r#","host_fd":9}"#),
            "{json}"
        );
        assert_eq!(serde_json::from_str::<Config>(&json).unwrap(), config);

        let both = Config {
            host_dev_name: Some("tap0".into()),
            ..config
        };
        let error = both.validate().unwrap_err().to_string();
        assert!(
            error.contains("interface 'a' has both host_dev_name and host_fd"),
            "{error}"
        );
    }

    #[test]
    fn a_patch_moves_an_interface_away_from_its_descriptor() {
        let mut config = config(r#"{"iface_id":"a","host_fd":9}"#);
        let patch = r#"{"iface_id":"a","host_dev_name":"tap1"}"#;
        config.patch(serde_json::from_str(patch).unwrap()).unwrap();
        assert_eq!(
            (config.host_dev_name.as_deref(), config.host_fd),
            (Some("tap1"), None)
        );
    }

    #[test]
    fn refuses_unknown_fields_by_name() {
        let error =
            serde_json::from_str::<Config>(r#"{"iface_id":"a","host_dev_name":"b","x":1}"#).unwrap_err();
        assert!(error.to_string().starts_with("unknown field `x`"), "{error}");
        assert!(serde_json::from_str::<Patch>(r#"{"iface_id":"a","mtu":1}"#).is_err());
    }

    #[test]
    fn accepts_what_the_kernel_takes_as_a_name() {
        for name in ["a", "tap0", "vm-1.eth0", "tap_é", "123456789012345"] {
            assert_eq!(named(name).validate(), Ok(()), "{name}");
        }
    }

    #[test]
    fn refuses_what_is_no_interface_name() {
        for name in [
            "",
            ".",
            "..",
            "tap 0",
            "tap/0",
            "tap:0",
            "tap%d",
            "tap\0",
            "tap\n",
            "1234567890123456",
        ] {
            let error = named(name).validate().unwrap_err();
            assert_eq!(error, ConfigError::Name { name: name.into() });
        }
    }

    #[test]
    fn bounds_the_mtu() {
        let with = |mtu| Config {
            mtu: Some(mtu),
            ..named("tap0")
        };
        assert_eq!(
            with(67).validate().unwrap_err().to_string(),
            "MTU 67 is out of range [68, 65535]"
        );
        assert_eq!(with(68).validate(), Ok(()));
        assert_eq!(with(65535).validate(), Ok(()));
    }

    #[test]
    fn a_patch_changes_the_limits_it_names() {
        let limits = |size| format!(r#"{{"ops":{{"size":{size},"refill_time":1}}}}"#);
        let mut config = config(&format!(
            r#"{{"iface_id":"a","host_dev_name":"b","rx_rate_limiter":{},"tx_rate_limiter":{}}}"#,
            limits(1),
            limits(2)
        ));
        let patch = format!(r#"{{"iface_id":"a","tx_rate_limiter":{}}}"#, limits(3));
        config.patch(serde_json::from_str(&patch).unwrap()).unwrap();
        let size = |limits: Option<RateLimiterConfig>| limits.unwrap().ops.unwrap().size;
        assert_eq!(
            (size(config.rx_rate_limiter), size(config.tx_rate_limiter)),
            (1, 3)
        );
    }

    #[test]
    fn a_patch_moves_the_interface_and_sets_its_link() {
        let mut config = named("tap0");
        let patch = r#"{"iface_id":"eth0","link_state":"down","host_dev_name":"tap1"}"#;
        config.patch(serde_json::from_str(patch).unwrap()).unwrap();
        let nothing = serde_json::from_str(r#"{"iface_id":"eth0"}"#).unwrap();
        config.patch(nothing).unwrap();
        assert_eq!(config.host_dev_name.as_deref(), Some("tap1"));
        let json = serde_json::to_string(&config).unwrap();
        assert!(
            json.ends_with(r#""tx_rate_limiter":null,"link_state":"down"}"#),
            "{json}"
        );
    }

    #[test]
    fn a_patch_with_a_name_that_no_interface_has_changes_nothing() {
        let mut config = named("tap0");
        let patch = r#"{"iface_id":"eth0","link_state":"down","host_dev_name":"tap/1"}"#;
        let refused = config.patch(serde_json::from_str(patch).unwrap());
        assert_eq!(refused, Err(ConfigError::Name { name: "tap/1".into() }));
        assert_eq!(config, named("tap0"));
    }
}
