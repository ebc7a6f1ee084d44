//! Removing a jail that nobody uses any more.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Dir, OFlags};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use crate::error::{Error, Result};
use crate::fsat::{self, Folder};
use crate::jail::ROOT;
use crate::plan::{Place, User};
use crate::record::Record;
use crate::subids::Namespace;

/// Removes the jail of a VM. Refuses if it is in use.
pub fn run(place: &Place) -> Result {
    let missing = || Error::NoJail {
        id: place.id.clone(),
        path: place.base.join(&place.name),
    };
    let path = place.base.join(&place.name);
    let fd = match fsat::open_absolute(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(missing()),
        other => other.map_err(fsat::refusal("open the folder", &path))?,
    };
    let parent = Folder { fd, path };
    if parent.stat(&place.id)?.is_none() {
        return Err(missing());
    }
    let folder = parent.open_folder(&place.id)?;
    let (record, _) = Record::lock(&folder, &place.id)?;
    if let Some(vm) = subordinate_owner(place, &folder)? {
        Namespace::make(User::own(), vm)?.enter()?;
    }
    remove(place, parent, folder, record)
}

/// Whose the jail is, if it is neither root's to remove nor this user's.
fn subordinate_owner(place: &Place, folder: &Folder) -> Result<Option<User>> {
    if !place.rootless {
        return Ok(None);
    }
    for name in waiting(folder)? {
        let stat = folder.stat(name)?;
        let owner = stat.map(|stat| User {
            uid: stat.st_uid,
            gid: stat.st_gid,
        });
        if owner.is_some_and(|owner| owner.uid != User::own().uid) {
            return Ok(owner);
        }
    }
    Ok(None)
}

/// Removes everything that the record and the folder of a jail have.
pub fn remove(place: &Place, parent: Folder, folder: Folder, record: Record) -> Result {
    for group in &record.cgroups {
        remove_group(group).map_err(Error::path("remove the cgroup", group))?;
    }
    unmount_below(&folder)?;
    empty(&folder)?;
    // Last, as it is the lock.
    folder.remove(crate::record::NAME)?;
    drop(record);
    remove_folder(&parent, place.id.as_ref())
}

/// Removes a cgroup. A process that has just been killed is in it for a moment longer.
fn remove_group(group: &Path) -> io::Result<()> {
    const PATIENCE: Duration = Duration::from_secs(2);
    const PAUSE: Duration = Duration::from_millis(5);
    let begin = Instant::now();
    loop {
        match fs::remove_dir(group) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy && begin.elapsed() < PATIENCE => {}
            other => return other,
        }
        std::thread::sleep(PAUSE);
    }
}

/// The folders in a jail's folder; the root is the last.
fn waiting(folder: &Folder) -> Result<VecDeque<OsString>> {
    let failed = |e: Errno| Error::path("read", &folder.path)(e.into());
    let mut names = VecDeque::new();
    // It may be open as a place only.
    let open = fsat::open(&folder.fd, ".", OFlags::RDONLY | OFlags::DIRECTORY, 0);
    let open = open.map_err(Error::path("read", &folder.path))?;
    for entry in Dir::read_from(&open).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name.as_bytes().starts_with(WAITING.as_bytes()) {
            names.push_front(name.to_owned());
        } else if name == ROOT {
            names.push_back(name.to_owned());
        }
    }
    Ok(names)
}

fn remove_folder(parent: &Folder, name: &OsStr) -> Result {
    let removed = rustix::fs::unlinkat(&parent.fd, name, AtFlags::REMOVEDIR);
    removed.map_err(|e| Error::path("remove the folder", parent.path.join(name))(e.into()))
}

/// Takes away what somebody has mounted in the jail's folder; what is mounted is left as it is.
fn unmount_below(folder: &Folder) -> Result {
    let list = Path::new("/proc/self/mountinfo");
    let text = fs::read(list).map_err(Error::path("read", list))?;
    let mounts = text.split(|byte| *byte == b'\n').filter_map(mount_point);
    let mut below: Vec<_> = mounts
        .filter_map(|path| Some(path.strip_prefix(&folder.path).ok()?.to_owned()))
        .filter(|path| path.file_name().is_some())
        .collect();
    // Later mounts lie upon or in earlier ones.
    below.reverse();
    below
        .iter()
        .try_for_each(|path| unmount(folder, path).map_err(Error::path("unmount", folder.path.join(path))))
}

/// Unmounts what is at a path below the folder. The VM's user can change what is on the way, so the path is opened up to
/// the last name, and only that is left to the kernel to look up.
fn unmount(folder: &Folder, path: &Path) -> io::Result<()> {
    let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
        return Ok(());
    };
    let above = Path::new(".").join(above);
    rustix::process::fchdir(fsat::open(&folder.fd, above, OFlags::PATH, 0)?)?;
    Ok(rustix::mount::unmount(name, UnmountFlags::NOFOLLOW)?)
}

/// The mount point in a line of mountinfo.
fn mount_point(line: &[u8]) -> Option<PathBuf> {
    Some(fsat::listed_path(line.split(|byte| *byte == b' ').nth(4)?))
}

/// How folders are called that wait to be emptied.
const WAITING: &str = "removing-";

/// Removes the root with everything in it. A folder that is not empty is moved up to the jail's folder and emptied there:
/// however deep the VM has made its folders, two are open. Those that a killed jailer has moved are emptied too.
fn empty(folder: &Folder) -> Result {
    let mut waiting = waiting(folder)?;
    let number = |name: &OsString| name.to_str()?.strip_prefix(WAITING)?.parse::<u64>().ok();
    let mut moved = waiting.iter().filter_map(number).max().map_or(0, |last| last + 1);
    while let Some(name) = waiting.pop_back() {
        let path = folder.path.join(&name);
        let failed = |e: Errno| Error::path("remove", &path)(e.into());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let open = match fsat::open(&folder.fd, Path::new(&name), flags, 0) {
            // What is no folder has nothing in it.
            Err(e) if name != ROOT && matches!(e.raw_os_error(), Some(libc::ENOTDIR | libc::ELOOP)) => {
                folder.remove(&name)?;
                continue;
            }
            other => other.map_err(fsat::refusal("open", &path))?,
        };
        for entry in Dir::read_from(&open).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let child = OsStr::from_bytes(entry.file_name().to_bytes());
            if child == "." || child == ".." {
                continue;
            }
            match rustix::fs::unlinkat(&open, child, AtFlags::empty()) {
                Err(Errno::ISDIR) if rustix::fs::unlinkat(&open, child, AtFlags::REMOVEDIR).is_err() => {
                    let new = OsString::from(format!("{WAITING}{moved}"));
                    moved += 1;
                    rustix::fs::renameat(&open, child, &folder.fd, &new).map_err(failed)?;
                    waiting.push_front(new);
                }
                Err(Errno::ISDIR) => {}
                other => other.map_err(failed)?,
            }
        }
        remove_folder(folder, &name)?;
    }
    Ok(())
}
