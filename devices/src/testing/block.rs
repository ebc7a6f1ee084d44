//! [`BlockDriver`]: the driver's side of a block device, for programs that are about its images.

use std::thread;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::{Driver, Recorder, io, readable, writable};
use crate::GuestMemory;
use crate::virtio::block::Block;
use crate::virtio::{Queue, VirtioDevice, feature};

/// Where requests lie in guest memory, behind the queue.
const HEADER: u64 = 0x10000;
const STATUS: u64 = 0x14000;
const DATA: u64 = 0x20000;

const QUEUE_SIZE: u16 = 256;
const F_FLUSH: u64 = 1 << 9;

/// What a request asks for (virtio 1.2 §5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum BlockRequest {
    /// `VIRTIO_BLK_T_IN`.
    Read = 0,
    /// `VIRTIO_BLK_T_OUT`.
    Write = 1,
    /// `VIRTIO_BLK_T_FLUSH`.
    Flush = 4,
}

/// A block device and its driver, which panics when anything fails.
pub struct BlockDriver<'m> {
    mem: &'m GuestMemory,
    driver: Driver<'m>,
    queues: Vec<Queue>,
    recorder: Recorder,
    device: Block,
}

impl<'m> BlockDriver<'m> {
    /// Drives a device through a queue in `mem`.
    pub fn new(mem: &'m GuestMemory, device: Block) -> Self {
        let driver = Driver::new(mem, 0, QUEUE_SIZE);
        Self {
            mem,
            queues: vec![driver.queue(true)],
            driver,
            recorder: Recorder::default(),
            device,
        }
    }

    /// The size of the disk in sectors.
    pub fn sectors(&self) -> u64 {
        u64::from_le_bytes(self.device.config_space()[..8].try_into().unwrap())
    }

    /// Puts data where the request `slot` of that length has it.
    pub fn fill(&self, slot: u64, data: &[u8]) {
        let place = DATA + slot * data.len() as u64;
        self.mem.write_slice(data, GuestAddress(place)).unwrap();
    }

    /// Offers a request of `len` bytes from a sector on, as number `slot` of those that are answered together.
    pub fn offer(&mut self, slot: u64, request: BlockRequest, sector: u64, len: u32) {
        let header = u128::from(request as u32) | u128::from(sector) << 64;
        let place = HEADER + slot * 16;
        self.mem
            .write_slice(&header.to_le_bytes(), GuestAddress(place))
            .unwrap();
        let (place, status) = (readable(place, 16), writable(STATUS + slot, 1));
        let data = DATA + slot * u64::from(len);
        match request {
            BlockRequest::Read => self.driver.offer(&[place, writable(data, len), status]),
            BlockRequest::Write => self.driver.offer(&[place, readable(data, len), status]),
            BlockRequest::Flush => self.driver.offer(&[place, status]),
        };
    }

    /// Lets the device work until it has answered `count` requests, of which none may have failed.
    pub fn run(&mut self, count: u64) {
        let mut answered = 0;
        while answered < count {
            let features = feature::COMMON | F_FLUSH;
            let mut io = io(self.mem, &mut self.queues, &self.recorder, features);
            self.device.on_queue(0, &mut io).unwrap();
            let new = std::iter::from_fn(|| self.driver.used()).count() as u64;
            answered += new;
            if new == 0 {
                // The kernel carries them out, and needs no help.
                thread::sleep(Duration::from_micros(20));
            }
        }
        for slot in 0..count {
            let status: u8 = self.mem.read_obj(GuestAddress(STATUS + slot)).unwrap();
            assert_eq!(status, 0, "a request failed");
        }
    }

    /// Writes everything once, so that all of an image is allocated.
    pub fn write_all(&mut self) {
        const STEP: u32 = 1 << 20;
        for sector in (0..self.sectors()).step_by(STEP as usize / 512) {
            self.offer(0, BlockRequest::Write, sector, STEP);
            self.run(1);
        }
    }
}
