//! The jailer's own process: makes what the host sees, starts the new process, and waits for it or leaves.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};

use crate::cleanup;
use crate::clock::Start;
use crate::confine;
use crate::error::{Error, Result};
use crate::fsat;
use crate::inside::{self, Inheritance};
use crate::jail::Jail;
use crate::plan::{After, Network, Plan, User};
use crate::signals::{self, Blocked};
use crate::subids::Namespace;

/// Makes the jail and starts the program in it. Returns the exit code, once the program has ended or is left alone.
pub fn run(plan: &Plan, start: Start) -> Result<u8> {
    let umask = rustix::process::umask(Mode::from_raw_mode(fsat::UMASK));
    if !plan.place.rootless {
        rustix::thread::set_thread_groups(&[]).map_err(Error::system("drop groups"))?;
    }
    // First, as it changes nothing that stays.
    let namespace = plan
        .has_subordinate_user()
        .then(|| Namespace::make(User::own(), plan.user))
        .transpose()?;
    let mut jail = Jail::enter(&plan.place, plan.user, namespace)?;
    match launch(plan, &mut jail, umask, start) {
        Ok((pid, signals)) => match plan.after {
            After::Leave | After::Daemon => Ok(0),
            After::Wait => keep(plan, pid, &signals, jail),
        },
        Err(error) => {
            undo(plan, jail);
            Err(error)
        }
    }
}

/// Removes what a start that failed has made.
fn undo(plan: &Plan, mut jail: Jail) {
    let undone = if jail.fresh {
        cleanup::remove(&plan.place, jail.parent, jail.folder, jail.record)
    } else {
        jail.forget_pid(&plan.place.name)
    };
    if let Err(error) = undone {
        eprintln!("mayfly-jailer: warning: {error}");
    }
}

fn launch(plan: &Plan, jail: &mut Jail, umask: Mode, start: Start) -> Result<(Pid, Blocked)> {
    jail.fill(plan)?;
    jail.record
        .set_cgroups(plan.cgroups.iter().filter_map(|group| group.own_path()))?;
    plan.cgroups.iter().try_for_each(|group| group.create())?;
    let signals = Blocked::new().map_err(Error::system("block signals"))?;
    let (go_out, go_in) = pipe()?;
    let (status_out, status_in) = pipe()?;
    let inheritance = Inheritance {
        go: go_out,
        status: status_in,
        netns: open_netns(&plan.network)?,
        root: fsat::identity_of(&jail.root.fd).map_err(Error::path("examine", &jail.root.path))?,
        signals,
        umask,
        start: start.with_cpu_time(),
    };
    let Some(pid) = make_process(plan)? else {
        // The jailer's ends are not the new process's.
        drop((go_in, status_out));
        inside::run(plan, &inheritance)
    };
    drop(inheritance);
    let result = send_off(plan, jail, pid, go_in).and_then(|go| {
        let said = inside::read_status(status_out).map_err(Error::system("hear from the new process"))?;
        drop(go);
        inside::parse_status(&said).map_or(Ok(()), Err)
    });
    match result {
        Ok(()) => Ok((pid, signals)),
        Err(error) => {
            // It has ended or is about to: nobody holds the other end of its pipe.
            let _ = rustix::process::waitpid(Some(pid), WaitOptions::empty());
            drop(signals.restore());
            Err(error)
        }
    }
}

fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(Error::system("make a pipe"))
}

fn open_netns(network: &Network) -> Result<Option<OwnedFd>> {
    let Network::Join(path) = network else {
        return Ok(None);
    };
    let opened = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    opened
        .map(Some)
        .map_err(|e| Error::path("open the network namespace", path)(e.into()))
}

/// Makes the new process in its namespaces; none in that process itself.
fn make_process(plan: &Plan) -> Result<Option<Pid>> {
    let mut flags =
        libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::SIGCHLD;
    let own_map = plan.place.rootless && !plan.has_subordinate_user();
    if own_map {
        flags |= libc::CLONE_NEWUSER;
    }
    if plan.network == Network::None {
        flags |= libc::CLONE_NEWNET;
    }
    clone(flags).map_err(|source| match own_map {
        true => no_user_namespace(source),
        false => Error::system("make a process in new namespaces")(source),
    })
}

