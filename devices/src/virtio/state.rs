//! Saved device state: tagged, versioned and self-describing, so that a newer Mayfly reads what an older one wrote.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The state of one device as it stands in a snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Blob {
    kind: String,
    version: u32,
    state: Value,
}

/// Why a saved state cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The state belongs to another kind of device.
    #[error("the saved state is of a '{found}' device, expected '{expected}'")]
    Kind {
        /// What this device is.
        expected: &'static str,
        /// What the state says.
        found: String,
    },
    /// A newer program wrote it.
    #[error("the saved '{kind}' state has version {found}; this program reads versions up to {newest}")]
    Version {
        /// Device kind.
        kind: &'static str,
        /// Version found.
        found: u32,
        /// Newest version known.
        newest: u32,
    },
    /// The fields are not what that version has.
    #[error("the saved '{kind}' state is malformed")]
    Malformed {
        /// Device kind.
        kind: &'static str,
        /// Where and why.
        source: serde_json::Error,
    },
    /// The values contradict each other or the config.
    #[error("the saved '{kind}' state is inconsistent: {what}")]
    Inconsistent {
        /// Device kind.
        kind: &'static str,
        /// The contradiction.
        what: String,
    },
}

impl Blob {
    /// Wraps `state`, which must be plain data (no maps with keys other than strings).
    pub fn new<T: Serialize>(kind: &'static str, version: u32, state: &T) -> Self {
        let state = serde_json::to_value(state).expect("device states are plain data");
        Self {
            kind: kind.into(),
            version,
            state,
        }
    }

    /// Unwraps the state of `kind`, written in a version of at most `newest`.
    pub fn open<T: DeserializeOwned>(self, kind: &'static str, newest: u32) -> Result<T, StateError> {
        if self.kind != kind {
            return Err(StateError::Kind {
                expected: kind,
                found: self.kind,
            });
        }
        if self.version > newest {
            return Err(StateError::Version {
                kind,
                found: self.version,
                newest,
            });
        }
        serde_json::from_value(self.state).map_err(|source| StateError::Malformed { kind, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_what_was_saved() {
        let blob = Blob::new("disk", 2, &[1, 2]);
        assert_eq!(blob.open::<[i32; 2]>("disk", 2).unwrap(), [1, 2]);
    }

    #[test]
    fn refuses_another_kind_a_newer_version_and_other_fields() {
        let blob = Blob::new("disk", 2, &[1, 2]);
        assert!(matches!(
            blob.clone().open::<[i32; 2]>("net", 2),
            Err(StateError::Kind { .. })
        ));
        assert!(matches!(
            blob.clone().open::<[i32; 2]>("disk", 1),
            Err(StateError::Version { .. })
        ));
        assert!(matches!(
            blob.open::<String>("disk", 2),
            Err(StateError::Malformed { .. })
        ));
    }
}
