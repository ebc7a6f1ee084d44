//! How much CPU time `mayfly` takes from its start until its API socket answers: the median of many starts, of all its
//! threads, in user and kernel mode. It needs no KVM and runs at the machine's own speed.
//!
//! usage: startup MAYFLY; prints `startup_cpu_us VALUE` and the quartiles.

use std::fs;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use mayfly_tests::{Failure, Result, Scratch};

const STARTS: usize = 200;

fn main() -> Result {
    let Some(mayfly) = std::env::args().skip(1).find(|word| !word.starts_with("--")) else {
        println!("usage: startup MAYFLY; `make bench` calls it");
        return Ok(());
    };
    let mut times = (0..STARTS).map(|_| start(&mayfly)).collect::<Result<Vec<_>>>()?;
    times.sort_unstable();
    println!("startup_cpu_us {}", times[STARTS / 2]);
    println!(
        "startup_cpu_us_quartiles {}-{}",
        times[STARTS / 4],
        times[STARTS * 3 / 4]
    );
    Ok(())
}

/// CPU time of one start, in microseconds.
fn start(mayfly: &str) -> Result<u64> {
    let scratch = Scratch::new("startup")?;
    let socket = scratch.join("api.sock");
    let mut monitor = Command::new(mayfly)
        .arg("--api-sock")
        .arg(&socket)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while UnixStream::connect(&socket).is_err() {
        if Instant::now() > deadline {
            monitor.kill()?;
            return Err(Failure::new("the API socket did not appear in 10 s"));
        }
        thread::sleep(Duration::from_micros(200));
    }
    let time = cpu_time_us(monitor.id());
    monitor.kill()?;
    monitor.wait()?;
    time
}

/// CPU time of all threads: the first field of each schedstat, in nanoseconds.
fn cpu_time_us(pid: u32) -> Result<u64> {
    let mut nanoseconds = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(thread?.path().join("schedstat"))?;
        nanoseconds += text.split(' ').next().unwrap_or_default().parse::<u64>()?;
    }
    Ok(nanoseconds / 1000)
}
