//! What the user asks of a network interface: [`Config`] is the API body, the config file's section, the answer to
//! `GET` and the snapshot's config, all in one.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Net, OpenError, Tap};
use crate::mmds::Mmds;
use crate::rate_limiter::{RateLimiterConfig, serialize_effective};

/// The smallest MTU: what every IPv4 link must carry (RFC 791).
pub const MIN_MTU: u16 = 68;
/// The most bytes in an interface's name: the kernel's IFNAMSIZ less the final NUL.
const MAX_NAME_LEN: usize = libc::IFNAMSIZ - 1;

/// An Ethernet address; as text six hexadecimal pairs with colons, lower-case when printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr([u8; 6]);

/// The text is not an Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("The provided MAC address is invalid.")]
pub struct InvalidMac;

impl MacAddr {
    /// The address with these bytes, as they stand in a frame.
    pub fn new(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }

    /// The bytes, as they stand in a frame.
    pub fn bytes(&self) -> [u8; 6] {
        self.0
    }

    /// True when it names a group of stations; such an address cannot be the source of a frame.
    pub fn is_multicast(&self) -> bool {
        self.0[0] & 1 != 0
    }
}

impl FromStr for MacAddr {
    type Err = InvalidMac;

    fn from_str(text: &str) -> Result<Self, InvalidMac> {
        let mut bytes = [0; 6];
        let mut pairs = text.split(':');
        for byte in &mut bytes {
            let pair = pairs.next().ok_or(InvalidMac)?;
            // `from_str_radix` alone would take a sign for a digit.
            if pair.len() != 2 || !pair.bytes().all(|c| c.is_ascii_hexdigit()) {
                return Err(InvalidMac);
            }
            *byte = u8::from_str_radix(pair, 16).map_err(|_| InvalidMac)?;
        }
        pairs.next().is_none().then_some(Self(bytes)).ok_or(InvalidMac)
    }
}

impl TryFrom<String> for MacAddr {
    type Error = InvalidMac;

    fn try_from(text: String) -> Result<Self, InvalidMac> {
        text.parse()
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// A network interface as the user describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The interface's id in the API.
    pub iface_id: String,
    /// The host's tap; one that does not exist is created and vanishes with the VM.
    pub host_dev_name: String,
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
        if !is_interface_name(&self.host_dev_name) {
            return Err(ConfigError::Name {
                name: self.host_dev_name.clone(),
            });
        }
        if let Some(mtu) = self.mtu.filter(|&mtu| mtu < MIN_MTU) {
            return Err(ConfigError::Mtu { mtu });
        }
        Ok(())
    }

    /// Takes in what a patch changes.
    pub fn patch(&mut self, patch: Patch) {
        RateLimiterConfig::patch(&mut self.rx_rate_limiter, patch.rx_rate_limiter.as_ref());
        RateLimiterConfig::patch(&mut self.tx_rate_limiter, patch.tx_rate_limiter.as_ref());
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
        let net = Net::new(self, Tap::open(&self.host_dev_name)?);
        match mmds.filter(|mmds| mmds.is_served_by(&self.iface_id)) {
            Some(mmds) => net
                .with_mmds(Arc::clone(mmds))
                .map_err(|source| OpenError::Mmds { source }),
            None => Ok(net),
        }
    }
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
            host_dev_name: name.into(),
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
        config.patch(serde_json::from_str(&patch).unwrap());
        let size = |limits: Option<RateLimiterConfig>| limits.unwrap().ops.unwrap().size;
        assert_eq!(
            (size(config.rx_rate_limiter), size(config.tx_rate_limiter)),
            (1, 3)
        );
    }

    #[test]
    fn knows_group_addresses() {
        assert!(MacAddr::new([0xff; 6]).is_multicast());
        assert!(!"aa:fc:00:00:00:01".parse::<MacAddr>().unwrap().is_multicast());
    }
}
