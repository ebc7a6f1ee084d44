//! What the VM sees of the file system. Runs in the new process, in a mount namespace that nobody else sees: when the
//! process ends, whenever that is, the mounts are gone.
//!
//! The root of the namespace is the jail's folder, read-only; the root of the process is the folder `root` in it, a mount of
//! its own. As these two differ, the kernel refuses the process new user namespaces (`current_chrooted()` in its source).

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::mount::{MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};

use crate::confine::as_user;
use crate::error::{Error, Result};
use crate::fsat::{self, Identity};
use crate::import::{Import, Kind};
use crate::jail::IMPORT_FOLDER;
use crate::plan::Plan;

const NOSUID: u64 = libc::MOUNT_ATTR_NOSUID;
const NODEV: u64 = libc::MOUNT_ATTR_NODEV;
const NOEXEC: u64 = libc::MOUNT_ATTR_NOEXEC;
const RDONLY: u64 = libc::MOUNT_ATTR_RDONLY;

/// Mounts everything and makes it the process's file system. `root` is the folder that the jailer has prepared.
pub fn enter(plan: &Plan, root: Identity) -> Result {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).map_err(Error::system("make the mounts private"))?;

    let path = plan.place.folder();
    let place = fsat::open_absolute(&path).map_err(fsat::refusal("open the folder", &path))?;
    let outer =
        tree(&place, c"", false, RDONLY | NOSUID | NODEV | NOEXEC, 0).map_err(Error::path("mount", &path))?;
    // What others mounted there, to have it in the jail, stays.
    let nodev = if plan.imports.is_some() { NODEV } else { 0 };
    let inner = tree(&place, c"root", true, NOSUID | NOEXEC | nodev, 0)
        .map_err(Error::path("mount", plan.place.root()))?;
    if fsat::identity_of(&inner).map_err(Error::path("examine", plan.place.root()))? != root {
        let reason = "it was replaced meanwhile";
        return Err(Error::Unsafe { path, reason });
    }
    attach(&outer, &place, c"").map_err(Error::path("mount", &path))?;
    attach(&inner, &outer, c"root").map_err(Error::path("mount", plan.place.root()))?;

    mount_devices(plan, &inner)?;
    mount_program(plan, &inner)?;
    for import in plan.imports.iter().flat_map(|imports| &imports.list) {
        if !import.is_copied(plan.copy) {
            mount_import(plan, import, &inner)?;
        }
    }
    pivot(&outer, &inner).map_err(Error::path("change the root to", plan.place.root()))
}

/// Makes the outer mount the namespace's root, and the inner one the process's.
fn pivot(outer: &OwnedFd, inner: &OwnedFd) -> io::Result<()> {
    rustix::process::fchdir(outer)?;
    // The old root comes to lie upon the new one, and is taken off.
    rustix::process::pivot_root(".", ".")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    rustix::process::fchdir(inner)?;
    rustix::process::chroot(".")?;
    Ok(rustix::process::chdir("/")?)
}

/// Mounts the program, or the copy of it over itself: the only thing that can be executed.
fn mount_program(plan: &Plan, root: &OwnedFd) -> Result {
    let program = &plan.place.program;
    let name = Path::new(&plan.place.name);
    let attributes = RDONLY | NOSUID | NODEV;
    let source = if plan.copy {
        fsat::open(root, name, OFlags::PATH, 0)
    } else {
        open_source(program)
    };
    let source = source.map_err(Error::path("open", program))?;
    let clear = if plan.copy { NOEXEC } else { 0 };
    bind(&source, root, name, (attributes, clear)).map_err(Error::path("mount", program))
}

