//! How much CPU time `mayfly` takes to answer a request, the client's left out: of all its threads, in user and kernel
//! mode. It needs no KVM and runs at the machine's own speed.
//!
//! usage: api MAYFLY; prints a line `NAME VALUE` per kind of request, in microseconds.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use mayfly_tests::{Client, Result, Scratch, cpu_time};

/// Requests of a kind, in rounds; the median round counts.
const ROUNDS: usize = 21;
const REQUESTS: u32 = 200;

fn main() -> Result {
    let Some(mayfly) = std::env::args().skip(1).find(|word| !word.starts_with("--")) else {
        println!("usage: api MAYFLY; `make bench` calls it");
        return Ok(());
    };
    let scratch = Scratch::new("api")?;
    let (socket, disk) = (scratch.join("api.sock"), scratch.file("disk", vec![0; 1 << 20])?);
    let mut monitor = Command::new(&mayfly)
        .arg("--api-sock")
        .arg(&socket)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()?;
    let figures = measure(&socket, &disk, monitor.id());
    monitor.kill()?;
    monitor.wait()?;
    for (name, us) in figures? {
        println!("{name} {us:.1}");
    }
    Ok(())
}

/// The figures of all kinds.
fn measure(socket: &Path, disk: &Path, pid: u32) -> Result<Vec<(&'static str, f64)>> {
    let mut client = connect(socket)?;
    let drive =
        serde_json::json!({"drive_id": "d", "path_on_host": disk, "is_root_device": false}).to_string();
    let kinds = [
        ("get_instance_us", "GET", "/", ""),
        ("get_vm_config_us", "GET", "/vm/config", ""),
        ("put_drive_us", "PUT", "/drives/d", &drive),
        ("get_metrics_us", "GET", "/metrics", ""),
    ];
    let time = |(name, method, path, body)| {
        let round = |_| -> Result<f64> {
            let before = cpu_time(pid)?;
            for _ in 0..REQUESTS {
                client.request(method, path, body)?.success()?;
            }
            Ok((cpu_time(pid)? - before).as_secs_f64() * 1e6 / f64::from(REQUESTS))
        };
        let mut times = (0..ROUNDS).map(round).collect::<Result<Vec<_>>>()?;
        times.sort_by(f64::total_cmp);
        Ok((name, times[ROUNDS / 2]))
    };
    kinds.into_iter().map(time).collect()
}

fn connect(socket: &Path) -> Result<Client> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match Client::connect(socket) {
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
            result => return result,
        }
    }
}
