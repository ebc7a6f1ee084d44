//! What the user asks of the vsock device: [`Config`] is the API body, the config file's section and the answer to
//! `GET`, all in one.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{OpenError, Vsock};

/// The smallest address of a guest; those below have fixed meanings (virtio 1.2 §5.10.4).
pub const MIN_CID: u32 = 3;
/// The largest; the one above stands for any address.
pub const MAX_CID: u32 = u32::MAX - 1;
/// `sun_path` of unix(7) has 108 bytes, one of them for the final zero.
pub const MAX_PATH: usize = 107;

/// The vsock device as the user describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "struct VsockDeviceConfig")]
pub struct Config {
    /// A name that older clients give it. It has no use.
    #[serde(default, skip_serializing)]
    pub vsock_id: Option<String>,
    /// The guest's address, [`MIN_CID`] to [`MAX_CID`].
    pub guest_cid: u32,
    /// The socket to which programs of the host connect; `uds_path` and `_PORT` is where the guest's connections go.
    pub uds_path: PathBuf,
}

/// Why a config cannot work on any host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The address means something else.
    #[error(
        "guest_cid {cid} is reserved: use {MIN_CID} to {MAX_CID} (0 and 1 are unused, 2 is the host, {any} means any)",
        any = u32::MAX
    )]
    Cid {
        /// What the user wrote.
        cid: u32,
    },
    /// The path is empty or holds a zero byte.
    #[error("uds_path {path:?} is not a file name")]
    PathInvalid {
        /// What the user wrote.
        path: PathBuf,
    },
    /// The path does not fit the kernel's socket address.
    #[error(
        "uds_path {path:?} has {length} bytes, but a unix socket path may have {MAX_PATH}; choose a shorter one"
    )]
    PathTooLong {
        /// What the user wrote.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
}

impl Config {
    /// Checks all that can be checked without touching the host.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !(MIN_CID..=MAX_CID).contains(&self.guest_cid) {
            return Err(ConfigError::Cid { cid: self.guest_cid });
        }
        check_path(&self.uds_path)
    }

    /// Binds the socket and makes the device, which removes the socket in the end.
    pub fn build(&self) -> Result<Vsock, OpenError> {
        self.validate()?;
        Vsock::new(self)
    }
}

fn check_path(path: &Path) -> Result<(), ConfigError> {
    let bytes = path.as_os_str().as_bytes();
    // An empty path would bind a nameless socket in the abstract name space.
    if bytes.is_empty() || bytes.contains(&0) {
        return Err(ConfigError::PathInvalid { path: path.into() });
    }
    if bytes.len() > MAX_PATH {
        return Err(ConfigError::PathTooLong {
            path: path.into(),
            length: bytes.len(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(guest_cid: u32, uds_path: &str) -> Config {
        Config {
            vsock_id: None,
            guest_cid,
            uds_path: uds_path.into(),
        }
    }

    #[test]
    fn prints_address_and_path_only() {
        let config: Config =
            serde_json::from_str(r#"{"vsock_id":"v","uds_path":"./v.sock","guest_cid":3}"#).unwrap();
        assert_eq!(config.vsock_id.as_deref(), Some("v"));
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(text, r#"{"guest_cid":3,"uds_path":"./v.sock"}"#);
    }

    #[test]
    fn refuses_what_is_missing_or_unknown_by_name() {
        let error = |json: &str| serde_json::from_str::<Config>(json).unwrap_err().to_string();
        assert!(error(r#"{"uds_path":"v"}"#).starts_with("missing field `guest_cid`"));
        assert!(error(r#"{"guest_cid":3}"#).starts_with("missing field `uds_path`"));
        let unknown = "unknown field `x`, expected one of `vsock_id`, `guest_cid`, `uds_path`";
        assert!(error(r#"{"guest_cid":3,"uds_path":"v","x":1}"#).starts_with(unknown));
        let range = "invalid value: integer `4294967296`, expected u32";
        assert!(error(r#"{"guest_cid":4294967296,"uds_path":"v"}"#).starts_with(range));
    }

    #[test]
    fn refuses_reserved_addresses() {
        let refused = [0, 1, 2, u32::MAX].map(|cid| config(cid, "v").validate());
        assert_eq!(
            refused,
            [0, 1, 2, u32::MAX].map(|cid| Err(ConfigError::Cid { cid }))
        );
        assert_eq!(
            [3, u32::MAX - 1].map(|cid| config(cid, "v").validate()),
            [Ok(()), Ok(())]
        );
        assert_eq!(
            config(2, "v").validate().unwrap_err().to_string(),
            "guest_cid 2 is reserved: use 3 to 4294967294 (0 and 1 are unused, 2 is the host, 4294967295 means any)"
        );
    }

    #[test]
    fn refuses_paths_that_no_socket_has() {
        let refused = |path: &str| config(3, path).validate().unwrap_err();
        assert!(matches!(refused(""), ConfigError::PathInvalid { .. }));
        assert!(matches!(refused("a\0b"), ConfigError::PathInvalid { .. }));
        let long = "x".repeat(MAX_PATH + 1);
        assert!(matches!(
            refused(&long),
            ConfigError::PathTooLong { length: 108, .. }
        ));
        assert_eq!(config(3, &long[..MAX_PATH]).validate(), Ok(()));
    }
}
