//! VMs of an ordinary user that have ids of their own: some of those that the system has set aside for the user, in
//! `/etc/subuid` and `/etc/subgid`. `newuidmap` and `newgidmap`, which know who may have which, map them into a user
//! namespace under their own numbers, beside the user's. In it the jailer has root's power over what belongs to these ids:
//! that is what it needs to make and to remove a jail whose files are not the user's.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, WaitOptions};
use rustix::thread::LinkNameSpaceType;

use crate::error::{Error, Result};
use crate::outside;
use crate::plan::User;

/// A user namespace with the ids of this process and of a VM, which nobody has entered yet.
#[derive(Debug)]
pub struct Namespace(OwnedFd);

impl Namespace {
    /// Makes one. Fails if this user may not have the ids.
    pub fn make(own: User, vm: User) -> Result<Self> {
        let (hold, held) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .map_err(Error::system("make a pipe"))?;
        let made = outside::clone(libc::CLONE_NEWUSER | libc::SIGCHLD);
        let Some(pid) = made.map_err(outside::no_user_namespace)? else {
            drop(held);
            // It is there until its namespace is mapped and open, or the jailer dead.
            let _ = rustix::io::read(&hold, &mut [0; 1]);
            std::process::exit(0);
        };
        let mapped = map("newuidmap", pid, own.uid, vm.uid)
            .and_then(|()| map("newgidmap", pid, own.gid, vm.gid))
            .and_then(|()| open(pid).map_err(Error::system("open the user namespace")));
        drop(held);
        // Nothing depends on how it ends.
        let _ = rustix::process::waitpid(Some(pid), WaitOptions::empty());
        mapped.map(Self)
    }

    /// Enters it. This process keeps its ids.
    pub fn enter(self) -> Result {
        rustix::thread::move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::User))
            .map_err(Error::system("enter the user namespace"))
    }
}

fn open(pid: Pid) -> io::Result<OwnedFd> {
    let path = format!("/proc/{}/ns/user", pid.as_raw_pid());
    Ok(rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// Has one of the helpers map two ids, one to one, into the namespace of a process.
fn map(helper: &'static str, pid: Pid, own: u32, vm: u32) -> Result {
    let failed = |reason: String| Error::Subordinate {
        helper,
        id: vm,
        reason,
    };
    let (pid, own, vm) = (pid.as_raw_pid().to_string(), own.to_string(), vm.to_string());
    let words = [&*pid, &*own, &*own, "1", &*vm, &*vm, "1"];
    let output = Command::new(helper).args(words).stdin(Stdio::null()).output();
    let output = output.map_err(|e| failed(e.to_string()))?;
    match output.status.success() {
        true => Ok(()),
        false => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(failed(
                said.trim()
                    .trim_start_matches(helper)
                    .trim_start_matches(": ")
                    .into(),
            ))
        }
    }
}
