//! What a qcow2 image costs beside a raw one, once its clusters are allocated: random requests of 4 KiB through the block
//! device, with plain memory in place of a machine and images in the host's memory. Prints nanoseconds of CPU time for each request.

use std::fs;
use std::path::Path;

use devices::GuestMemory;
use devices::testing::{self, Driver, Recorder, readable, writable};
use devices::virtio::block::{Block, Config};
use devices::virtio::{Queue, VirtioDevice, feature};
use mayfly_tests::{Failure, Result, Scratch, create_qcow2, zeros};
use serde_json::json;
use vm_memory::{Bytes, GuestAddress};

/// Where requests lie in guest memory, behind the queue.
const HEADER: u64 = 0x10000;
const STATUS: u64 = 0x14000;
const DATA: u64 = 0x20000;
const MEMORY: usize = 16 << 20;

const IN: u32 = 0;
const OUT: u32 = 1;

const DISK: u64 = 256 << 20;
const BLOCK: u32 = 4096;
/// Requests that are offered together, and how many in all.
const BATCH: u64 = 32;
const REQUESTS: u64 = 200_000;

struct Guest<'m> {
    mem: &'m GuestMemory,
    driver: Driver<'m>,
    queues: Vec<Queue>,
    recorder: Recorder,
    device: Block,
}

impl<'m> Guest<'m> {
    fn new(mem: &'m GuestMemory, image: &Path, format: &str) -> Result<Self> {
        let config: Config = serde_json::from_value(json!({
            "drive_id": "disk", "is_root_device": false, "path_on_host": image, "cache_type": "Writeback",
            "format": format,
        }))?;
        let driver = Driver::new(mem, 0, 256);
        Ok(Self {
            mem,
            queues: vec![driver.queue(true)],
            driver,
            recorder: Recorder::default(),
            device: config.build()?,
        })
    }

    /// Offers a request of `len` bytes at `offset` of the disk, as number `slot` of its batch.
    fn offer(&mut self, slot: u64, kind: u32, offset: u64, len: u32) -> Result {
        let header = u128::from(kind) | u128::from(offset / 512) << 64;
        let place = HEADER + slot * 16;
        self.mem.write_slice(&header.to_le_bytes(), GuestAddress(place))?;
        let data = DATA + slot * u64::from(len);
        let data = if kind == IN {
            writable(data, len)
        } else {
            readable(data, len)
        };
        self.driver
            .offer(&[readable(place, 16), data, writable(STATUS + slot, 1)]);
        Ok(())
    }

    /// Lets the device work until all is answered.
    fn run(&mut self, count: u64) -> Result {
        let mut answered = 0;
        while answered < count {
            let mut io = testing::io(
                self.mem,
                &mut self.queues,
                &self.recorder,
                feature::COMMON | 1 << 9,
            );
            self.device.on_queue(0, &mut io)?;
            while self.driver.used().is_some() {
                answered += 1;
            }
        }
        for slot in 0..count {
            let status: u8 = self.mem.read_obj(GuestAddress(STATUS + slot))?;
            if status != 0 {
                return Err(Failure::new(format!("a request has the status {status}")));
            }
        }
        Ok(())
    }

    /// Allocates every cluster.
    fn fill(&mut self) -> Result {
        let step = 1 << 20;
        for offset in (0..DISK).step_by(step) {
            self.offer(0, OUT, offset, u32::try_from(step)?)?;
            self.run(1)?;
        }
        Ok(())
    }

    /// Nanoseconds for each of many random requests.
    fn time(&mut self, kind: u32) -> Result<f64> {
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let start = cpu_time()?;
        for _ in 0..REQUESTS / BATCH {
            for slot in 0..BATCH {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                self.offer(
                    slot,
                    kind,
                    random % (DISK / u64::from(BLOCK)) * u64::from(BLOCK),
                    BLOCK,
                )?;
            }
            self.run(BATCH)?;
        }
        Ok((cpu_time()? - start) / REQUESTS as f64)
    }
}

/// Nanoseconds that this thread has run, which others on this machine do not change much.
fn cpu_time() -> Result<f64> {
    let times = fs::read_to_string("/proc/thread-self/schedstat")?;
    Ok(times.split(' ').next().unwrap_or_default().parse()?)
}

fn main() -> Result {
    let scratch = Scratch::new("bench-disk")?;
    let (raw, qcow2) = (scratch.join("disk.raw"), scratch.join("disk.qcow2"));
    zeros(&raw, DISK)?;
    create_qcow2(&qcow2, None, &DISK.to_string())?;
    let mem = testing::memory(MEMORY);
    for (kind, name) in [(IN, "read"), (OUT, "write")] {
        let mut times = Vec::new();
        for (image, format) in [(&raw, "raw"), (&qcow2, "qcow2")] {
            let mut guest = Guest::new(&mem, image, format)?;
            guest.fill()?;
            // The best of three: others work on this machine too.
            let tries = [guest.time(kind)?, guest.time(kind)?, guest.time(kind)?];
            times.push(tries.into_iter().fold(f64::INFINITY, f64::min));
        }
        println!("disk_{name}_raw_ns {:.0}", times[0]);
        println!("disk_{name}_qcow2_ns {:.0}", times[1]);
        println!("disk_{name}_ratio {:.2}", times[1] / times[0]);
    }
    fs::remove_file(&raw)?;
    Ok(())
}
