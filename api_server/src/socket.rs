//! The socket file: created without touching anybody else's, removed by whoever created it.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use crate::error::ServerError;

/// `sun_path` of unix(7) has 108 bytes, one of them for the final zero.
const MAX_PATH: usize = 107;

/// Removes a socket file when dropped, provided that it still is the file that [`SocketFile::bind`] made.
///
/// [`Server::bind`](crate::Server::bind) keeps one inside the server. A process that may exit while the
/// server's thread is still running holds its own and gives the listener to
/// [`Server::from_listener`](crate::Server::from_listener).
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    /// Creates a socket at `path` and listens on it.
    ///
    /// # Errors
    /// Whatever exists at `path`, even a socket that nobody serves, is left alone and is
    /// [`ServerError::PathInUse`]. Also every other variant but `EventLoop`.
    pub fn bind(path: &Path) -> Result<(UnixListener, Self), ServerError> {
        check_path(path)?;
        let listener = UnixListener::bind(path).map_err(|source| bind_error(path, source))?;
        // Absolute, so that the file is found again after a change of the working directory.
        let file = std::path::absolute(path)
            .and_then(|path| fs::symlink_metadata(&path).map(|metadata| (path, metadata)))
            .map(|(path, metadata)| Self {
                path,
                device: metadata.dev(),
                inode: metadata.ino(),
            });
        match file {
            Ok(file) => Ok((listener, file)),
            Err(source) => Err(bind_error(path, source)),
        }
    }

    /// The absolute path of the socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the file now. Calling it again, or after somebody else removed or replaced the file, does
    /// nothing.
    pub fn remove(&self) {
        let is_ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| metadata.dev() == self.device && metadata.ino() == self.inode);
        if is_ours && let Err(error) = fs::remove_file(&self.path) {
            log::warn!("Cannot remove API socket {:?}: {error}", self.path);
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        self.remove();
    }
}

fn check_path(path: &Path) -> Result<(), ServerError> {
    let bytes = path.as_os_str().as_bytes();
    // An empty path would bind a nameless socket in the abstract name space.
    if bytes.is_empty() || bytes.contains(&0) {
        return Err(ServerError::PathInvalid {
            path: path.to_owned(),
        });
    }
    if bytes.len() > MAX_PATH {
        return Err(ServerError::PathTooLong {
            path: path.to_owned(),
            length: bytes.len(),
            max: MAX_PATH,
        });
    }
    Ok(())
}

fn bind_error(path: &Path, source: io::Error) -> ServerError {
    let path = path.to_owned();
    match source.kind() {
        ErrorKind::AddrInUse => ServerError::PathInUse { path },
        ErrorKind::NotFound | ErrorKind::NotADirectory => {
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            let directory = parent.unwrap_or(Path::new(".")).to_owned();
            ServerError::NoDirectory { path, directory }
        }
        ErrorKind::PermissionDenied => ServerError::Permission { path, source },
        _ => ServerError::Bind { path, source },
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    fn directory() -> TempDir {
        TempDir::new().unwrap()
    }

    #[test]
    fn file_lives_as_long_as_its_guard() {
        let directory = directory();
        let path = directory.as_path().join("api.socket");
        let (_listener, file) = SocketFile::bind(&path).unwrap();
        assert!(UnixStream::connect(&path).is_ok());

        drop(file);

        assert!(!path.exists());
    }

    #[test]
    fn file_of_somebody_else_survives_the_guard() {
        let directory = directory();
        let path = directory.as_path().join("api.socket");
        let (_listener, file) = SocketFile::bind(&path).unwrap();
        fs::rename(&path, directory.as_path().join("moved")).unwrap();
        fs::write(&path, "precious").unwrap();

        drop(file);

        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn refuses_a_path_in_use_and_leaves_it_alone() {
        let directory = directory();
        let path = directory.as_path().join("api.socket");
        let (listener, _file) = SocketFile::bind(&path).unwrap();
        drop(listener);

        let error = SocketFile::bind(&path).unwrap_err();

        assert!(matches!(error, ServerError::PathInUse { .. }), "{error}");
        assert!(error.to_string().contains("in use"));
        assert!(path.exists());
    }

    #[test]
    fn refuses_a_path_longer_than_the_kernel_takes() {
        let path = Path::new("/tmp").join("x".repeat(103));

        let error = SocketFile::bind(&path).unwrap_err();

        assert!(
            matches!(
                error,
                ServerError::PathTooLong {
                    length: 108,
                    max: 107,
                    ..
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn takes_the_longest_path_that_the_kernel_takes() {
        let directory = directory();
        let length = MAX_PATH - directory.as_path().as_os_str().len() - 1;
        let path = directory.as_path().join("x".repeat(length));

        assert!(SocketFile::bind(&path).is_ok());
    }

    #[test]
    fn refuses_an_empty_path() {
        let error = SocketFile::bind(Path::new("")).unwrap_err();

        assert!(matches!(error, ServerError::PathInvalid { .. }), "{error}");
    }

    #[test]
    fn names_the_directory_that_is_missing() {
        let directory = directory();
        let missing = directory.as_path().join("missing");

        let error = SocketFile::bind(&missing.join("api.socket")).unwrap_err();

        assert!(
            matches!(&error, ServerError::NoDirectory { directory, .. } if *directory == missing),
            "{error}"
        );
    }

    #[test]
    fn names_a_file_in_place_of_the_directory() {
        let directory = directory();
        let file = directory.as_path().join("file");
        fs::write(&file, "").unwrap();

        let error = SocketFile::bind(&file.join("api.socket")).unwrap_err();

        assert!(
            matches!(&error, ServerError::NoDirectory { directory, .. } if *directory == file),
            "{error}"
        );
    }

    #[test]
    fn says_that_permission_is_missing() {
        let error = bind_error(Path::new("/x"), ErrorKind::PermissionDenied.into());

        assert!(matches!(error, ServerError::Permission { .. }), "{error}");
    }
}
