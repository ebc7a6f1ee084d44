//! How much CPU time `mayfly` takes from its start until its API socket answers: the median of many starts, of all its
//! threads, in user and kernel mode. It needs no KVM and runs at the machine's own speed. With a jailer, also that of a start
//! in a jail, by root: the time of the jailer and of the process that it makes.
//!
//! usage: startup MAYFLY [JAILER]; prints `startup_cpu_us VALUE` and the quartiles, and the same for `jailed_startup_cpu_us`.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use mayfly_tests::{Failure, Result, Scratch, cpu_time};

const STARTS: usize = 200;

fn main() -> Result {
    let words: Vec<_> = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with("--"))
        .collect();
    match words.as_slice() {
        [mayfly] => report("startup_cpu_us", |folder| start(mayfly, folder)),
        [mayfly, jailer] => {
            report("startup_cpu_us", |folder| start(mayfly, folder))?;
            report("jailed_startup_cpu_us", |folder| {
                start_in_jail(mayfly, jailer, folder)
            })
        }
        _ => {
            println!("usage: startup MAYFLY [JAILER]; `make bench` calls it");
            Ok(())
        }
    }
}

/// Prints the median and the quartiles of many starts, in microseconds. What they leave is removed after the last one: ext4
/// does not use the inodes of what was removed in the last five seconds, and looks for others longer than a start does
/// that is not one of hundreds in a row.
fn report(name: &str, start: impl Fn(&Path) -> Result<Duration>) -> Result {
    let scratch = Scratch::new("startup")?;
    let in_new_folder = |number: usize| {
        let folder = scratch.join(number.to_string());
        fs::create_dir(&folder)?;
        start(&folder)
    };
    let mut times = (0..STARTS).map(in_new_folder).collect::<Result<Vec<_>>>()?;
    times.sort_unstable();
    let us = |place: usize| times[place].as_micros();
    println!("{name} {}", us(STARTS / 2));
    println!("{name}_quartiles {}-{}", us(STARTS / 4), us(STARTS * 3 / 4));
    Ok(())
}

/// CPU time of one start.
fn start(mayfly: &str, folder: &Path) -> Result<Duration> {
    let socket = folder.join("api.sock");
    let mut command = Command::new(mayfly);
    command.arg("--api-sock").arg(&socket);
    timed(&mut command, &socket, cpu_time)
}

/// CPU time of one start in a new jail.
fn start_in_jail(mayfly: &str, jailer: &str, folder: &Path) -> Result<Duration> {
    let name = Path::new(mayfly).file_name().unwrap_or_default();
    let root = folder.join(name).join("bench/root");
    let mut command = Command::new(jailer);
    command.args([
        "--id",
        "bench",
        "--uid",
        "54321",
        "--gid",
        "54321",
        "--exec-file",
        mayfly,
    ]);
    command.arg("--chroot-base-dir").arg(folder);
    command.args(["--", "--api-sock", "/run/api.sock"]);
    timed(&mut command, &root.join("run/api.sock"), |jailer| {
        let monitor = fs::read_to_string(root.join("mayfly.pid"))?.parse()?;
        Ok(cpu_time(jailer)? + cpu_time(monitor)?)
    })
}

/// Starts a process, asks for its time when its socket is there, and kills it.
fn timed(command: &mut Command, socket: &Path, time: impl Fn(u32) -> Result<Duration>) -> Result<Duration> {
    let mut process = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while UnixStream::connect(socket).is_err() {
        if Instant::now() > deadline {
            process.kill()?;
            return Err(Failure::new("the API socket did not appear in 10 s"));
        }
        thread::sleep(Duration::from_micros(200));
    }
    let time = time(process.id());
    process.kill()?;
    process.wait()?;
    time
}
