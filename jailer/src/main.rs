//! `mayfly-jailer`: starts `mayfly` in a jail. See the library for how.

use std::process::ExitCode;

use jailer::args::{self, Args, Command};
use jailer::clock::Start;
use jailer::error::{Error, Result};
use jailer::plan::{Place, Plan};
use jailer::{cleanup, outside};

fn main() -> ExitCode {
    let start = Start::now();
    match args::parse(std::env::args_os().skip(1)) {
        Ok(Command::Help) => print!("{}", args::HELP),
        Ok(Command::Version) => println!("mayfly-jailer v{}", env!("CARGO_PKG_VERSION")),
        Ok(Command::Run(args)) => return report(run(&args, start)),
        Ok(Command::Cleanup(args)) => return report(clean_up(&args)),
        Err(error) => return report(Err(error.into())),
    }
    ExitCode::SUCCESS
}

fn report(result: Result<u8>) -> ExitCode {
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("{error}\nError: {}", error.details());
            ExitCode::FAILURE
        }
    }
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
    eprintln!("mayfly-jailer: without root: the VM runs as you, in a user namespace, and keeps your groups");
    if plan.cgroups.is_empty() {
        eprintln!(
            "mayfly-jailer: without root: no cgroup limits the VM, unless --cgroup names one in a delegated group"
        );
    }
}
