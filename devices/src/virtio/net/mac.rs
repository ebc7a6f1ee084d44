//! [`MacAddr`]: an Ethernet address as users write it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_group_addresses() {
        assert!(MacAddr::new([0xff; 6]).is_multicast());
        assert!(!"aa:fc:00:00:00:01".parse::<MacAddr>().unwrap().is_multicast());
    }

    #[test]
    fn prints_in_lower_case() {
        let mac = MacAddr::new([0xAB, 0, 0, 0, 0, 1]);
        assert_eq!(mac.to_string(), "ab:00:00:00:00:01");
    }
}