/// Why there is no user namespace.
pub fn no_user_namespace(source: io::Error) -> Error {
    Error::UserNamespace {
        source,
        hint: "See whether user.max_user_namespaces is 0 or AppArmor restricts them \
               (kernel.apparmor_restrict_unprivileged_userns), or start the jailer as root",
    }
}

/// Makes a process that goes on from here; none in that process itself.
pub fn clone(flags: libc::c_int) -> io::Result<Option<Pid>> {
    const NONE: libc::c_long = 0;
    // SAFETY: needed because no wrapper makes a process in new namespaces. Without a stack and shared memory the call is a
    // fork, and this process has one thread, so that no lock is held in the new one.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::c_long::from(flags), NONE, NONE, NONE, NONE) };
    let source = io::Error::last_os_error();
    match i32::try_from(pid) {
        Ok(0) => Ok(None),
        Ok(pid) if pid > 0 => Ok(Pid::from_raw(pid)),
        _ => Err(source),
    }
}

/// Does what the new process cannot do for itself, and lets it go. Returns what tells it that the jailer lives.
fn send_off(plan: &Plan, jail: &mut Jail, pid: Pid, go: OwnedFd) -> Result<File> {
    let number = pid.as_raw_pid();
    if plan.place.rootless && !plan.has_subordinate_user() {
        map_user(number, plan.user).map_err(Error::system("map the user into the user namespace"))?;
    }
    plan.cgroups.iter().try_for_each(|group| group.add(number))?;
    jail.record.set_pid(number)?;
    jail.write_pid(&plan.place.name, number)?;
    let mut go = File::from(go);
    go.write_all(b"g")
        .map_err(Error::system("start the new process"))?;
    Ok(go)
}

/// Gives a user namespace the one user and group that there is, under their own numbers.
fn map_user(pid: i32, user: User) -> io::Result<()> {
    let User { uid, gid } = user;
    std::fs::write(format!("/proc/{pid}/setgroups"), "deny")?;
    std::fs::write(format!("/proc/{pid}/uid_map"), format!("{uid} {uid} 1"))?;
    std::fs::write(format!("/proc/{pid}/gid_map"), format!("{gid} {gid} 1"))
}

/// Waits for the end of the program, and passes signals on. `_jail` stays locked meanwhile.
fn keep(plan: &Plan, pid: Pid, signals: &Blocked, _jail: Jail) -> Result<u8> {
    if plan.has_subordinate_user() {
        confine::keep_right_to_signal()?;
    } else if !plan.place.rootless {
        confine::become_user(plan.user)?;
    }
    let mut last = 0;
    loop {
        if let Some(status) = ended(pid)? {
            return Ok(end_like(status, last, signals));
        }
        if let Some(signal) = signals.wait() {
            last = signal;
            signals::send(pid, signal);
        }
    }
}

fn ended(pid: Pid) -> Result<Option<WaitStatus>> {
    let waited = rustix::process::waitpid(Some(pid), WaitOptions::NOHANG);
    let waited = waited.map_err(Error::system("wait for the program"))?;
    Ok(waited.map(|(_, status)| status))
}

/// The exit code for the program's end. A process that is the first of its PID namespace cannot die by its own signal, so
/// that it exits with 128 and the signal's number.
fn end_like(status: WaitStatus, last: i32, signals: &Blocked) -> u8 {
    let by_signal = status.terminating_signal();
    let code = status.exit_status().unwrap_or(1);
    let signal = by_signal.or((last != 0 && code == 128 + last).then_some(last));
    match signal.and_then(Signal::from_named_raw) {
        Some(signal) => signals.die_by(signal),
        None => u8::try_from(code).unwrap_or(1),
    }
}
