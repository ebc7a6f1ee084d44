//! Files and folders reached from an open folder, never through a symbolic link: what a hostile process has put into a
//! jail's folder cannot lead the jailer out of it, also not by changing it meanwhile.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Uid};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::plan::User;

/// Takes nothing away from the modes that files and folders are made with here.
pub const UMASK: u32 = 0o022;

/// Which file it is, whatever its name.
pub type Identity = (u64, u64);

/// Which file it is.
pub fn identity(stat: &Stat) -> Identity {
    (stat.st_dev, stat.st_ino)
}

/// Which file an open one is.
pub fn identity_of(file: impl AsFd) -> io::Result<Identity> {
    Ok(identity(&rustix::fs::fstat(file)?))
}

/// Opens something below a folder.
pub fn open(folder: impl AsFd, path: impl AsRef<Path>, flags: OFlags, mode: u32) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    open_resolving(folder, path.as_ref(), flags, mode, resolve)
}

fn open_resolving(
    folder: impl AsFd,
    path: &Path,
    flags: OFlags,
    mode: u32,
    resolve: ResolveFlags,
) -> io::Result<OwnedFd> {
    let flags = flags | OFlags::NOFOLLOW;
    let mode = if flags.contains(OFlags::CREATE) { mode } else { 0 };
    resolved(folder, path, flags, mode, resolve)
}

fn resolved(
    folder: impl AsFd,
    path: &Path,
    flags: OFlags,
    mode: u32,
    resolve: ResolveFlags,
) -> io::Result<OwnedFd> {
    let flags = flags | OFlags::CLOEXEC;
    // The kernel asks for another try when something was renamed meanwhile.
    loop {
        match rustix::fs::openat2(&folder, path, flags, Mode::from_raw_mode(mode), resolve) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

/// Opens something of the host that the jail is to have. Symbolic links are followed, but for those of `/proc`, which lead
/// to what this process has open.
pub fn open_source(path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    resolved(CWD, path, flags, 0, ResolveFlags::NO_MAGICLINKS)
}

/// Opens a folder by its absolute path, no part of which may be a symbolic link.
pub fn open_absolute(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    open_resolving(CWD, path, flags, 0, ResolveFlags::NO_SYMLINKS)
}

/// Opens a folder by its absolute path, and makes it and those above it where they are missing.
pub fn make_absolute(path: &Path) -> Result<OwnedFd> {
    match open_absolute(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        other => return other.map_err(refusal("open the folder", path)),
    }
    let mut at = PathBuf::from("/");
    let mut folder = open_absolute(&at).map_err(Error::path("open the folder", &at))?;
    for part in path.components() {
        let name = match part {
            Component::Normal(name) => name,
            Component::RootDir | Component::CurDir => continue,
            Component::ParentDir | Component::Prefix(_) => {
                let reason = "it must not contain '..'";
                return Err(Error::Unsafe {
                    path: path.into(),
                    reason,
                });
            }
        };
        let above = Folder {
            fd: folder,
            path: at.clone(),
        };
        folder = above.shared_folder(name)?.fd;
        at.push(name);
    }
    Ok(folder)
}

/// Makes a folder; false if it is there already.
fn make(folder: impl AsFd, name: &OsStr, mode: u32) -> io::Result<bool> {
    match rustix::fs::mkdirat(folder, name, Mode::from_raw_mode(mode)) {
        Ok(()) => Ok(true),
        Err(Errno::EXIST) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// An error with a path; it says so when the path, or what it leads over, is a symbolic link.
pub fn refusal<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + 'a {
    move |source| match source.raw_os_error() {
        Some(libc::ELOOP) => Error::Unsafe {
            path: path.into(),
            reason: "it is, or leads over, a symbolic link; give the path without symbolic links",
        },
        Some(libc::ENOTDIR) => Error::Unsafe {
            path: path.into(),
            reason: "it is, or leads over, something that is neither a folder nor missing",
        },
        _ => Error::path(doing, path)(source),
    }
}

/// An error with the path of something that was to be opened with the rights of the VM's user.
pub fn source_refusal<'a>(path: &'a Path) -> impl FnOnce(io::Error) -> Error + 'a {
    move |source| match source.raw_os_error() {
        Some(libc::ELOOP) => Error::Unsafe {
            path: path.into(),
            reason: "it leads over a link of /proc, or over too many symbolic links",
        },
        _ => Error::path("open, as the user of the VM,", path)(source),
    }
}

/// A path in one of the kernel's lists of mounts, where blanks and the like are octal numbers.
pub fn listed_path(field: &[u8]) -> PathBuf {
    let octal = |digits: &[u8]| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok();
    let mut path = Vec::new();
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        match (byte, after.get(..3).and_then(octal)) {
            (b'\\', Some(value)) => (path.push(value), rest = &after[3..]).1,
            _ => (path.push(byte), rest = after).1,
        }
    }
    OsString::from_vec(path).into()
}

