//! What concerns the monitor's process more than its machine: console, log and metrics.

use std::collections::BTreeMap;
use std::path::PathBuf;

use devices::rate_limiter::TokenBucketConfig;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Where the first serial port is connected.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialConfig {
    /// A file for the output, instead of standard output. Standard input is then not read.
    pub serial_out_path: Option<PathBuf>,
    /// Limits the bytes of output; those beyond are dropped.
    pub rate_limiter: Option<TokenBucketConfig>,
}

/// Where and how to log; every field that is absent keeps what the command line said, except the level, which
/// becomes `Info`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoggerConfig {
    /// A file, created when missing, or a FIFO.
    pub log_path: Option<PathBuf>,
    /// The least severe level that is logged.
    pub level: Option<LogLevel>,
    /// Whether lines show their level.
    pub show_level: Option<bool>,
    /// Whether lines show file and line of their origin.
    pub show_log_origin: Option<bool>,
    /// Only this module is logged.
    pub module: Option<String>,
}

/// A log level, written in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogLevel(pub log::LevelFilter);

impl std::str::FromStr for LogLevel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = match text.to_ascii_lowercase().as_str() {
            "warning" => log::LevelFilter::Warn,
            other => other.parse().map_err(|_| {
                format!("Invalid LevelFilter: '{text}' is none of Off, Trace, Debug, Info, Warn, Error")
            })?,
        };
        Ok(Self(known))
    }
}

impl Serialize for LogLevel {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.0.as_str())
    }
}

impl<'de> Deserialize<'de> for LogLevel {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// Where metrics go. Unknown fields are ignored, as clients of the API expect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetricsConfig {
    /// A file, created when missing, or a FIFO.
    pub metrics_path: PathBuf,
    /// Whether lines name the instance, as `id`.
    #[serde(default)]
    pub emit_id: bool,
    /// Names and values of the user's own, for every line.
    #[serde(default)]
    pub properties: Option<BTreeMap<String, String>>,
}
