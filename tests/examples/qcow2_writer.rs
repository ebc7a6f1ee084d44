//! A guest's disk in a process of its own, for tests that kill it: it writes random sectors of a qcow2 image through the
//! block device, with plain memory in place of a machine, and tells on its standard output what it did.
//!
//! usage: qcow2_writer IMAGE CACHE_TYPE IO_ENGINE SEED
//!
//! Each request prints two lines: `begin STAMP SECTOR COUNT` before it, and `done STAMP` after its answer; a flush, which
//! there is only with Writeback, has the count 0. A sector that was written says its stamp, over and over.

use std::io::{self, Write};

use devices::testing::{self, BlockDriver, BlockRequest, Random};
use devices::virtio::block::Config;
use serde_json::json;

const MEMORY: usize = 1 << 20;
/// The most sectors of a request.
const MOST: u64 = 64;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [image, cache_type, io_engine, seed] = args.as_slice() else {
        return Err("usage: qcow2_writer IMAGE CACHE_TYPE IO_ENGINE SEED".into());
    };
    let config: Config = serde_json::from_value(json!({
        "drive_id": "disk", "is_root_device": false, "path_on_host": image, "cache_type": cache_type,
        "format": "qcow2", "backing": "allow", "io_engine": io_engine,
    }))?;
    let mem = testing::memory(MEMORY);
    let mut disk = BlockDriver::new(&mem, config.build()?);
    let (seed, flushes) = (seed.parse::<u64>()?, cache_type == "Writeback");
    let (mut random, mut out) = (Random::new(seed), io::stdout().lock());
    for stamp in (seed + 1) << 32.. {
        let flush = flushes && random.below(8) == 0;
        let count = if flush { 0 } else { 1 + random.below(MOST) };
        let sector = random.below(disk.sectors() - count);
        // The pipe keeps what was written when the process is killed.
        writeln!(out, "begin {stamp} {sector} {count}")?;
        let data = stamp.to_le_bytes().repeat(usize::try_from(count * 64)?);
        disk.fill(0, &data);
        let request = if flush {
            BlockRequest::Flush
        } else {
            BlockRequest::Write
        };
        disk.offer(0, request, sector, u32::try_from(data.len())?);
        disk.run(1);
        writeln!(out, "done {stamp}")?;
    }
    Ok(())
}
