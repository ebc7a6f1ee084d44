//! What a qcow2 image costs beside a raw one, once its clusters are allocated: random requests of 4 KiB through the block
//! device, with plain memory in place of a machine and images in the host's memory. Prints nanoseconds of CPU time for each request.

use std::path::Path;

use devices::GuestMemory;
use devices::testing::{self, BlockDriver, BlockRequest, Random};
use devices::virtio::block::Config;
use mayfly_tests::{Result, Scratch, cpu_time, create_qcow2, zeros};
use serde_json::json;

const MEMORY: usize = 16 << 20;
const DISK: u64 = 256 << 20;
const BLOCK: u32 = 4096;
/// Requests that are offered together, and how many in all.
const BATCH: u64 = 32;
const REQUESTS: u64 = 200_000;

/// Nanoseconds for each of many random requests.
fn time(disk: &mut BlockDriver<'_>, request: BlockRequest) -> Result<f64> {
    let (mut random, block_sectors) = (Random::new(1), u64::from(BLOCK) / 512);
    let start = cpu_time(std::process::id())?;
    for _ in 0..REQUESTS / BATCH {
        for slot in 0..BATCH {
            let block = random.below(DISK / u64::from(BLOCK));
            disk.offer(slot, request, block * block_sectors, BLOCK);
        }
        disk.run(BATCH);
    }
    let time = cpu_time(std::process::id())? - start;
    Ok(time.as_nanos() as f64 / REQUESTS as f64)
}

fn main() -> Result {
    let scratch = Scratch::new("bench-disk")?;
    let (raw, qcow2) = (scratch.join("disk.raw"), scratch.join("disk.qcow2"));
    zeros(&raw, DISK)?;
    create_qcow2(&qcow2, None, &DISK.to_string())?;
    let mem = testing::memory(MEMORY);
    for (request, name) in [
        (BlockRequest::Read, "disk_read"),
        (BlockRequest::Write, "disk_write"),
    ] {
        compare(&mem, [&raw, &qcow2], "Sync", request, name)?;
        compare(&mem, [&raw, &qcow2], "Async", request, &format!("async_{name}"))?;
    }
    Ok(())
}

/// Prints what a request takes with a raw image, with a qcow2 image, and the ratio.
fn compare(mem: &GuestMemory, images: [&Path; 2], engine: &str, request: BlockRequest, name: &str) -> Result {
    let mut times = Vec::new();
    for (image, format) in images.iter().zip(["raw", "qcow2"]) {
        let config: Config = serde_json::from_value(json!({
            "drive_id": "disk", "is_root_device": false, "path_on_host": image, "cache_type": "Writeback",
            "format": format, "io_engine": engine,
        }))?;
        let mut disk = BlockDriver::new(mem, config.build()?);
        disk.write_all();
        // The best of three: others work on this machine too.
        let tries = [
            time(&mut disk, request)?,
            time(&mut disk, request)?,
            time(&mut disk, request)?,
        ];
        times.push(tries.into_iter().fold(f64::INFINITY, f64::min));
    }
    println!("{name}_raw_ns {:.0}", times[0]);
    println!("{name}_qcow2_ns {:.0}", times[1]);
    println!("{name}_ratio {:.2}", times[1] / times[0]);
    Ok(())
}
