//! Tests of the drive, with a driver in plain memory and images in temporary files.

mod config;
mod direct;
mod discard;
mod full;
mod limits;
mod live;
mod locks;
mod noise;
mod overlap;
mod overlap_qcow2;
mod queues;
mod requests;

use std::io::Write;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempfile::TempFile;

use super::{Block, CacheType, Config};
use crate::GuestMemory;
use crate::testing::{self, Driver, Piece, Recorder, readable, writable};
use crate::virtio::{DeviceError, Queue, VirtioDevice, feature};

/// Where requests lie in guest memory, behind the queue.
const HEADER: u64 = 0x10000;
const STATUS: u64 = 0x10100;
const DATA: u64 = 0x20000;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

const F_FLUSH: u64 = 1 << 9;

/// An image of `len` bytes, each sector filled with its number counted from one.
fn image(len: usize) -> TempFile {
    let file = TempFile::new().unwrap();
    let bytes: Vec<u8> = (0..len)
        .map(|i| u8::try_from(i / 512 % 255 + 1).unwrap())
        .collect();
    file.as_file().write_all(&bytes).unwrap();
    file
}

fn path(image: &TempFile) -> String {
    image.as_path().to_str().unwrap().into()
}

fn content(image: &TempFile) -> Vec<u8> {
    std::fs::read(image.as_path()).unwrap()
}

fn config(image: &TempFile) -> Config {
    Config {
        drive_id: "data".into(),
        partuuid: None,
        is_root_device: false,
        cache_type: CacheType::Unsafe,
        is_read_only: None,
        path_on_host: Some(path(image)),
        rate_limiter: None,
        io_engine: None,
        socket: None,
        direct: false,
        queues: None,
        format: None,
        backing: None,
        backing_files: None,
    }
}

fn device(image: &TempFile) -> Block {
    config(image).build().unwrap()
}

fn flushing(image: &TempFile) -> Block {
    Config {
        cache_type: CacheType::Writeback,
        ..config(image)
    }
    .build()
    .unwrap()
}

fn read_only(image: &TempFile) -> Block {
    Config {
        is_read_only: Some(true),
        ..config(image)
    }
    .build()
    .unwrap()
}

/// The guest: a driver, and the loop that calls the device.
struct Guest<'m> {
    mem: &'m GuestMemory,
    driver: Driver<'m>,
    queues: Vec<Queue>,
    recorder: Recorder,
    features: u64,
}

impl<'m> Guest<'m> {
    fn new(mem: &'m GuestMemory) -> Self {
        let driver = Driver::new(mem, 0, 256);
        Self {
            mem,
            queues: vec![driver.queue(true)],
            driver,
            recorder: Recorder::default(),
            features: feature::COMMON | F_FLUSH,
        }
    }

    fn fill(&self, address: u64, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn header(&self, address: u64, kind: u32, sector: u64) {
        self.fill(address, &kind.to_le_bytes());
        self.fill(address + 4, &[0; 4]);
        self.fill(address + 8, &sector.to_le_bytes());
    }

    /// Calls the device once; returns the queue that it wants to be called for again.
    fn kick(&mut self, device: &mut Block) -> Result<Option<u16>, DeviceError> {
        let mut io = testing::io(self.mem, &mut self.queues, &self.recorder, self.features);
        device.on_queue(0, &mut io)?;
        Ok(io.again)
    }

    /// Activates the device.
    fn activate(&mut self, device: &mut Block) {
        let mut io = testing::io(self.mem, &mut self.queues, &self.recorder, self.features);
        device.activate(&mut io).unwrap();
    }

    /// Tells the device that its limiter's timer has expired.
    fn expire(&mut self, device: &mut Block) {
        let mut io = testing::io(self.mem, &mut self.queues, &self.recorder, self.features);
        device.on_event(0, &mut io).unwrap();
        if io.again.is_some() {
            self.drain(device);
        }
    }

    /// Offers a request of `sectors` from sector 0 on, without a kick.
    fn offer(&mut self, kind: u32, sectors: u32) {
        let header = HEADER + 0x200 * u64::from(kind % 16);
        self.header(header, kind, 0);
        let data = match kind {
            OUT => readable(DATA, 512 * sectors),
            _ => writable(DATA, 512 * sectors),
        };
        self.driver
            .offer(&[readable(header, 16), data, writable(STATUS, 1)]);
    }

    /// How many requests were answered since the last call.
    fn answered(&mut self) -> usize {
        std::iter::from_fn(|| self.driver.used()).count()
    }

    /// Calls the device until it is done; returns how often.
    fn drain(&mut self, device: &mut Block) -> usize {
        let mut calls = 1;
        while self.kick(device).unwrap().is_some() {
            calls += 1;
        }
        calls
    }

    /// Sends a request with header, data and status in descriptors of their own; returns the status and the count
    /// of bytes written.
    fn request(&mut self, device: &mut Block, kind: u32, sector: u64, data: &[Piece]) -> (u8, u32) {
        self.header(HEADER, kind, sector);
        let mut pieces = vec![readable(HEADER, 16)];
        pieces.extend(data);
        pieces.push(writable(STATUS, 1));
        self.send(device, &pieces)
    }

    /// The same, waiting for what lands later; it succeeds.
    fn request_until_done(&mut self, device: &mut Block, kind: u32, sector: u64, data: &[Piece]) {
        self.header(HEADER, kind, sector);
        let mut pieces = vec![readable(HEADER, 16)];
        pieces.extend(data);
        pieces.push(writable(STATUS, 1));
        self.fill(STATUS, &[0xee]);
        self.driver.offer(&pieces);
        self.drain(device);
        let mut io = testing::io(self.mem, &mut self.queues, &self.recorder, self.features);
        device.quiesce(&mut io).unwrap();
        assert!(self.driver.used().is_some());
        assert_eq!(self.bytes(STATUS, 1), [OK]);
    }

    /// Sends a chain whose status byte is at [`STATUS`].
    fn send(&mut self, device: &mut Block, pieces: &[Piece]) -> (u8, u32) {
        self.driver.offer(pieces);
        self.finish(device)
    }

    fn finish(&mut self, device: &mut Block) -> (u8, u32) {
        self.fill(STATUS, &[0xee]);
        self.drain(device);
        let (_, written) = self.driver.used().expect("every request is answered");
        (self.bytes(STATUS, 1)[0], written)
    }
}
