//! The files of a jail, as the host sees them: `<base>/<program>/<id>/root` and what is in it. Everything that is there
//! already is taken over if it is what it must be, and else refused, so that any number of tries give the same jail.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Uid};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::confine::as_user;
use crate::error::{Error, Result};
use crate::fsat::{self, Folder};
use crate::import::{Import, Kind};
use crate::plan::{Device, Place, Plan, User};
use crate::record::Record;
use crate::subids::Namespace;

/// A jail's folders, open and locked.
#[derive(Debug)]
pub struct Jail {
    /// Has the jails of one program.
    pub parent: Folder,
    /// Has the root and the record.
    pub folder: Folder,
    /// The root.
    pub root: Folder,
    /// The record, locked.
    pub record: Record,
    /// True if the root was not there before.
    pub fresh: bool,
}

/// The root of the VM, in the jail's folder.
pub const ROOT: &str = "root";
/// What stands for imports, in the root.
pub const IMPORT_FOLDER: &str = "import";
/// The config with the paths of the jail.
pub const CONFIG: &str = "config.json";

impl Jail {
    /// Makes the folders, and locks the jail. Who has the jail's files can be known only outside of `namespace`, and what
    /// belongs to the VM's user be touched only inside.
    pub fn enter(place: &Place, user: User, namespace: Option<Namespace>) -> Result<Self> {
        let base = Folder {
            fd: fsat::make_absolute(&place.base)?,
            path: place.base.clone(),
        };
        let parent = base.shared_folder(&place.name)?;
        let folder = parent.shared_folder(&place.id)?;
        let (record, before) = Record::lock(&folder, &place.id)?;
        let known = |stat: &Stat| [user, User::own()].iter().any(|user| user.uid == stat.st_uid);
        if place.rootless && !before.as_ref().is_none_or(known) {
            let reason = "it belongs to another user's VM; remove it by --cleanup first";
            let path = place.root();
            return Err(Error::Unsafe { path, reason });
        }
        namespace.map_or(Ok(()), Namespace::enter)?;
        Ok(Self {
            root: folder.folder(ROOT, 0o700, Some(user))?,
            fresh: before.is_none(),
            parent,
            folder,
            record,
        })
    }

    /// Fills the root with what the plan says.
    pub fn fill(&self, plan: &Plan) -> Result {
        let owner = Some(plan.user);
        let program = self.root.file(&plan.place.name, 0o755, owner)?;
        if plan.copy {
            let source = File::open(&plan.place.program);
            let source = source.map_err(Error::path("open", &plan.place.program))?;
            copy(source, &program, &self.root.path.join(&plan.place.name))?;
        }
        let dev = self.root.folder("dev", 0o700, owner)?;
        let net = dev.folder("net", 0o700, owner)?;
        let run = self.root.folder("run", 0o700, owner)?;
        if !self.fresh {
            remove_dead_sockets(&run)?;
        }
        for device in &plan.devices {
            let (folder, name) = match device.path.split_once('/') {
                Some((_, name)) => (&net, name),
                None => (&dev, device.path),
            };
            match make_device(folder, name, device, plan) {
                Err(error) if !device.required => {
                    eprintln!("mayfly-jailer: warning: {error}");
                }
                other => other?,
            }
        }
        let Some(imports) = &plan.imports else {
            return Ok(());
        };
        let folder = self.root.folder(IMPORT_FOLDER, 0o700, owner)?;
        for import in &imports.list {
            stand_in(&folder, import, plan)?;
        }
        let mut config = self.root.file(CONFIG, 0o600, owner)?;
        let text = imports.config.to_string();
        let written = config.set_len(0).and_then(|()| config.write_all(text.as_bytes()));
        written.map_err(Error::path("write", self.root.path.join(CONFIG)))
    }

    /// The name of the file with the process id.
    fn pid_file(name: &OsStr) -> OsString {
        let mut file = name.to_owned();
        file.push(".pid");
        file
    }

    /// Writes the process id to where tooling looks for it.
    pub fn write_pid(&self, name: &OsStr, pid: i32) -> Result {
        let file = Self::pid_file(name);
        let path = self.root.path.join(&file);
        // That of an earlier start.
        self.root.remove(&file)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        let opened = fsat::open(&self.root.fd, Path::new(&file), flags, 0o644);
        let written = opened.and_then(|fd| File::from(fd).write_all(pid.to_string().as_bytes()));
        written.map_err(Error::path("write", &path))
    }

