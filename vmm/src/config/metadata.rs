//! Reading the file that fills the metadata store at the start of the process.

use std::io;
use std::path::Path;

use devices::mmds::Store;

use crate::error::remedy;

/// Why a metadata file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MetadataFileError {
    /// It cannot be read.
    #[error("cannot read the metadata file '{path}': {}", remedy(source))]
    Open {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// Its content is something else.
    #[error("the metadata file '{path}' is not JSON")]
    Json {
        /// The file.
        path: String,
        /// Where and why.
        source: serde_json::Error,
    },
    /// The store has no room for it.
    #[error(
        "the metadata file '{path}' holds more than {limit} bytes of JSON: allow more with --mmds-size-limit"
    )]
    TooLong {
        /// The file.
        path: String,
        /// How many fit.
        limit: usize,
    },
}

/// A store for documents of at most `limit` bytes, with what is in the file, if one is named.
pub fn read_metadata(path: Option<&Path>, limit: usize) -> Result<Store, MetadataFileError> {
    let store = Store::new(limit);
    let Some(path) = path else { return Ok(store) };
    let name = || path.display().to_string();
    let open_failed = |source| MetadataFileError::Open { path: name(), source };
    let text = std::fs::read(path).map_err(open_failed)?;
    let document =
        serde_json::from_slice(&text).map_err(|source| MetadataFileError::Json { path: name(), source })?;
    let put = store.put(document);
    put.map_err(|_| MetadataFileError::TooLong { path: name(), limit })?;
    Ok(store)
}