/// An open folder that jails are made in, with its path for messages.
#[derive(Debug)]
pub struct Folder {
    /// The folder itself.
    pub fd: OwnedFd,
    /// How messages call it.
    pub path: PathBuf,
}

impl Folder {
    /// Makes a folder in this one with exactly this mode and owner, or gives these to the one that is there.
    pub fn folder(&self, name: impl AsRef<OsStr>, mode: u32, owner: Option<User>) -> Result<Self> {
        let path = self.path.join(name.as_ref());
        let made = make(&self.fd, name.as_ref(), mode).map_err(Error::path("create the folder", &path))?;
        let folder = self.open_folder(name)?;
        give(&folder.fd, &path, owner)?;
        if !made {
            set_mode(&folder.fd, &path, mode)?;
        }
        Ok(folder)
    }

    /// Makes a folder that everybody may look into; one that is there stays as it is.
    pub fn shared_folder(&self, name: impl AsRef<OsStr>) -> Result<Self> {
        const MODE: u32 = 0o755;
        let path = self.path.join(name.as_ref());
        make(&self.fd, name.as_ref(), MODE).map_err(Error::path("create the folder", &path))?;
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let fd =
            open(&self.fd, Path::new(name.as_ref()), flags, 0).map_err(refusal("open the folder", &path))?;
        Ok(Self { fd, path })
    }

    /// Opens a folder that is there.
    pub fn open_folder(&self, name: impl AsRef<OsStr>) -> Result<Self> {
        let path = self.path.join(name.as_ref());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let fd =
            open(&self.fd, Path::new(name.as_ref()), flags, 0).map_err(refusal("open the folder", &path))?;
        Ok(Self { fd, path })
    }

    /// Makes an empty file in this folder, or takes the one that is there, with exactly this mode and owner. It must be a
    /// file with no other name.
    pub fn file(&self, name: impl AsRef<OsStr>, mode: u32, owner: Option<User>) -> Result<File> {
        let path = self.path.join(name.as_ref());
        let open = |more| {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NONBLOCK | more;
            open(&self.fd, name.as_ref(), flags, mode)
        };
        match open(OFlags::EXCL) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            other => {
                let file = other.map_err(refusal("create", &path))?;
                give(&file, &path, owner)?;
                return Ok(file.into());
            }
        }
        let file = open(OFlags::empty()).map_err(refusal("create", &path))?;
        let stat = rustix::fs::fstat(&file).map_err(|e| Error::path("examine", &path)(e.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            let reason = "it is no regular file";
            return Err(Error::Unsafe { path, reason });
        }
        if stat.st_nlink > 1 {
            return Err(Error::HardLink(path));
        }
        give(&file, &path, owner)?;
        set_mode(&file, &path, mode)?;
        Ok(file.into())
    }

    /// What is there under this name, if anything.
    pub fn stat(&self, name: impl AsRef<OsStr>) -> Result<Option<Stat>> {
        match rustix::fs::statat(&self.fd, name.as_ref(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(Error::path("examine", self.path.join(name.as_ref()))(e.into())),
        }
    }

    /// Removes the file of this name, if there is one.
    pub fn remove(&self, name: impl AsRef<OsStr>) -> Result {
        match rustix::fs::unlinkat(&self.fd, name.as_ref(), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(Error::path("remove", self.path.join(name.as_ref()))(e.into())),
        }
    }
}

/// Gives an open file this owner.
fn give(file: impl AsFd, path: &Path, owner: Option<User>) -> Result {
    let Some(User { uid, gid }) = owner else {
        return Ok(());
    };
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    let failed = |e: Errno| Error::path("change the owner of", path)(e.into());
    rustix::fs::fchown(&file, Some(uid), Some(gid)).map_err(failed)
}

/// Gives an open file exactly this mode.
fn set_mode(file: impl AsFd, path: &Path, mode: u32) -> Result {
    let failed = |e: Errno| Error::path("change the mode of", path)(e.into());
    rustix::fs::fchmod(&file, Mode::from_raw_mode(mode)).map_err(failed)
}
