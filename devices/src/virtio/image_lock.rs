//! [`Lock`]: the right to use the file behind a drive or a pmem device, so that two machines cannot write one disk.
//!
//! These are locks of open files (`F_OFD_SETLK`): whoever writes has an image for itself, readers share it. The host
//! keeps them by inode, among all programs that ask for them, and they end with the last descriptor of the open file.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

/// Why an image is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else has it.
    #[error("the disk image '{path}' cannot be used {}", in_use(*exclusive, *holder))]
    InUse {
        /// The image.
        path: String,
        /// True when it was to be had alone, for writing.
        exclusive: bool,
        /// The process that has it, if that can be seen.
        holder: Option<u32>,
    },
    /// Anything else that the system refused.
    #[error("cannot {op} the disk image '{path}'")]
    Host {
        /// What was tried.
        op: &'static str,
        /// The image.
        path: String,
        /// Why not.
        source: io::Error,
    },
}

/// For what, why not, and what the user can do.
fn in_use(exclusive: bool, holder: Option<u32>) -> String {
    let who = match holder {
        Some(pid) if pid == std::process::id() => "another device of this machine has it".into(),
        Some(pid) => format!("process {pid} has it"),
        None => "another program has it, or another device of this machine".to_owned(),
    };
    match exclusive {
        true => format!(
            "for writing, as {who}: attach it with is_read_only (pmem: read_only) everywhere, or use a copy"
        ),
        false => {
            format!("for reading, as {who}: only images that nobody writes can be shared, so use a copy")
        }
    }
}

/// A lock on an image, held until the last clone is dropped.
#[derive(Debug, Clone)]
pub(super) struct Lock {
    held: Arc<Held>,
    /// What it was taken for: it may be held for more.
    exclusive: bool,
}

#[derive(Debug)]
struct Held {
    file: Arc<File>,
    exclusive: AtomicBool,
    identity: Identity,
}

/// Device and number of an inode.
type Identity = (u64, u64);

/// How often and after what time a lock is tried again that nobody seems to have: the kernel closes the files of a process
/// that was killed while requests of its were in flight a moment after its end.
const TRIES: u32 = 10;
const PAUSE: Duration = Duration::from_millis(20);

impl Lock {
    /// Locks the image that is open as `file`, for itself alone if `exclusive`. A lock of `held` on the same image that
    /// is as strong serves again, so that a drive can open anew what it has.
    pub(super) fn take(
        path: &str,
        file: &Arc<File>,
        exclusive: bool,
        held: &[Lock],
    ) -> Result<Self, LockError> {
        let refused = |op| {
            let path = path.to_owned();
            move |source| LockError::Host { op, path, source }
        };
        let metadata = file.metadata().map_err(refused("examine"))?;
        let identity = (metadata.dev(), metadata.ino());
        let serves = |held: &&Arc<Held>| held.identity == identity && held.is_exclusive() >= exclusive;
        if let Some(held) = held.iter().map(|lock| &lock.held).find(serves) {
            let held = Arc::clone(held);
            return Ok(Self { held, exclusive });
        }
        let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
        let mut tries = TRIES;
        while let Err(error) = set(file, kind) {
            match (error.kind(), error.raw_os_error()) {
                (ErrorKind::WouldBlock | ErrorKind::PermissionDenied, _) => {
                    let holder = owner(file, exclusive).or_else(|| holder(identity));
                    tries -= 1;
                    if holder.is_some() || tries == 0 {
                        let path = path.to_owned();
                        return Err(LockError::InUse {
                            path,
                            exclusive,
                            holder,
                        });
                    }
                    thread::sleep(PAUSE);
                }
                (_, Some(libc::ENOLCK | libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS)) => {
                    log::warn!(
                        "the file system of the disk image '{path}' has no locks ({error}): \
                         see to it that no other program writes the image"
                    );
                    break;
                }
                _ => return Err(refused("lock")(error)),
            }
        }
        let held = Held {
            file: Arc::clone(file),
            exclusive: exclusive.into(),
            identity,
        };
        Ok(Self {
            held: held.into(),
            exclusive,
        })
    }

    /// Lets others read the image if that is all that this lock is for, and nobody writes it by an older one any more.
    pub(super) fn share(&self) {
        if !self.exclusive && self.held.is_exclusive() {
            // Nothing can be in the way, and a file system without locks has none to be shared.
            let shared = set(&self.held.file, libc::F_RDLCK);
            self.held.exclusive.store(shared.is_err(), Ordering::Relaxed);
        }
    }

    /// True if one of `held` is for the same image.
    pub(super) fn is_among(&self, held: &[Lock]) -> bool {
        held.iter().any(|other| other.held.identity == self.held.identity)
    }
}

impl Held {
    fn is_exclusive(&self) -> bool {
        self.exclusive.load(Ordering::Relaxed)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // The kernel may keep the open file a little longer, for an io_uring. A lock that was never had needs no unlocking.
        let _ = set(&self.file, libc::F_UNLCK);
    }
}

fn set(file: &File, kind: libc::c_int) -> io::Result<()> {
    let request = whole_file(kind);
    // SAFETY: needed as std has no such locks. The kernel reads a structure that lives longer.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn whole_file(kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: libc::c_short::try_from(kind).expect("the types of locks are small"),
        l_whence: libc::c_short::try_from(libc::SEEK_SET).expect("it is zero"),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// The process that has a lock in the way, if it is one of processes: those of open files have no owner.
fn owner(file: &File, exclusive: bool) -> Option<u32> {
    let mut other = whole_file(if exclusive { libc::F_WRLCK } else { libc::F_RDLCK });
    // SAFETY: needed as std has no such locks. The kernel writes a structure that lives longer.
    let asked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut other) };
    let pid = u32::try_from(other.l_pid).ok();
    pid.filter(|pid| asked == 0 && *pid > 0)
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
