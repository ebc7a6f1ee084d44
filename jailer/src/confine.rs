//! What takes rights from the process, once it is in its namespaces and before it becomes the monitor.

use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr, RulesetStatus, Scope,
};
use rustix::fs::{AtFlags, CWD};
use rustix::process::{Resource, Rlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::error::{Error, Result};
use crate::import::{Import, Kind};
use crate::jail::CONFIG;
use crate::plan::{Limits, Plan, User};

/// Limits the files that the process makes and opens.
pub fn limit(limits: Limits) -> Result {
    let set = |resource, value| {
        let limit = Rlimit {
            current: Some(value),
            maximum: Some(value),
        };
        rustix::process::setrlimit(resource, limit).map_err(Error::system("set the resource limits"))
    };
    if let Some(size) = limits.file_size {
        set(Resource::Fsize, size)?;
    }
    let most = rustix::process::getrlimit(Resource::Nofile).maximum;
    // Raising it is root's.
    let allowed = match most {
        Some(most) if !rustix::process::geteuid().is_root() => most.min(limits.open_files),
        _ => limits.open_files,
    };
    set(Resource::Nofile, allowed)
}

/// Leaves the keys of whoever started the jailer behind.
pub fn leave_keyring() -> Result {
    const JOIN_SESSION_KEYRING: libc::c_int = 1;
    // SAFETY: needed because no wrapper has this call. Null stands for a new keyring without a name.
    let result = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            JOIN_SESSION_KEYRING,
            std::ptr::null::<libc::c_char>(),
        )
    };
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        _ if result >= 0 => Ok(()),
        // A kernel without keys has none to leave.
        Some(libc::ENOSYS) => Ok(()),
        _ => Err(Error::system("leave the session's keyring")(error)),
    }
}

/// Becomes the user, with no capability left and none to be had.
pub fn drop_privileges(user: User, keeps_groups: bool) -> Result {
    let failed = || Error::system("drop privileges");
    drop_bounding_set().map_err(failed())?;
    if !keeps_groups {
        rustix::thread::set_thread_groups(&[]).map_err(failed())?;
    }
    become_user(user)
}

/// Becomes the user, with no capability left. That is all for a process that starts no program any more.
pub fn become_user(user: User) -> Result {
    let failed = || Error::system("drop privileges");
    let (uid, gid) = (
        rustix::fs::Uid::from_raw(user.uid),
        rustix::fs::Gid::from_raw(user.gid),
    );
    rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(failed())?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(failed())?;
    rustix::thread::clear_ambient_capability_set().map_err(failed())?;
    let none = CapabilitySet::empty();
    let sets = CapabilitySets {
        effective: none,
        permitted: none,
        inheritable: none,
    };
    rustix::thread::set_capabilities(None, sets).map_err(failed())?;
    rustix::thread::set_no_new_privs(true).map_err(failed())
}

/// Leaves to a jailer that waits for a VM with other ids nothing but the right to send it signals.
pub fn keep_right_to_signal() -> Result {
    let failed = || Error::system("drop privileges");
    let sets = CapabilitySets {
        effective: CapabilitySet::KILL,
        permitted: CapabilitySet::KILL,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, sets).map_err(failed())?;
    rustix::thread::set_no_new_privs(true).map_err(failed())
}

fn drop_bounding_set() -> rustix::io::Result<()> {
    for number in 0..64 {
        match rustix::thread::remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(
            1 << number,
        )) {
            // The kernel knows no more.
            Err(rustix::io::Errno::INVAL) => break,
            other => other?,
        }
    }
    Ok(())
}

