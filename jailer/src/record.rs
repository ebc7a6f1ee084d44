//! The record of a jail: a file beside its root, out of the VM's reach, that is locked while a jailer works on the jail, and
//! says which process the VM is and which cgroups it has. By it a jail in use is known from a dead one.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Stat};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::fsat::{self, Folder, Identity};
use crate::jail::ROOT;

/// The name of the file in the folder of a jail.
pub const NAME: &str = "record";
/// Much more than a record has.
const MAX_LEN: u64 = 1 << 20;

/// A locked record.
#[derive(Debug)]
pub struct Record {
    file: File,
    path: PathBuf,
    /// The VM's process id.
    pub pid: Option<i32>,
    /// Groups that are to be removed with the jail.
    pub cgroups: Vec<PathBuf>,
}

impl Record {
    /// Locks the record in a jail's folder, and makes it if it is not there. Fails if the jail is in use. Returns also what
    /// the jail's root is, if it is there.
    pub fn lock(folder: &Folder, id: &str) -> Result<(Self, Option<Stat>)> {
        let path = folder.path.join(NAME);
        let mut record = Self {
            file: folder.file(NAME, 0o600, None)?,
            path,
            pid: None,
            cgroups: Vec::new(),
        };
        let locked = rustix::fs::flock(&record.file, FlockOperation::NonBlockingLockExclusive);
        record.read()?;
        let live = |pid| Error::Live { id: id.into(), pid };
        match (locked, record.pid) {
            (Ok(()), _) => {}
            (Err(Errno::WOULDBLOCK), Some(pid)) => return Err(live(pid)),
            (Err(Errno::WOULDBLOCK), None) => return Err(Error::Busy(id.into())),
            (Err(e), _) => return Err(Error::path("lock", &record.path)(e.into())),
        }
        let own = fsat::identity_of(&record.file).map_err(Error::path("examine", &record.path))?;
        if folder.stat(NAME)?.as_ref().map(fsat::identity) != Some(own) {
            // Whoever held the lock before has removed the jail.
            return Err(Error::Busy(id.into()));
        }
        // Not before: until the lock is there, another jailer may make it.
        let root = folder.stat(ROOT)?;
        match record.pid {
            Some(pid) if root.is_some() && root.as_ref().map(fsat::identity) == root_of(pid) => {
                Err(live(pid))
            }
            _ => Ok((record, root)),
        }
    }

    fn read(&mut self) -> Result {
        let mut text = String::new();
        let read = (&self.file).take(MAX_LEN).read_to_string(&mut text);
        read.map_err(Error::path("read", &self.path))?;
        for line in text.lines() {
            match line.split_once(' ') {
                Some(("pid", pid)) => self.pid = pid.parse().ok(),
                Some(("cgroup", path)) => self.cgroups.push(path.into()),
                _ => {}
            }
        }
        Ok(())
    }

    /// Notes the groups that are going to be made.
    pub fn set_cgroups<'a>(&mut self, groups: impl Iterator<Item = &'a Path>) -> Result {
        for group in groups {
            if !self.cgroups.iter().any(|known| known == group) {
                self.cgroups.push(group.into());
            }
        }
        self.pid = None;
        self.write()
    }

    /// Notes the VM's process, which is in the jail or about to enter it.
    pub fn set_pid(&mut self, pid: i32) -> Result {
        self.pid = Some(pid);
        self.write()
    }

    fn write(&mut self) -> Result {
        let mut text = String::new();
        if let Some(pid) = self.pid {
            text += &format!("pid {pid}\n");
        }
        for group in &self.cgroups {
            text += &format!("cgroup {}\n", group.display());
        }
        let file = &mut self.file;
        let written = file
            .rewind()
            .and_then(|()| file.write_all(text.as_bytes()))
            // Last, so that a kill between the two loses nothing.
            .and_then(|()| file.set_len(text.len() as u64));
        written.map_err(Error::path("write", &self.path))
    }
}

/// The root of a process; none if it has ended, or is none of ours.
fn root_of(pid: i32) -> Option<Identity> {
    let stat = rustix::fs::stat(format!("/proc/{pid}/root")).ok()?;
    Some(fsat::identity(&stat))
}
