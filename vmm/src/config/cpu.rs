//! A custom CPU template: what a guest's CPU is to have otherwise than this host's.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::num::ParseIntError;
use std::ops::{BitAnd, BitOr, Not};
use std::path::{Path, PathBuf};

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::remedy;
use crate::x86_64::cpuid::Register;

/// The body of `PUT /cpu-config`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, expecting = "struct CustomCpuTemplate")]
pub struct CpuConfig {
    /// Which capabilities KVM must have, beyond those that every machine needs, and which it need not.
    #[serde(default)]
    pub kvm_capabilities: Vec<Capability>,
    /// Changes of CPUID leaves, in this order.
    #[serde(default)]
    pub cpuid_modifiers: Vec<CpuidModifier>,
    /// Changes of model specific registers, in this order.
    #[serde(default)]
    pub msr_modifiers: Vec<MsrModifier>,
}

/// A capability by its number in `linux/kvm.h`: `121` must be there, `!121` need not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    /// The machine is not started without it.
    Required(u32),
    /// Its absence is no reason not to start, whatever Mayfly itself thinks of it.
    Waived(u32),
}

/// Changes of one CPUID leaf. Unknown fields are ignored, as clients of the API expect.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(expecting = "struct CpuidLeafModifier")]
pub struct CpuidModifier {
    /// EAX of the instruction.
    #[serde(deserialize_with = "prefixed_number")]
    pub leaf: u32,
    /// ECX of the instruction.
    #[serde(deserialize_with = "prefixed_number")]
    pub subleaf: u32,
    /// KVM's flags of the entry: 1 when the leaf has subleaves, else 0.
    pub flags: u32,
    /// What changes.
    pub modifiers: Vec<RegisterModifier>,
}

/// Changes of one register that CPUID answers in. Unknown fields are ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(expecting = "struct CpuidRegisterModifier")]
pub struct RegisterModifier {
    /// Which register.
    pub register: Register,
    /// Its bits.
    pub bitmap: Bitmap<u32>,
}

/// Changes of one model specific register. Unknown fields are ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(expecting = "struct RegisterModifier")]
pub struct MsrModifier {
    /// Its number.
    #[serde(deserialize_with = "prefixed_number")]
    pub addr: u32,
    /// Its bits.
    pub bitmap: Bitmap<u64>,
}

/// Which bits get which value; written `0b01x`, where `x` is a bit that stays, and so is every bit left of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bitmap<T> {
    /// The bits that are set or cleared.
    pub mask: T,
    /// Their values; no other bit is set.
    pub value: T,
}

impl<T: Copy + Not<Output = T> + BitAnd<Output = T> + BitOr<Output = T>> Bitmap<T> {
    /// The register's new value.
    pub fn apply(self, old: T) -> T {
        old & !self.mask | self.value
    }
}

impl<'de, T: TryFrom<u64>> Deserialize<'de> for Bitmap<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let (mask, value) = parse_bitmap(&text, 8 * size_of::<T>()).map_err(D::Error::custom)?;
        match (T::try_from(mask), T::try_from(value)) {
            (Ok(mask), Ok(value)) => Ok(Self { mask, value }),
            _ => Err(D::Error::custom(too_long(&text, 8 * size_of::<T>()))),
        }
    }
}

/// Mask and value of a bitmap of up to `width` bits, the highest first.
fn parse_bitmap(text: &str, width: usize) -> Result<(u64, u64), String> {
    let (mut mask, mut value) = (0u64, 0u64);
    let digits = text.strip_prefix("0b").unwrap_or(text).bytes();
    for (position, digit) in digits.filter(|digit| *digit != b'_').enumerate() {
        if position == width {
            return Err(too_long(text, width));
        }
        let (fixed, bit) = match digit {
            b'0' => (1, 0),
            b'1' => (1, 1),
            b'x' => (0, 0),
            other => {
                return Err(format!(
                    "Failed to parse string [{text}] as a bitmap - unknown character: {other}"
                ));
            }
        };
        (mask, value) = (mask << 1 | fixed, value << 1 | bit);
    }
    Ok((mask, value))
}

fn too_long(text: &str, width: usize) -> String {
    format!("Failed to parse string [{text}] as a bitmap - string is too long, the register has {width} bits")
}

fn prefixed_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse_number(&text).map_err(D::Error::custom)
}

fn parse_number(text: &str) -> Result<u32, String> {
    let number = match text.split_at_checked(2) {
        Some(("0x", digits)) => unsigned(digits, 16),
        Some(("0b", digits)) => unsigned(digits, 2),
        _ => {
            return Err(format!(
                "No supported number system prefix found in value [{text}]. Make sure to prefix the number with \
                 '0x' for hexadecimal numbers or '0b' for binary numbers."
            ));
        }
    };
    number.map_err(|error| format!("Failed to parse string [{text}] as a number for CPU template - {error}"))
}

/// Digits only: the standard library takes a sign too.
fn unsigned(digits: &str, radix: u32) -> Result<u32, ParseIntError> {
    let digits = if digits.starts_with('+') { "+" } else { digits };
    u32::from_str_radix(digits, radix)
}

impl<'de> Deserialize<'de> for Capability {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let parsed = match text.strip_prefix('!') {
            Some(number) => unsigned(number, 10).map(Capability::Waived),
            None => unsigned(&text, 10).map(Capability::Required),
        };
        parsed.map_err(|error| {
            D::Error::custom(format!(
                "Failed to parse string [{text}] as a kvm capability - can not convert to numeric: {error}"
            ))
        })
    }
}

/// Why the file of a CPU template cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CpuConfigFileError {
    /// It cannot be read.
    #[error("cannot read the CPU template {path}: {}", remedy(source), path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no template.
    #[error("{path} is no CPU template", path = path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
}

/// The config file's section `cpu-config`: a template, or the path of a file with one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CpuConfigSource {
    /// A file of JSON.
    Path(PathBuf),
    /// The template itself.
    Inline(CpuConfig),
}

impl CpuConfigSource {
    /// The template.
    pub fn load(&self) -> Result<Cow<'_, CpuConfig>, CpuConfigFileError> {
        match self {
            CpuConfigSource::Path(path) => read(path).map(Cow::Owned),
            CpuConfigSource::Inline(config) => Ok(Cow::Borrowed(config)),
        }
    }
}

fn read(path: &Path) -> Result<CpuConfig, CpuConfigFileError> {
    let text = std::fs::read_to_string(path).map_err(|source| CpuConfigFileError::Read {
        path: path.to_owned(),
        source,
    })?;
    serde_json::from_str(&text).map_err(|source| CpuConfigFileError::Json {
        path: path.to_owned(),
        source,
    })
}

/// No answer shows a custom template, as clients of the API expect.
impl Serialize for CpuConfigSource {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_none()
    }
}

impl<'de> Deserialize<'de> for CpuConfigSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SourceVisitor)
    }
}

struct SourceVisitor;

impl<'de> Visitor<'de> for SourceVisitor {
    type Value = CpuConfigSource;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a CPU template or the path of a file with one")
    }

    fn visit_str<E: Error>(self, path: &str) -> Result<CpuConfigSource, E> {
        Ok(CpuConfigSource::Path(Path::new(path).to_owned()))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<CpuConfigSource, A::Error> {
        CpuConfig::deserialize(MapAccessDeserializer::new(map)).map(CpuConfigSource::Inline)
    }
}

#[cfg(test)]
mod tests;
