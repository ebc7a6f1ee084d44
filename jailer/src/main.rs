//! `mayfly-jailer`: starts `mayfly` in a jail. See the library for how.

#![no_main]

use std::os::fd::AsRawFd;
use std::path::Path;

use jailer::args::{self, Args, Command};
use jailer::clock::Start;
use jailer::error::{Error, Result};
use jailer::plan::{Place, Plan};
use jailer::{cleanup, outside};
use rustix::fs::{Mode, OFlags};

/// The Firecracker whose options and results it has.
const API_VERSION: &str = "1.16.1";

/// Where the C library enters. The start of the standard library would read the process's memory map for a handler of
/// stack overflows, which costs more than the other steps before the first file is made.
// SAFETY: the name and the type are what the C library calls, once, with its own arguments.
#[unsafe(no_mangle)]
extern "C" fn main(_: libc::c_int, _: *const *const libc::c_char) -> libc::c_int {
    hold_standard_descriptors();
    // SAFETY: needed because std does it only in its own start. A write to a pipe that nobody reads is to be an error.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    // SAFETY: needed because no wrapper in use changes actions. Whoever starts the jailer may ignore the end of children,
    // which the kernel would then not tell.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    std::process::exit(jailer(Start::now()).into())
}

/// Opens `/dev/null` for each standard descriptor that the process was started without. Else the next file opened would
/// get its number.
fn hold_standard_descriptors() {
    while let Ok(null) = rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty()) {
        if null.as_raw_fd() > 2 {
            break;
        }
        std::mem::forget(null);
    }
}

/// What `--version` prints. Clients that look for Firecracker's jailer run what has its name, and read the first line.
fn version() -> String {
    let name = concat!("mayfly-jailer v", env!("CARGO_PKG_VERSION"));
    let program = std::env::args_os().next().unwrap_or_default();
    if Path::new(&program).ends_with("jailer") {
        format!("Jailer v{API_VERSION}\n{name}\n")
    } else {
        format!("{name}\n")
    }
}

fn jailer(start: Start) -> u8 {
    match args::parse(std::env::args_os().skip(1)) {
        Ok(Command::Help) => print!("{}", args::HELP),
        Ok(Command::Version) => print!("{}", version()),
        Ok(Command::Run(args)) => return report(run(&args, start)),
        Ok(Command::Cleanup(args)) => return report(clean_up(&args)),
        Err(error) => return report(Err(error.into())),
    }
    0
}

fn report(result: Result<u8>) -> u8 {
    result.unwrap_or_else(|error| {
        eprintln!("{error}\nError: {}", error.details());
        1
    })
}

fn run(args: &Args, start: Start) -> Result<u8> {
    let plan = Plan::new(args, prepare()?)?;
    if plan.place.rootless {
        warn_about_rootless(&plan);
    }
    outside::run(&plan, start)
}

fn clean_up(args: &Args) -> Result<u8> {
    cleanup::run(&Place::new(args, prepare()?)?)?;
    Ok(0)
}

/// Closes what whoever started the jailer has left open. Returns where the user has runtime files, which is the only part
/// of the environment that is used.
fn prepare() -> Result<Option<std::ffi::OsString>> {
    // SAFETY: needed because no wrapper closes a range. Nothing here has opened a file yet, so no owner is left with a
    // closed one.
    if unsafe { libc::close_range(3, libc::c_uint::MAX, 0) } != 0 {
        return Err(Error::system("close inherited files")(
            std::io::Error::last_os_error(),
        ));
    }
    Ok(std::env::var_os("XDG_RUNTIME_DIR"))
}

/// Says what a jail that root starts has and this one has not.
fn warn_about_rootless(plan: &Plan) {
    let groups = if plan.keeps_groups {
        ", and keeps your groups"
    } else {
        ""
    };
    match plan.has_subordinate_user() {
        false => eprintln!("mayfly-jailer: without root: the VM runs as you, in a user namespace{groups}"),
        true => eprintln!(
            "mayfly-jailer: without root: the VM runs as uid {} and gid {}, which are set aside for you{groups}",
            plan.user.uid, plan.user.gid
        ),
    }
    if plan.cgroups.is_empty() {
        eprintln!(
            "mayfly-jailer: without root: no cgroup limits the VM, unless --cgroup names one in a delegated group"
        );
    }
}