/// Does something with the rights that the VM's user has, so that a config leads root to nothing that this user cannot
/// reach.
pub fn as_user<T>(plan: &Plan, work: impl FnOnce() -> T) -> Result<T> {
    if plan.place.rootless {
        return Ok(work());
    }
    let User { uid, gid } = plan.user;
    let change = |uid, gid, first_uid: bool| -> rustix::io::Result<()> {
        let set_uid = || rustix::thread::set_thread_res_uid(None, rustix::fs::Uid::from_raw(uid), None);
        let set_gid = || rustix::thread::set_thread_res_gid(None, rustix::fs::Gid::from_raw(gid), None);
        // Only root can change the group.
        if first_uid {
            set_uid().and_then(|()| set_gid())
        } else {
            set_gid().and_then(|()| set_uid())
        }
    };
    change(uid, gid, false).map_err(Error::system("take the rights of the VM's user"))?;
    let result = work();
    change(0, 0, true).map_err(Error::system("return to root's rights"))?;
    Ok(result)
}

/// Lets the process reach only what the jail is for, also in what its file system shows. False if this kernel cannot.
pub fn restrict(plan: &Plan) -> Result<bool> {
    let failed = |error: landlock::RulesetError| Error::system("set up Landlock")(io::Error::other(error));
    let ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(ABI::V5))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(ABI::V5)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(ABI::V6)))
        .and_then(Ruleset::create)
        .map_err(failed)?;
    let mut rules = Rules(Some(ruleset));
    rules.allow(
        Path::new("/").join(&plan.place.name),
        AccessFs::Execute | AccessFs::ReadFile,
    )?;
    rules.allow(
        "/dev",
        AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev,
    )?;
    let write = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
    let sockets = AccessFs::ReadDir | AccessFs::MakeSock | AccessFs::RemoveFile;
    match &plan.imports {
        None => rules.allow("/", write | sockets | AccessFs::MakeReg | AccessFs::IoctlDev)?,
        Some(imports) => {
            rules.allow("/run", write | sockets | AccessFs::MakeReg)?;
            rules.allow(Path::new("/").join(CONFIG), AccessFs::ReadFile.into())?;
            for import in &imports.list {
                let access = match import.kind {
                    Kind::ReadOnly => AccessFs::ReadFile | AccessFs::IoctlDev,
                    // The monitor opens pipes for output both ways.
                    Kind::ReadWrite | Kind::Socket | Kind::Output => write | AccessFs::IoctlDev,
                    Kind::Folder => sockets,
                };
                rules.allow(import.path(), access)?;
            }
        }
    }
    let status = rules
        .0
        .map(RulesetCreated::restrict_self)
        .transpose()
        .map_err(failed)?;
    Ok(status.is_some_and(|status| status.ruleset != RulesetStatus::NotEnforced))
}

struct Rules(Option<RulesetCreated>);

impl Rules {
    fn allow(&mut self, path: impl Into<PathBuf>, access: BitFlags<AccessFs>) -> Result {
        let path = path.into();
        let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
            Error::path("allow access to", &path)(io::Error::other(error))
        };
        let file = PathFd::new(&path).map_err(|e| failed(e.into()))?;
        if let Some(ruleset) = self.0.take() {
            let added = ruleset
                .add_rule(PathBeneath::new(file, access))
                .map_err(|e| failed(e.into()))?;
            self.0 = Some(added);
        }
        Ok(())
    }
}

/// Checks that the user of the VM can use what was imported; else the monitor would say so with paths of the jail.
pub fn check_access(import: &Import, user: User) -> Result {
    use rustix::fs::Access;
    let (access, doing) = match import.kind {
        Kind::ReadOnly => (Access::READ_OK, "read"),
        Kind::ReadWrite | Kind::Socket | Kind::Output => {
            (Access::READ_OK | Access::WRITE_OK, "read and write")
        }
        Kind::Folder => (Access::WRITE_OK | Access::EXEC_OK, "make sockets in"),
    };
    let checked = rustix::fs::accessat(CWD, import.path(), access, AtFlags::EACCESS);
    checked.map_err(|source| Error::Access {
        doing,
        path: import.source.clone(),
        user,
        source: source.into(),
    })
}
