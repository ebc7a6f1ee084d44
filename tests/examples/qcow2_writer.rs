//! A guest's disk in a process of its own, for tests that kill it: it writes random sectors of a qcow2 image through the
//! block device, with plain memory in place of a machine, and tells on its standard output what it did.
//!
//! usage: qcow2_writer IMAGE CACHE_TYPE SEED
//!
//! Each request prints two lines: `begin STAMP SECTOR COUNT` before it, and `done STAMP` after its answer; a flush, which
//! there is only with Writeback, has the count 0. A sector that was written says its stamp, over and over.

use std::io::{self, Write};

use devices::GuestMemory;
use devices::testing::{self, Driver, Recorder, readable, writable};
use devices::virtio::block::{Block, Config};
use devices::virtio::{Queue, VirtioDevice, feature};
use serde_json::json;
use vm_memory::{Bytes, GuestAddress};

/// Where requests lie in guest memory, behind the queue.
const HEADER: u64 = 0x10000;
const STATUS: u64 = 0x10100;
const DATA: u64 = 0x20000;
const MEMORY: usize = 1 << 20;

const OUT: u32 = 1;
const FLUSH: u32 = 4;
const F_FLUSH: u64 = 1 << 9;

/// The most sectors of a request.
const MOST: u64 = 64;

struct Guest<'m> {
    mem: &'m GuestMemory,
    driver: Driver<'m>,
    queues: Vec<Queue>,
    recorder: Recorder,
    device: Block,
}

impl Guest<'_> {
    fn request(&mut self, kind: u32, sector: u64, len: u32) -> Option<u8> {
        let header = u128::from(kind) | u128::from(sector) << 64;
        self.mem
            .write_slice(&header.to_le_bytes(), GuestAddress(HEADER))
            .ok()?;
        let mut pieces = vec![readable(HEADER, 16)];
        if len > 0 {
            pieces.push(readable(DATA, len));
        }
        pieces.push(writable(STATUS, 1));
        self.driver.offer(&pieces);
        let features = feature::COMMON | F_FLUSH;
        let mut io = testing::io(self.mem, &mut self.queues, &self.recorder, features);
        self.device.on_queue(0, &mut io).ok()?;
        self.driver.used()?;
        self.mem.read_obj(GuestAddress(STATUS)).ok()
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [image, cache_type, seed] = args.as_slice() else {
        return Err("usage: qcow2_writer IMAGE CACHE_TYPE SEED".into());
    };
    let config: Config = serde_json::from_value(json!({
        "drive_id": "disk", "is_root_device": false, "path_on_host": image, "cache_type": cache_type,
        "format": "qcow2", "backing": "allow",
    }))?;
    let mem = testing::memory(MEMORY);
    let driver = Driver::new(&mem, 0, 256);
    let mut guest = Guest {
        mem: &mem,
        queues: vec![driver.queue(true)],
        driver,
        recorder: Recorder::default(),
        device: config.build()?,
    };
    let sectors = u64::from_le_bytes(guest.device.config_space()[..8].try_into()?);
    let (mut random, mut out) = (seed.parse::<u64>()? | 1, io::stdout().lock());
    let (first, flushes) = (random << 32, cache_type == "Writeback");
    for stamp in first.. {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let count = if flushes && random.is_multiple_of(8) {
            0
        } else {
            1 + random / 8 % MOST
        };
        let sector = (random >> 16) % (sectors - count);
        // The pipe keeps what was written when the process is killed.
        writeln!(out, "begin {stamp} {sector} {count}")?;
        let data: Vec<u8> = std::iter::repeat_n(stamp.to_le_bytes(), usize::try_from(count * 64)?)
            .flatten()
            .collect();
        mem.write_slice(&data, GuestAddress(DATA))?;
        let kind = if count == 0 { FLUSH } else { OUT };
        let status = guest.request(kind, sector, u32::try_from(data.len())?);
        if status != Some(0) {
            return Err(format!("request {stamp} has the status {status:?}").into());
        }
        writeln!(out, "done {stamp}")?;
    }
    Ok(())
}