    /// Forgets a process that did not become the VM.
    pub fn forget_pid(&mut self, name: &OsStr) -> Result {
        self.root.remove(Self::pid_file(name))?;
        self.record.set_cgroups(std::iter::empty())
    }
}

/// Removes the sockets of an earlier VM, which would be in the way of the next one's. Nobody listens to them; those that
/// somebody has put there for the VM stay.
fn remove_dead_sockets(folder: &Folder) -> Result {
    let failed = |e: Errno| Error::path("read", &folder.path)(e.into());
    for entry in Dir::read_from(&folder.fd).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if entry.file_type() == FileType::Socket && is_dead_socket(folder, name) {
            folder.remove(name)?;
        }
    }
    Ok(())
}

/// True for a socket that nobody listens to. What has come into its place meanwhile is not called.
fn is_dead_socket(folder: &Folder, name: &OsStr) -> bool {
    let Ok(file) = fsat::open(&folder.fd, name, OFlags::PATH, 0) else {
        return false;
    };
    let is_socket = |stat: Stat| FileType::from_raw_mode(stat.st_mode) == FileType::Socket;
    if !rustix::fs::fstat(&file).is_ok_and(is_socket) {
        return false;
    }
    let Ok(address) = SocketAddrUnix::new(format!("/proc/self/fd/{}", file.as_raw_fd())) else {
        return false;
    };
    // One whose queue of connections is full lives; it is not waited for.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let own = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    own.and_then(|own| rustix::net::connect(&own, &address)) == Err(Errno::CONNREFUSED)
}

/// Makes a device node; without root, a file that the host's node is mounted over.
fn make_device(folder: &Folder, name: &str, device: &Device, plan: &Plan) -> Result {
    if plan.place.rootless {
        return folder.file(name, 0o600, None).map(drop);
    }
    let path = folder.path.join(name);
    let number = rustix::fs::makedev(device.major, device.minor);
    let mode = Mode::from_raw_mode(0o600);
    match rustix::fs::mknodat(&folder.fd, name, FileType::CharacterDevice, mode, number) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(Error::path("create the device", &path)(e.into())),
    }
    let node = fsat::open(&folder.fd, name, OFlags::PATH, 0).map_err(fsat::refusal("open", &path))?;
    let stat = rustix::fs::fstat(&node).map_err(|e| Error::path("examine", &path)(e.into()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice || stat.st_rdev != number {
        let reason = "it must be the device of this name, or missing";
        return Err(Error::Unsafe { path, reason });
    }
    if stat.st_nlink > 1 {
        return Err(Error::HardLink(path));
    }
    let (uid, gid) = (Uid::from_raw(plan.user.uid), Gid::from_raw(plan.user.gid));
    rustix::fs::chownat(&node, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)
        .map_err(|e| Error::path("change the owner of", &path)(e.into()))
}

/// Makes what an import is mounted over, or the copy.
fn stand_in(folder: &Folder, import: &Import, plan: &Plan) -> Result {
    let owner = Some(plan.user);
    if import.kind == Kind::Folder {
        return folder.folder(&import.name, 0o700, owner).map(drop);
    }
    let file = folder.file(&import.name, 0o600, owner)?;
    if import.is_copied(plan.copy) {
        copy(
            open_for_copy(import, plan)?,
            &file,
            &folder.path.join(&import.name),
        )?;
    }
    Ok(())
}

/// Opens what is to be copied, with the rights of the VM's user.
fn open_for_copy(import: &Import, plan: &Plan) -> Result<File> {
    let path = &import.source;
    // A pipe without a writer would keep the jailer waiting.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK;
    let file = as_user(plan, || fsat::open_source(path, flags))?.map_err(fsat::source_refusal(path))?;
    let file = File::from(file);
    match file.metadata().map_err(Error::path("examine", path))?.is_file() {
        true => Ok(file),
        false => Err(Error::Unsafe {
            path: path.clone(),
            reason: "only regular files can be copied; leave --copy out",
        }),
    }
}

/// Copies a file; on file systems that can, it shares the blocks.
fn copy(mut from: File, mut to: &File, path: &Path) -> Result {
    let failed = |source: io::Error| Error::path("write", path)(source);
    to.set_len(0).map_err(failed)?;
    if rustix::fs::ioctl_ficlone(to.as_fd(), from.as_fd()).is_ok() {
        return Ok(());
    }
    io::copy(&mut from, &mut to).map(drop).map_err(failed)
}
