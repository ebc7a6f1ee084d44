//! Removing a jail that nobody uses any more.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, OFlags};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use crate::error::{Error, Result};
use crate::fsat::{self, Folder};
use crate::plan::Place;
use crate::record::Record;

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
    let root = folder.stat("root")?.map(|stat| fsat::identity(&stat));
    let record = Record::lock(&folder, &place.id, root)?;
    remove(place, parent, folder, record)
}

/// Removes everything that the record and the folder of a jail have.
pub fn remove(place: &Place, parent: Folder, folder: Folder, record: Record) -> Result {
    for group in &record.cgroups {
        match fs::remove_dir(group) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(Error::path("remove the cgroup", group)(e));
            }
            _ => {}
        }
    }
    unmount_below(&place.folder())?;
    if folder.stat("root")?.is_some() {
        empty(&folder)?;
    }
    // Last, as it is the lock.
    folder.remove(crate::record::NAME)?;
    drop(record);
    remove_folder(&parent, place.id.as_ref())
}

fn remove_folder(parent: &Folder, name: &OsStr) -> Result {
    let removed = rustix::fs::unlinkat(&parent.fd, name, AtFlags::REMOVEDIR);
    removed.map_err(|e| Error::path("remove the folder", parent.path.join(name))(e.into()))
}

/// Takes away what somebody has mounted in the jail's folder; what is mounted is left as it is.
fn unmount_below(folder: &Path) -> Result {
    let list = Path::new("/proc/self/mountinfo");
    let text = fs::read(list).map_err(Error::path("read", list))?;
    let mounts = text.split(|byte| *byte == b'\n').filter_map(mount_point);
    let mut below: Vec<_> = mounts.filter(|path| path.starts_with(folder)).collect();
    // Later mounts lie upon or in earlier ones.
    below.reverse();
    below.iter().try_for_each(|path| {
        rustix::mount::unmount(path, UnmountFlags::NOFOLLOW)
            .map_err(|e| Error::path("unmount", path)(e.into()))
    })
}

/// The mount point in a line of mountinfo, in which blanks and the like are octal numbers.
fn mount_point(line: &[u8]) -> Option<PathBuf> {
    let field = line.split(|byte| *byte == b' ').nth(4)?;
    let mut path = Vec::new();
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let octal = |digits: &[u8]| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok();
        match (byte, after.get(..3).and_then(octal)) {
            (b'\\', Some(value)) => (path.push(value), rest = &after[3..]).1,
            _ => (path.push(byte), rest = after).1,
        }
    }
    Some(OsString::from_vec(path).into())
}

/// Removes `root` with everything in it. A folder that is not empty is moved up to the jail's folder and emptied there:
/// however deep the VM has made its folders, two are open.
fn empty(folder: &Folder) -> Result {
    let mut moved = 0_u64;
    let mut waiting = vec![OsString::from("root")];
    while let Some(name) = waiting.last().cloned() {
        let path = folder.path.join(&name);
        let failed = |e: Errno| Error::path("remove", &path)(e.into());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let open =
            fsat::open(&folder.fd, Path::new(&name), flags, 0).map_err(fsat::refusal("open", &path))?;
        for entry in Dir::read_from(&open).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let child = OsStr::from_bytes(entry.file_name().to_bytes());
            if child == "." || child == ".." {
                continue;
            }
            if entry.file_type() != FileType::Directory {
                rustix::fs::unlinkat(&open, child, AtFlags::empty()).map_err(failed)?;
            } else if rustix::fs::unlinkat(&open, child, AtFlags::REMOVEDIR).is_err() {
                let new = OsString::from(format!("removing-{moved}"));
                moved += 1;
                rustix::fs::renameat(&open, child, &folder.fd, &new).map_err(failed)?;
                waiting.insert(0, new);
            }
        }
        remove_folder(folder, &name)?;
        waiting.retain(|other| *other != name);
    }
    Ok(())
}
