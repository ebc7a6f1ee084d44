//! The new process: from its first instruction in new namespaces until it is the monitor.

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::process::Signal;
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use crate::clock::Start;
use crate::confine;
use crate::error::{Error, Result};
use crate::fsat::Identity;
use crate::jail::CONFIG;
use crate::mounts;
use crate::plan::{After, Network, Plan};
use crate::signals::Blocked;

/// What the process gets from the one that made it.
#[derive(Debug)]
pub struct Inheritance {
    /// Says when to begin; ends when the jailer has died.
    pub go: OwnedFd,
    /// Takes [`READY`] before the program starts, and what goes wrong.
    pub status: OwnedFd,
    /// The network namespace to join.
    pub netns: Option<OwnedFd>,
    /// The root of the jail.
    pub root: Identity,
    /// The signals that the jailer holds back.
    pub signals: Blocked,
    /// The mode mask that the program is to have.
    pub umask: Mode,
    /// CPU times.
    pub start: Start,
}

/// Said before the program starts. What follows is why it did not.
pub const READY: u8 = b'+';
/// Between a message and its details.
pub const SEPARATOR: char = '\0';

/// Becomes the monitor, or tells the jailer why not.
pub fn run(plan: &Plan, inheritance: &Inheritance) -> ! {
    let Err(error) = become_monitor(plan, inheritance);
    let text = format!("{error}{SEPARATOR}{}", error.details());
    // It fits into an empty pipe. Nobody is left to be told if this fails.
    let _ = rustix::io::write(&inheritance.status, text.as_bytes());
    std::process::exit(1)
}

fn become_monitor(plan: &Plan, inheritance: &Inheritance) -> Result<Infallible> {
    if !matches!(rustix::io::read(&inheritance.go, &mut [0; 1]), Ok(1)) {
        // The jailer gave up, and says why.
        std::process::exit(1);
    }
    enter_namespaces(plan, inheritance.netns.as_ref())?;
    if plan.after == After::Daemon {
        leave_terminal()?;
    }
    mounts::enter(plan, inheritance.root)?;
    confine::limit(plan.limits)?;
    confine::leave_keyring()?;
    confine::drop_privileges(plan.user, plan.keeps_groups)?;
    for import in plan.imports.iter().flat_map(|imports| &imports.list) {
        confine::check_access(import, plan.user)?;
    }
    if !confine::restrict(plan)? {
        eprintln!(
            "mayfly-jailer: warning: this kernel has no Landlock; the jail is its mounts, namespaces and user"
        );
    }
    if plan.after == After::Wait {
        let failed = Error::system("ask to die with the jailer");
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(failed)?;
    }
    if has_ended(&inheritance.go) {
        std::process::exit(1);
    }
    rustix::process::umask(inheritance.umask);
    inheritance
        .signals
        .restore()
        .map_err(Error::system("unblock signals"))?;
    rustix::io::write(&inheritance.status, &[READY]).map_err(Error::system("tell the jailer"))?;
    let program = Path::new("/").join(&plan.place.name);
    let error = monitor(plan, &program, inheritance.start).exec();
    Err(Error::path("execute", &program)(error))
}

/// Joins or makes the namespaces that the process was not born in.
fn enter_namespaces(plan: &Plan, netns: Option<&OwnedFd>) -> Result {
    // SAFETY: needed because the call could take open files from other threads; there are none, and it does not here.
    let unshared = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWCGROUP) };
    unshared.map_err(Error::system("make a cgroup namespace"))?;
    if let (Some(netns), Network::Join(path)) = (netns, &plan.network) {
        rustix::thread::move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(|e| Error::path("join the network namespace", path)(e.into()))?;
    }
    rustix::system::sethostname(plan.place.id.as_bytes()).map_err(Error::system("set the host name"))
}

fn leave_terminal() -> Result {
    let failed = |e: rustix::io::Errno| Error::system("leave the terminal")(e);
    rustix::process::setsid().map_err(failed)?;
    let null =
        rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
    rustix::stdio::dup2_stdin(&null).map_err(failed)?;
    rustix::stdio::dup2_stdout(&null).map_err(failed)?;
    rustix::stdio::dup2_stderr(&null).map_err(failed)
}

/// True if the other end of the pipe is closed.
fn has_ended(go: &OwnedFd) -> bool {
    let mut poll = [PollFd::new(go, PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    matches!(rustix::event::poll(&mut poll, Some(&now)), Ok(1))
}

fn monitor(plan: &Plan, program: &Path, start: Start) -> Command {
    let mut command = Command::new(program);
    command.env_clear().arg("--id").arg(&plan.place.id);
    command.arg("--start-time-us").arg(start.monotonic_us.to_string());
    // This process has existed for the jail only, so all of its time counts.
    command.args(["--start-time-cpu-us", "0"]);
    command.arg("--parent-cpu-time-us").arg(start.cpu_us.to_string());
    if plan.imports.is_some() {
        command.arg("--config-file").arg(Path::new("/").join(CONFIG));
    }
    command.args(&plan.extra);
    command
}

/// What the process said, without and with an error.
pub fn parse_status(said: &[u8]) -> Option<Error> {
    let text = match said {
        [READY] => return None,
        [READY, error @ ..] => error,
        other => other,
    };
    let text = String::from_utf8_lossy(text);
    let (message, details) = text.split_once(SEPARATOR).unwrap_or((
        "The process that makes the jail died before the program started",
        "Died",
    ));
    Some(Error::Inside {
        message: message.into(),
        details: details.into(),
    })
}

/// Reads all that the process says.
pub fn read_status(status: OwnedFd) -> io::Result<Vec<u8>> {
    let mut said = Vec::new();
    File::from(status).read_to_end(&mut said)?;
    Ok(said)
}