/// Mounts the folder of devices over itself, where nothing can be added, and without root the host's devices.
fn mount_devices(plan: &Plan, root: &OwnedFd) -> Result {
    let path = plan.place.root().join("dev");
    // Root has made device nodes, which are to work on every file system.
    let clear = if plan.place.rootless { 0 } else { NODEV };
    let dev =
        tree(root, c"dev", false, RDONLY | NOSUID | NOEXEC, clear).map_err(Error::path("mount", &path))?;
    attach(&dev, root, c"dev").map_err(Error::path("mount", &path))?;
    for device in plan.devices.iter().filter(|_| plan.place.rootless) {
        let host = Path::new("/dev").join(device.path);
        let source = match open_source(&host) {
            Err(e) if e.kind() == io::ErrorKind::NotFound && !device.required => continue,
            other => other.map_err(Error::path("open", &host))?,
        };
        let number = rustix::fs::makedev(device.major, device.minor);
        let stat = rustix::fs::fstat(&source).map_err(|e| Error::path("examine", &host)(e.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice || stat.st_rdev != number {
            let reason = "it is not the device of this name";
            return Err(Error::Unsafe { path: host, reason });
        }
        bind(&source, &dev, Path::new(device.path), (NOSUID | NOEXEC, 0))
            .map_err(Error::path("mount", &host))?;
    }
    Ok(())
}

fn mount_import(plan: &Plan, import: &Import, root: &OwnedFd) -> Result {
    let path = &import.source;
    let source = as_user(plan, || open_import(import))?.map_err(fsat::source_refusal(path))?;
    let stat = rustix::fs::fstat(&source).map_err(|e| Error::path("examine", path)(e.into()))?;
    let folder = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
    if folder != (import.kind == Kind::Folder) {
        let reason = "a file is expected and not a folder, or the other way round";
        return Err(Error::Unsafe {
            path: path.clone(),
            reason,
        });
    }
    if folder && stat.st_mode & 0o002 != 0 {
        let reason = "everybody can write to it; give the VM's sockets a folder of their own";
        return Err(Error::Unsafe {
            path: path.clone(),
            reason,
        });
    }
    let read_only = if import.kind == Kind::ReadOnly { RDONLY } else { 0 };
    // A drive can be a disk of the host, and output go to /dev/null or a terminal.
    let nodev = match (FileType::from_raw_mode(stat.st_mode), import.kind) {
        (FileType::BlockDevice, _) | (FileType::CharacterDevice, Kind::Output) => 0,
        _ => NODEV,
    };
    let target = Path::new(IMPORT_FOLDER).join(&import.name);
    bind(&source, root, &target, (read_only | nodev | NOSUID | NOEXEC, 0)).map_err(Error::path("mount", path))
}

/// Opens what is to be imported. A file for output is made if it is missing.
fn open_import(import: &Import) -> io::Result<OwnedFd> {
    match open_source(&import.source) {
        Err(e) if e.kind() == io::ErrorKind::NotFound && import.kind == Kind::Output => {
            let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            rustix::fs::open(&import.source, flags, Mode::from_raw_mode(0o600))?;
            open_source(&import.source)
        }
        other => other,
    }
}

fn open_source(path: &Path) -> io::Result<OwnedFd> {
    fsat::open_source(path, OFlags::PATH)
}

/// Mounts an open file or folder at a path below a mount. The mount has the attributes of its source, but that the first
/// ones are set and the second ones cleared.
fn bind(source: &OwnedFd, root: &OwnedFd, target: &Path, (set, clear): (u64, u64)) -> io::Result<()> {
    let tree = tree(source, c"", false, set, clear)?;
    let target = fsat::open(root, target, OFlags::PATH, 0)?;
    attach(&tree, &target, c"")
}

/// A new mount of a folder or file, not yet attached anywhere, with attributes set and cleared.
fn tree(folder: impl AsFd, path: &CStr, recursive: bool, set: u64, clear: u64) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags |= OpenTreeFlags::AT_SYMLINK_NOFOLLOW | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = rustix::mount::open_tree(folder, path, flags)?;
    set_attributes(&tree, recursive, set, clear)?;
    Ok(tree)
}

fn set_attributes(tree: &OwnedFd, recursive: bool, set: u64, clear: u64) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: set,
        attr_clr: clear,
        propagation: 0,
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: needed because no wrapper has this call. The path ends with zero, and the structure is alive and as long as
    // said.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Attaches a mount to a path below an open folder, or to what is open itself.
fn attach(tree: &OwnedFd, folder: impl AsFd, path: &CStr) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(rustix::mount::move_mount(tree, c"", folder, path, flags)?)
}
