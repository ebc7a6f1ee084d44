//! Landlock: a machine that takes no requests opens no file after its start, so its control thread gives that up.
//!
//! The other threads have lost it before, by their system call filters. With an API any request may name a file, and
//! nothing is given up here.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

/// `LANDLOCK_CREATE_RULESET_VERSION`.
const ASK_VERSION: u32 = 1;

/// `LANDLOCK_ACCESS_FS_REMOVE_FILE`: the monitor's sockets go with it.
const REMOVE_FILE: u64 = 1 << 5;

/// `LANDLOCK_ACCESS_NET_*`: bind and connect TCP sockets.
const NETWORK: u64 = 1 << 0 | 1 << 1;
/// `LANDLOCK_SCOPE_*`: abstract unix sockets and signals stay inside.
const SCOPES: u64 = 1 << 0 | 1 << 1;

/// `struct landlock_ruleset_attr`; older kernels know the first fields only.
#[repr(C)]
struct Ruleset {
    files: u64,
    network: u64,
    scopes: u64,
}

/// All of `LANDLOCK_ACCESS_FS_*` that this version knows, but for removing files: to open, execute, make and move them,
/// and all that can be done to folders.
fn files(version: i64) -> u64 {
    let count = match version {
        ..=1 => 13,
        2 => 14,
        3..=4 => 15,
        5.. => 16,
    };
    ((1 << count) - 1) & !REMOVE_FILE
}

/// Gives up files, TCP, and the signals and abstract sockets of others, as far as this kernel can, for this thread and
/// those that it starts. What is open stays open. False when the kernel has no Landlock.
/// Needs [`crate::seccomp::give_up_new_privileges`] before, or root.
pub fn restrict() -> io::Result<bool> {
    let Some(version) = version()? else {
        return Ok(false);
    };
    let ruleset = Ruleset {
        files: files(version),
        network: NETWORK,
        scopes: SCOPES,
    };
    let known = match version {
        ..=3 => size_of::<u64>(),
        4..=5 => 2 * size_of::<u64>(),
        6.. => size_of::<Ruleset>(),
    };
    // SAFETY: needed because the standard library knows no Landlock. The kernel reads `known` bytes of a live value that
    // has at least as many, and gives a new descriptor or an error.
    let ruleset = unsafe {
        let fd = libc::syscall(
            libc::SYS_landlock_create_ruleset,
            ptr::from_ref(&ruleset),
            known,
            0,
        );
        OwnedFd::from_raw_fd(i32::try_from(checked(fd)?).map_err(io::Error::other)?)
    };
    // SAFETY: needed for the same reason. The call takes a descriptor and a number.
    checked(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) })?;
    Ok(true)
}

/// The version of the kernel's Landlock, if it has it and it is turned on.
fn version() -> io::Result<Option<i64>> {
    // SAFETY: needed because the standard library knows no Landlock. With this flag no pointer is read.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            ptr::null::<Ruleset>(),
            0,
            ASK_VERSION,
        )
    };
    match checked(version) {
        Ok(version) => Ok(Some(version)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EOPNOTSUPP)) => Ok(None),
        Err(error) => Err(error),
    }
}

fn checked(result: libc::c_long) -> io::Result<i64> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::fs::symlink;
    use std::process::Command;
    use std::thread;

    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    /// Does it in a thread of its own, which alone is restricted.
    fn restricted<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let thread = thread::spawn(|| {
            crate::seccomp::give_up_new_privileges().unwrap();
            restrict().unwrap().then(work)
        });
        thread.join().unwrap()
    }

    fn is_denied<T>(result: io::Result<T>) -> bool {
        result.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
    }

    #[test]
    fn no_file_can_be_opened_any_more_and_open_ones_stay() {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().to_owned();
        fs::write(path.join("there"), "text").unwrap();
        let mut open = File::create(path.join("open")).unwrap();
        let inside = path.clone();
        let denied = restricted(move || {
            open.write_all(b"more").unwrap();
            fs::remove_file(inside.join("open")).unwrap();
            [
                is_denied(File::open(inside.join("there"))),
                is_denied(File::create(inside.join("new"))),
                is_denied(fs::read_dir(&inside)),
                is_denied(fs::create_dir(inside.join("folder"))),
                is_denied(symlink("/", inside.join("link"))),
                is_denied(Command::new("/bin/true").status()),
            ]
        });
        // The same is possible for who is not restricted.
        assert_eq!(fs::read(path.join("there")).unwrap(), b"text");
        assert!(Command::new("/bin/true").status().unwrap().success());
        let expected = version().unwrap().map(|_| [true; 6]);
        assert_eq!(denied, expected);
    }

    #[test]
    fn asks_each_kernel_for_what_it_knows() {
        assert_eq!(
            [1, 2, 3, 5, 9].map(files),
            [0x1fdf, 0x3fdf, 0x7fdf, 0xffdf, 0xffdf]
        );
    }

    #[test]
    fn tcp_is_out_of_reach_where_the_kernel_can_forbid_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let denied = restricted(move || {
            (
                is_denied(TcpStream::connect(address)),
                is_denied(TcpListener::bind("127.0.0.1:0")),
            )
        });
        let forbids = |version: i64| version >= 4;
        let expected = version()
            .unwrap()
            .map(|version| (forbids(version), forbids(version)));
        assert_eq!(denied, expected);
        TcpStream::connect(address).unwrap();
    }
}
