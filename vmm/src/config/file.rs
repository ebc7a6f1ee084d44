//! Reading a config file.

use std::io;
use std::path::Path;

use super::VmConfig;

/// Why a config file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigFileError {
    /// It cannot be read.
    #[error("cannot read the config file '{path}'")]
    Open {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// It is not a config.
    #[error("the config file '{path}' is not a machine's config")]
    Json {
        /// The file.
        path: String,
        /// Where and why.
        source: serde_json::Error,
    },
}

/// Reads a config file.
pub fn read_config_file(path: &Path) -> Result<VmConfig, ConfigFileError> {
    let name = || path.display().to_string();
    let file = std::fs::File::open(path).map_err(|source| ConfigFileError::Open { path: name(), source })?;
    let text = io::read_to_string(file).map_err(|source| ConfigFileError::Open { path: name(), source })?;
    serde_json::from_str(&text).map_err(|source| ConfigFileError::Json { path: name(), source })
}
