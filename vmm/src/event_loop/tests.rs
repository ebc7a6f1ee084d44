use std::sync::{Arc, Mutex};
use std::time::Duration;

use devices::SharedMemory;
use devices::testing::{Driver, memory, writable};
use devices::virtio::slot::status;
use devices::virtio::{Irq, Vector, VirtioSlot, rng};
use vm_memory::GuestAddressSpace;

use super::*;

const READY: u8 = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
const PATIENCE: Duration = Duration::from_secs(30);

/// Tells on which thread a device interrupts.
struct Teller(Mutex<Sender<String>>);

impl Irq for Teller {
    fn raise(&self, _: Vector) {
        let name = thread::current().name().unwrap_or_default().to_owned();
        self.0.lock().unwrap().send(name).unwrap();
    }
}

/// A running entropy device, and the threads on which it served requests.
struct Device {
    slot: VirtioSlot,
    threads: Receiver<String>,
    memory: SharedMemory,
}

fn start(loops: &Arc<IoLoops>) -> Device {
    let memory = SharedMemory::new(memory(0x10000));
    let (sender, threads) = mpsc::channel();
    let device = Box::new(rng::Config::default().build());
    let irq = Arc::new(Teller(sender.into()));
    let host = Arc::clone(loops) as Arc<dyn LaneHost>;
    let mut slot = VirtioSlot::new(device, irq, memory.clone(), host).unwrap();
    slot.driver.driver_features_select = 1;
    slot.set_driver_features(1);
    slot.set_status(READY);
    *slot.queue_mut().unwrap() = Driver::new(&memory.memory(), 0x1000, 8).config();
    slot.set_status(READY | status::DRIVER_OK);
    Device {
        slot,
        threads,
        memory,
    }
}

impl Device {
    /// The thread that serves a request.
    fn thread(&self) -> String {
        let memory = self.memory.memory();
        Driver::new(&memory, 0x1000, 8).offer(&[writable(0x8000, 4)]);
        self.slot.kick(0);
        self.threads.recv_timeout(PATIENCE).unwrap()
    }
}

#[test]
fn lanes_spread_over_the_loops_and_fill_gaps() {
    let loops = Arc::new(IoLoops::spawn(2, &Filters::none()).unwrap());
    let [one, two, three] = [(); 3].map(|()| start(&loops));
    assert_eq!(
        [one.thread(), two.thread(), three.thread()],
        ["io 0", "io 1", "io 0"]
    );
    drop(two);
    assert_eq!(start(&loops).thread(), "io 1");
}

#[test]
fn a_device_comes_back_from_whichever_loop_it_is_on() {
    let loops = Arc::new(IoLoops::spawn(2, &Filters::none()).unwrap());
    let mut devices = [(); 2].map(|()| start(&loops));
    for device in &mut devices {
        device.thread();
        device.slot.pause();
        device.slot.resume();
        assert_eq!(device.slot.metrics()["entropy_bytes"], 4);
        device.slot.set_status(0);
        assert_eq!(device.slot.metrics()["entropy_bytes"], 4);
    }
    assert_eq!(start(&loops).thread(), "io 0");
}

#[test]
fn there_is_a_loop_at_least() {
    let loops = Arc::new(IoLoops::spawn(0, &Filters::none()).unwrap());
    assert_eq!(start(&loops).thread(), "io 0");
}

#[test]
fn two_numbers_come_apart_again() {
    assert_eq!(split(join(7, u32::MAX - 1)), (7, u32::MAX - 1));
}
