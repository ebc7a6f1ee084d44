//! A process with a copy-on-write image is killed at any moment, again and again: the image is whole, what was flushed
//! is there, and nothing is there that was not written.
//!
//! `MAYFLY_QCOW2_KILLS` sets how often (default 24).

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use mayfly_tests::{Failure, Result, Scratch, check_qcow2, pattern, qemu_img, read_qcow2, wait_until};

const SECTOR: usize = 512;
const DISK: &str = "8M";
const BASE: usize = 5 << 20;

/// The example `qcow2_writer`, which is built with the tests.
fn writer() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    let writer = program
        .ancestors()
        .nth(2)
        .map(|folder| folder.join("examples/qcow2_writer"));
    let missing = || Failure::new("no example qcow2_writer: cargo build -p mayfly-tests --examples");
    writer.filter(|path| path.exists()).ok_or_else(missing)
}

/// Lets the writer work on the image for a while and kills it; returns what it said.
fn write_and_kill(image: &Path, [cache_type, io_engine]: [&str; 2], seed: u64, log: &Path) -> Result<String> {
    let mut child = Command::new(writer()?)
        .arg(image)
        .args([cache_type, io_engine, &seed.to_string()])
        .stdout(File::create(log)?)
        .spawn()?;
    while fs::metadata(log)?.len() == 0 {
        if let Some(status) = child.try_wait()? {
            return Err(Failure::new(format!("qcow2_writer ended by itself: {status}")));
        }
        thread::sleep(Duration::from_millis(1));
    }
    thread::sleep(Duration::from_micros(
        seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) % 250_000,
    ));
    child.kill()?;
    let status = child.wait()?;
    if status.code().is_some() {
        return Err(Failure::new(format!("qcow2_writer ended by itself: {status}")));
    }
    if io_engine == "Async" {
        // What the kernel was doing goes on a moment longer, and keeps the image locked.
        wait_until("the image is free", Duration::from_secs(60), || {
            qemu_img([OsStr::new("info"), image.as_os_str()]).is_ok()
        })?;
    }
    Ok(fs::read_to_string(log)?)
}

/// What a sector may hold: what it held before, or stamps of writes.
#[derive(Clone)]
struct Allowed {
    before: bool,
    stamps: Vec<u64>,
}

/// What each sector may hold after the requests of `log`. In an unsafe cache every answer counts as a flush.
fn allowed(log: &str, sectors: usize, every_answer: bool) -> Result<Vec<Allowed>> {
    let none = Allowed {
        before: true,
        stamps: Vec::new(),
    };
    let mut disk = vec![none; sectors];
    let lines: Vec<Vec<&str>> = log.lines().map(|line| line.split(' ').collect()).collect();
    let flushes = |line: &[&str], next: Option<&Vec<&str>>| {
        line[0] == "begin" && next.is_some() && (every_answer || line[3] == "0")
    };
    let last_flush = (0..lines.len())
        .rev()
        .find(|&index| flushes(&lines[index], lines.get(index + 1)));
    for (index, line) in lines.iter().enumerate() {
        // The last line may be cut off before its end, but then the request had not begun.
        let ["begin", stamp, start, count] = line.as_slice() else {
            continue;
        };
        let (stamp, start, count): (u64, usize, usize) = (stamp.parse()?, start.parse()?, count.parse()?);
        for sector in &mut disk[start..start + count] {
            if last_flush.is_some_and(|flush| index < flush || every_answer && index == flush) {
                *sector = Allowed {
                    before: false,
                    stamps: Vec::new(),
                };
            }
            sector.stamps.push(stamp);
        }
    }
    Ok(disk)
}

fn assert_content(before: &[u8], after: &[u8], allowed: &[Allowed], round: u64) {
    for (number, allowed) in allowed.iter().enumerate() {
        let range = number * SECTOR..(number + 1) * SECTOR;
        let sector = &after[range.clone()];
        let is_stamp = |stamp: &u64| sector.chunks(8).all(|part| part == stamp.to_le_bytes());
        let good = allowed.before && *sector == before[range] || allowed.stamps.iter().any(is_stamp);
        assert!(
            good,
            "round {round}: sector {number} holds what it must not: {:?}",
            &sector[..16]
        );
    }
}

#[test]
fn an_image_survives_the_death_of_its_process() -> Result {
    let kills: u64 = std::env::var("MAYFLY_QCOW2_KILLS").map_or(Ok(24), |count| count.parse())?;
    let scratch = Scratch::new("kill")?;
    let base = scratch.file("base.raw", pattern(BASE))?;
    let (image, log) = (scratch.join("disk.qcow2"), scratch.join("log"));
    let (base_path, image_path) = (
        base.to_str().unwrap_or_default(),
        image.to_str().unwrap_or_default(),
    );
    let mut requests = 0;
    for round in 0..kills {
        if round % 12 == 0 {
            let _ = fs::remove_file(&image);
            qemu_img([
                "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base_path, image_path, DISK,
            ])?;
        }
        let before = read_qcow2(&image)?;
        let cache_type = if round % 2 == 0 { "Writeback" } else { "Unsafe" };
        let io_engine = if round % 4 < 2 { "Sync" } else { "Async" };
        let said = write_and_kill(&image, [cache_type, io_engine], round + 1, &log)?;
        requests += said.lines().filter(|line| line.starts_with("done")).count();
        check_qcow2(&image)?;
        let allowed = allowed(&said, before.len() / SECTOR, cache_type == "Unsafe")?;
        assert_content(&before, &read_qcow2(&image)?, &allowed, round);
    }
    println!("{kills} kills after {requests} requests");
    assert!(requests > 0, "no request was answered");
    assert!(fs::read(&base)? == pattern(BASE), "the base was changed");
    Ok(())
}
