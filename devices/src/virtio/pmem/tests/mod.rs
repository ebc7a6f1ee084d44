//! Tests of the pmem device, with a driver in plain memory and files in a temporary folder.

mod config;
mod noise;
mod requests;
mod state;

use std::io::Write;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::tempfile::TempFile;

use super::{Config, Pmem};
use crate::GuestMemory;
use crate::testing::{self, Driver, Ledger, Piece, Recorder, readable, writable};
use crate::virtio::{DeviceError, Io, Queue, VirtioDevice};

const MIB: usize = 1 << 20;

/// Where the queue, requests and responses lie in guest memory.
const RINGS: u64 = 0x1000;
const REQUEST: u64 = 0x8000;
const RESPONSE: u64 = 0x9000;

/// A file of this many bytes.
fn file(len: usize) -> TempFile {
    let file = TempFile::new().unwrap();
    file.as_file().write_all(&vec![7; len]).unwrap();
    file
}

fn config(file: &TempFile) -> Config {
    Config {
        id: "pm".into(),
        path_on_host: file.as_path().to_str().unwrap().into(),
        root_device: false,
        read_only: false,
        rate_limiter: None,
    }
}

fn device() -> Pmem {
    config(&file(2 * MIB)).build(&Ledger::default()).unwrap()
}

fn read_only_device() -> Pmem {
    let file = file(2 * MIB);
    let config = Config {
        read_only: true,
        ..config(&file)
    };
    config.build(&Ledger::default()).unwrap()
}

/// The driver of a device in `mem`.
struct Guest<'m> {
    mem: &'m GuestMemory,
    driver: Driver<'m>,
    queues: [Queue; 1],
    recorder: Recorder,
}

impl<'m> Guest<'m> {
    fn new(mem: &'m GuestMemory, event_idx: bool) -> Self {
        let driver = Driver::new(mem, RINGS, 16);
        Self {
            mem,
            queues: [driver.queue(event_idx)],
            driver,
            recorder: Recorder::default(),
        }
    }

    fn lend(&mut self) -> Io<'_> {
        testing::io(self.mem, &mut self.queues, &self.recorder, 0)
    }

    /// Offers a request of this type whose response is a word.
    fn offer(&mut self, kind: u32) -> u16 {
        self.mem.write_obj(kind, GuestAddress(REQUEST)).unwrap();
        self.mem
            .write_obj(0x5555_5555u32, GuestAddress(RESPONSE))
            .unwrap();
        self.driver.offer(&[readable(REQUEST, 4), writable(RESPONSE, 4)])
    }

    fn kick(&mut self, device: &mut Pmem) -> Result<bool, DeviceError> {
        let mut io = self.lend();
        device.on_queue(0, &mut io)?;
        Ok(io.again.is_some())
    }

    /// Waits for the flush that runs, and lets the device take its result.
    fn flushed(&mut self, device: &mut Pmem) {
        let (fd, token) = self.recorder.watched.lock().unwrap()[0];
        let epoll = Epoll::new().unwrap();
        epoll
            .ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))
            .unwrap();
        assert_eq!(epoll.wait(60_000, &mut [EpollEvent::default()]).unwrap(), 1);
        device.on_event(token, &mut self.lend()).unwrap();
    }

    /// The next answer: head, bytes written, and the word at the place for responses.
    fn answer(&mut self) -> Option<(u16, u32, u32)> {
        let (head, written) = self.driver.used()?;
        Some((head, written, self.mem.read_obj(GuestAddress(RESPONSE)).unwrap()))
    }

    fn interrupts(&self) -> usize {
        self.recorder.take_interrupts()
    }

    fn offer_raw(&mut self, pieces: &[Piece]) -> u16 {
        self.driver.offer(pieces)
    }
}
