//! The device with a backend on another thread, and a driver in shared plain memory.

mod away;
mod fake;
mod life;
mod setup;

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use vm_memory::{Bytes, FileOffset, GuestAddress};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::tempfile::TempFile;

use self::fake::Fake;
use super::VhostUserBlock;
use crate::GuestMemory;
use crate::testing::{Driver, Recorder, io, readable, writable};
use crate::virtio::block::Config;
use crate::virtio::{DeviceError, Io, Queue, VirtioDevice, feature};

const HEADER: u64 = 0x8000;
const STATUS: u64 = 0x9000;
const QUEUE_SIZE: u16 = 16;

fn config(fake: &Fake) -> Config {
    let config = json!({"drive_id": "disk", "is_root_device": false, "socket": fake.path()});
    serde_json::from_value(config).unwrap()
}

/// Memory of the kind that a backend can have.
fn shared_memory() -> GuestMemory {
    let file: File = TempFile::new().unwrap().into_file();
    file.set_len(0x10000).unwrap();
    let file = Some(FileOffset::new(file, 0));
    GuestMemory::from_ranges_with_files([(GuestAddress(0), 0x10000, file)]).unwrap()
}

/// A machine whose disk has a backend.
struct Machine<'m> {
    mem: &'m GuestMemory,
    driver: Driver<'m>,
    device: VhostUserBlock,
    queues: Vec<Queue>,
    kicks: Vec<Arc<EventFd>>,
    recorder: Recorder,
}

impl<'m> Machine<'m> {
    fn new(mem: &'m GuestMemory, fake: &Fake) -> Self {
        let driver = Driver::new(mem, 0x1000, QUEUE_SIZE);
        let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        Self {
            mem,
            device: VhostUserBlock::new(&config(fake)).unwrap(),
            queues: vec![driver.queue(false)],
            driver,
            kicks: vec![kick.into()],
            recorder: Recorder::default(),
        }
    }

    /// The same with a driver that is ready.
    fn started(mem: &'m GuestMemory, fake: &Fake) -> Self {
        let mut machine = Self::new(mem, fake);
        machine.watch_kick();
        machine.run(|device, io| device.activate(io));
        assert!(!machine.watches_kick());
        machine
    }

    fn call<R>(&mut self, work: impl FnOnce(&mut VhostUserBlock, &mut Io<'_>) -> R) -> R {
        let mut io = io(self.mem, &mut self.queues, &self.recorder, feature::VERSION_1);
        io.kicks = &self.kicks;
        work(&mut self.device, &mut io)
    }

    fn run(&mut self, work: impl FnOnce(&mut VhostUserBlock, &mut Io<'_>) -> Result<(), DeviceError>) {
        self.call(work).unwrap();
    }

    /// Watches the queue's notifications, as a lane does first of all.
    fn watch_kick(&self) {
        let kick = std::os::fd::AsRawFd::as_raw_fd(&*self.kicks[0]);
        self.recorder.watched.lock().unwrap().push((kick, 0));
    }

    fn watches_kick(&self) -> bool {
        let kick = std::os::fd::AsRawFd::as_raw_fd(&*self.kicks[0]);
        self.recorder
            .watched
            .lock()
            .unwrap()
            .iter()
            .any(|(fd, _)| *fd == kick)
    }

    fn event(&mut self, token: u32) {
        self.run(|device, io| device.on_event(token, io));
    }

    /// Offers a flush, whose status goes to a byte of its own.
    fn request(&mut self, number: u64) -> u16 {
        self.mem
            .write_slice(&4u32.to_le_bytes(), GuestAddress(HEADER))
            .unwrap();
        self.mem.write_obj(0xffu8, GuestAddress(STATUS + number)).unwrap();
        self.driver
            .offer(&[readable(HEADER, 16), writable(STATUS + number, 1)])
    }

    fn status(&self, number: u64) -> u8 {
        self.mem.read_obj(GuestAddress(STATUS + number)).unwrap()
    }

    /// Answers a chain in the backend's place.
    fn answer(&mut self, position: u16, head: u16) {
        let used = self.driver.config().used_ring;
        let entry = used + 4 + 8 * u64::from(position % QUEUE_SIZE);
        self.mem
            .write_obj(u64::from(head) | 1 << 32, GuestAddress(entry))
            .unwrap();
        self.mem
            .write_obj(position.wrapping_add(1), GuestAddress(used + 2))
            .unwrap();
    }

    /// Lets the device find that its backend has gone.
    fn lose(&mut self, fake: &mut Fake) {
        fake.kill();
        self.event(0);
    }

    fn interrupts(&self) -> usize {
        self.recorder.take_interrupts()
    }
}

/// Waits for what happens on the backend's thread.
fn eventually(what: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !what() {
        assert!(Instant::now() < deadline, "waited in vain");
        std::thread::sleep(Duration::from_millis(1));
    }
}
