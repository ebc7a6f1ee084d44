//! Tests of the memory device, with a driver in plain memory and a host that keeps account.

mod blocks;
mod config;
mod live;
mod noise;
mod requests;
mod state;

use serde_json::json;
use vm_memory::{Bytes, GuestAddress};

use super::{Config, Mem, Status};
use crate::GuestMemory;
use crate::testing::{self, Driver, LEDGER_START, Ledger, Recorder, readable, writable};
use crate::virtio::{DeviceError, Queue, UpdateError, VirtioDevice};

const MIB: u64 = 1 << 20;
/// Bytes of RAM.
const MEMORY: usize = 1 << 20;

/// Where the queue, requests and responses lie in guest memory.
const RINGS: u64 = 0x1000;
const REQUEST: u64 = 0x8000;
const RESPONSE: u64 = 0x9000;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

/// 1 GiB in blocks of 2 MiB and slots of 128 MiB.
fn config() -> Config {
    Config {
        total_size_mib: 1024,
        block_size_mib: 2,
        slot_size_mib: 128,
    }
}

/// A device and its driver.
struct Guest<'m> {
    mem: &'m GuestMemory,
    device: Mem,
    ledger: Ledger,
    driver: Driver<'m>,
    queues: [Queue; 1],
    recorder: Recorder,
}

impl<'m> Guest<'m> {
    /// A guest that should have `requested` MiB.
    fn new(mem: &'m GuestMemory, requested: u32) -> Self {
        let (ledger, driver) = (Ledger::default(), Driver::new(mem, RINGS, 16));
        let mut guest = Self {
            mem,
            device: config().build(&ledger).unwrap(),
            ledger,
            queues: [driver.queue(true)],
            driver,
            recorder: Recorder::default(),
        };
        guest.request_size(requested).unwrap();
        guest
    }

    fn request_size(&mut self, mib: u32) -> Result<(), UpdateError> {
        let mut io = testing::io(self.mem, &mut self.queues, &self.recorder, 0);
        self.device.update(json!({"requested_size_mib": mib}), &mut io)
    }

    fn kick(&mut self) -> Result<Option<u16>, DeviceError> {
        let mut io = testing::io(self.mem, &mut self.queues, &self.recorder, 0);
        self.device.on_queue(0, &mut io)?;
        Ok(io.again)
    }

    /// Asks for something about blocks; gives the response and, for a state, that.
    fn ask(&mut self, kind: u16, first: u64, count: u16) -> (u16, u16) {
        self.ask_at(kind, LEDGER_START + first * 2 * MIB, count)
    }

    fn ask_at(&mut self, kind: u16, address: u64, count: u16) -> (u16, u16) {
        // Padding is for the device to ignore.
        self.mem.write_slice(&[0xee; 24], GuestAddress(REQUEST)).unwrap();
        self.mem.write_obj(kind, GuestAddress(REQUEST)).unwrap();
        self.mem.write_obj(address, GuestAddress(REQUEST + 8)).unwrap();
        self.mem.write_obj(count, GuestAddress(REQUEST + 16)).unwrap();
        self.driver
            .offer(&[readable(REQUEST, 24), writable(RESPONSE, 10)]);
        assert_eq!(self.kick().unwrap(), None);
        assert_eq!(self.driver.used().map(|used| used.1), Some(10));
        let word = |offset| self.mem.read_obj(GuestAddress(RESPONSE + offset)).unwrap();
        (word(0), word(8))
    }

    fn plug(&mut self, first: u64, count: u16) -> u16 {
        self.ask(PLUG, first, count).0
    }

    fn unplug(&mut self, first: u64, count: u16) -> u16 {
        self.ask(UNPLUG, first, count).0
    }

    fn status(&self) -> Status {
        serde_json::from_value(self.device.status()).unwrap()
    }

    fn slots(&self) -> Vec<u32> {
        self.ledger.account().slots.iter().copied().collect()
    }

    /// A field of the configuration space as the driver sees it.
    fn field(&self, index: u64) -> u64 {
        let mut bytes = [0; 8];
        self.recorder.space.read(8 * index, &mut bytes);
        u64::from_le_bytes(bytes)
    }
}

/// Indexes of fields of the configuration space.
const USABLE: u64 = 4;
const PLUGGED: u64 = 5;
