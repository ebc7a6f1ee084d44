//! [`Lock`]: the right to use an image, so that two machines cannot write one disk.
//!
//! These are locks of open files (`F_OFD_SETLK`): whoever writes has an image for itself, readers share it. The host
//! keeps them by inode, among all programs that ask for them, and they end with the last descriptor of the open file.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use super::OpenError;

/// A lock on an image, held until the last clone is dropped, and with it the open file.
#[derive(Debug, Clone)]
pub(super) struct Lock {
    /// Keeps the lock; another file may be in use for the data.
    _file: Arc<File>,
    exclusive: bool,
    identity: Identity,
}

/// Device and number of an inode.
type Identity = (u64, u64);

impl Lock {
    /// Locks the image that is open as `file`, for itself alone if `exclusive`. A lock of `held` on the same image that
    /// is as strong serves again, so that a drive can open anew what it has.
    pub(super) fn take(
        path: &str,
        file: &Arc<File>,
        exclusive: bool,
        held: &[Lock],
    ) -> Result<Self, OpenError> {
        let refused = |op| {
            let path = path.to_owned();
            move |source| OpenError::Host { op, path, source }
        };
        let metadata = file.metadata().map_err(refused("examine"))?;
        let identity = (metadata.dev(), metadata.ino());
        let serves = |held: &&Lock| held.identity == identity && held.exclusive >= exclusive;
        if let Some(held) = held.iter().find(serves) {
            return Ok(held.clone());
        }
        let mut request = whole_file(exclusive);
        // SAFETY: needed as std has no such locks. The kernel reads a structure that lives longer.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &mut request) } != 0 {
            let error = io::Error::last_os_error();
            match (error.kind(), error.raw_os_error()) {
                (ErrorKind::WouldBlock | ErrorKind::PermissionDenied, _) => {
                    return Err(in_use(path, file, exclusive, identity));
                }
                (_, Some(libc::ENOLCK | libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS)) => log::warn!(
                    "the file system of the disk image '{path}' has no locks ({error}): \
                     see to it that no other program writes the image"
                ),
                _ => return Err(refused("lock")(error)),
            }
        }
        Ok(Self {
            _file: Arc::clone(file),
            exclusive,
            identity,
        })
    }
}

fn whole_file(exclusive: bool) -> libc::flock {
    let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
    libc::flock {
        l_type: libc::c_short::try_from(kind).expect("the types of locks are small"),
        l_whence: libc::c_short::try_from(libc::SEEK_SET).expect("it is zero"),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

fn in_use(path: &str, file: &File, exclusive: bool, identity: Identity) -> OpenError {
    let mut other = whole_file(exclusive);
    // SAFETY: needed as std has no such locks. The kernel writes a structure that lives longer.
    let asked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut other) };
    // Locks of processes have an owner, those of open files do not.
    let owner = u32::try_from(other.l_pid)
        .ok()
        .filter(|pid| asked == 0 && *pid > 0);
    OpenError::InUse {
        path: path.to_owned(),
        exclusive,
        holder: owner.or_else(|| holder(identity)),
    }
}

/// The process that has the image locked through an open file, as far as this one may see that: `fdinfo` tells the locks
/// of each descriptor.
fn holder(identity: Identity) -> Option<u32> {
    let holds = |pid: u32, descriptor: &str| {
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{descriptor}")).unwrap_or_default();
        info.lines().any(|line| line.starts_with("lock:"))
            && fs::metadata(format!("/proc/{pid}/fd/{descriptor}"))
                .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == identity)
    };
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.find(|pid: &u32| {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten();
        descriptors
            .flatten()
            .any(|entry| entry.file_name().to_str().is_some_and(|name| holds(*pid, name)))
    })
}
