//! [`Listener`]: the socket to which programs of the host connect, and its file.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use super::ConfigError;

/// Why a vsock device could not be made; nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The config is wrong by itself.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Something exists at the path already.
    #[error(
        "uds_path {path:?} is in use: stop the process that serves it, remove the file if there is none, \
         or choose another path"
    )]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// The folder of the path does not exist.
    #[error(
        "uds_path {path:?} cannot be created: there is no folder {folder:?}; create it or choose another path"
    )]
    NoFolder {
        /// The path.
        path: PathBuf,
        /// What is missing, or is not a folder.
        folder: PathBuf,
    },
    /// The folder may not be written.
    #[error("uds_path {path:?} cannot be created: let this user write to its folder, or choose another path")]
    Permission {
        /// The path.
        path: PathBuf,
        /// The kernel's refusal.
        source: io::Error,
    },
    /// Anything else about the path.
    #[error("uds_path {path:?} cannot be created")]
    Bind {
        /// The path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The host has no descriptor left, or the like.
    #[error("cannot {op}")]
    Host {
        /// What was tried.
        op: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// A listening socket. Its file goes with it, provided that it still is the one that was made.
#[derive(Debug)]
pub(super) struct Listener {
    socket: UnixListener,
    /// As the user wrote it: an address has few bytes, and a relative path may need fewer of them.
    path: PathBuf,
    /// What is removed in the end, even after a change of the working directory.
    file: PathBuf,
    device: u64,
    inode: u64,
}

impl Listener {
    /// Creates a socket at `path`. Whatever exists there, even a socket that nobody serves, is left alone.
    pub(super) fn bind(path: &Path) -> Result<Self, OpenError> {
        let failed = |source| bind_error(path, source);
        let socket = UnixListener::bind(path).map_err(failed)?;
        let file = std::path::absolute(path).map_err(failed)?;
        let metadata = fs::symlink_metadata(&file).map_err(failed)?;
        let listener = Self {
            socket,
            path: path.to_owned(),
            file,
            device: metadata.dev(),
            inode: metadata.ino(),
        };
        listener.socket.set_nonblocking(true).map_err(failed)?;
        Ok(listener)
    }

    /// The next program that waits; none when nobody does.
    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        loop {
            match self.socket.accept() {
                Ok((stream, _)) => return Ok(Some(stream)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                // Somebody who has left before it was served.
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::ConnectionAborted | ErrorKind::Interrupted
                    ) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Where the guest's connections to `port` go.
    pub(super) fn path_of(&self, port: u32) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        path.into()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let is_ours = fs::symlink_metadata(&self.file)
            .is_ok_and(|file| file.dev() == self.device && file.ino() == self.inode);
        if is_ours && let Err(error) = fs::remove_file(&self.file) {
            log::warn!("vsock: cannot remove the socket {:?}: {error}", self.file);
        }
    }
}

fn bind_error(path: &Path, source: io::Error) -> OpenError {
    let path = path.to_owned();
    match source.kind() {
        ErrorKind::AddrInUse => OpenError::InUse { path },
        ErrorKind::NotFound | ErrorKind::NotADirectory => {
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            let folder = parent.unwrap_or(Path::new(".")).to_owned();
            OpenError::NoFolder { path, folder }
        }
        ErrorKind::PermissionDenied => OpenError::Permission { path, source },
        _ => OpenError::Bind { path, source },
    }
}
