use proptest::prelude::{any, prop};
use proptest::{prop_assert, proptest};
use serde_json::json;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::*;
use crate::testing::{Driver, Inline, memory, readable, writable};
use crate::virtio::echo::{Echo, QUEUE_SIZE};
use crate::virtio::slot::status;

const RING: u64 = 0x1_0000;
const NEGOTIATING: u32 = (status::ACKNOWLEDGE | status::DRIVER) as u32;
const NEGOTIATED: u32 = NEGOTIATING | status::FEATURES_OK as u32;
const READY: u32 = NEGOTIATED | status::DRIVER_OK as u32;

/// Counts pulses.
#[derive(Default)]
struct Line(AtomicU64);

impl EdgeLine for Line {
    fn pulse(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

struct Setup {
    device: MmioVirtio,
    line: Arc<Line>,
    host: Arc<Inline>,
    memory: SharedMemory,
}

fn setup() -> Setup {
    in_memory(SharedMemory::new(memory(0x2_0000)))
}

fn in_memory(memory: SharedMemory) -> Setup {
    let host = Arc::<Inline>::default();
    let lanes = Arc::clone(&host) as Arc<dyn LaneHost>;
    let line = Arc::<Line>::default();
    let edges = Arc::clone(&line) as Arc<dyn EdgeLine>;
    Setup {
        device: MmioVirtio::new(Box::new(Echo::new()), edges, memory.clone(), lanes).unwrap(),
        line,
        host,
        memory,
    }
}

impl Setup {
    fn get(&mut self, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        self.device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&mut self, offset: u64, value: u32) {
        self.device.write(offset, &value.to_le_bytes());
    }

    fn set_address(&mut self, offset: u64, value: u64) {
        self.set(offset, u32::try_from(value & 0xffff_ffff).unwrap());
        self.set(offset + 4, u32::try_from(value >> 32).unwrap());
    }

    /// As far as FEATURES_OK, in the order in which Linux does it.
    fn negotiate(&mut self) {
        self.set(0x70, 0);
        self.set(0x70, u32::from(status::ACKNOWLEDGE));
        self.set(0x70, NEGOTIATING);
        self.set(0x14, 1);
        assert_eq!(self.get(0x10), 1);
        self.set(0x24, 1);
        self.set(0x20, 1);
        self.set(0x24, 0);
        self.set(0x20, 0);
        self.set(0x70, NEGOTIATED);
        assert_eq!(self.get(0x70), NEGOTIATED);
    }

    fn set_up_queue(&mut self, config: QueueConfig) {
        self.set(0x30, 0);
        assert_eq!((self.get(0x44), self.get(0x34)), (0, u32::from(QUEUE_SIZE)));
        self.set(0x38, u32::from(config.size));
        self.set_address(0x80, config.desc_table);
        self.set_address(0x90, config.avail_ring);
        self.set_address(0xa0, config.used_ring);
        self.set(0x44, 1);
        assert_eq!(self.get(0x44), 1);
    }

    fn start(&mut self) {
        let memory = self.memory.memory();
        self.negotiate();
        self.set_up_queue(Driver::new(&memory, RING, QUEUE_SIZE).config());
        self.set(0x70, READY);
        assert_eq!(self.get(0x70), READY);
    }

    fn interrupts(&self) -> u64 {
        self.line.0.swap(0, Ordering::SeqCst)
    }
}

#[test]
fn identifies_itself() {
    let mut setup = setup();
    assert_eq!(
        (setup.get(0), setup.get(4), setup.get(8), setup.get(0xc)),
        (0x7472_6976, 2, 2, 0)
    );
}

#[test]
fn serves_a_driver_from_probe_to_interrupt() {
    let mut setup = setup();
    setup.start();
    let memory = setup.memory.memory();
    memory.write_slice(b"ping", GuestAddress(0x4000)).unwrap();
    let mut driver = Driver::new(&memory, RING, QUEUE_SIZE);
    driver.offer(&[readable(0x4000, 4), writable(0x5000, 4)]);
    setup.set(0x50, 0);
    assert_eq!(setup.device.slot().kicks()[0].read().unwrap(), 1);
    setup.host.event(0);
    let mut answer = [0; 4];
    memory.read_slice(&mut answer, GuestAddress(0x5000)).unwrap();
    assert_eq!((driver.used(), &answer), (Some((0, 4)), b"ping"));
    assert_eq!((setup.interrupts(), setup.get(0x60)), (1, 1));
}

#[test]
fn acknowledging_is_needed_for_config_changes_only() {
    let mut setup = setup();
    setup.start();
    let irq = Arc::clone(&setup.device.irq);
    irq.raise(Vector::Queue(0));
    irq.raise(Vector::Config);
    assert_eq!(setup.get(0x60), 3);
    setup.set(0x64, 1);
    assert_eq!(setup.get(0x60), 3);
    setup.set(0x64, 3);
    assert_eq!(setup.get(0x60), 1);
    irq.raise(Vector::Config);
    assert_eq!((setup.interrupts(), setup.get(0x60)), (3, 3));
    setup.set(0x70, 0);
    assert_eq!(setup.get(0x60), 0);
}

#[test]
fn starts_again_after_a_reset() {
    let mut setup = setup();
    setup.start();
    setup.device.slot().update(json!("other")).unwrap();
    setup.set(0x70, 0);
    assert_eq!((setup.get(0x70), setup.get(0x60), setup.get(0x44)), (0, 0, 0));
    assert!(setup.host.is_empty());
    setup.start();
    assert_eq!(setup.host.len(), 1);
}

#[test]
fn shows_that_features_were_refused() {
    let mut setup = setup();
    setup.set(0x70, NEGOTIATING);
    setup.set(0x24, 1);
    setup.set(0x20, 3);
    setup.set(0x70, NEGOTIATED);
    assert_eq!(setup.get(0x70), NEGOTIATING);
}

#[test]
fn needs_a_reset_after_an_invalid_queue_size() {
    let mut setup = setup();
    setup.negotiate();
    setup.set(0x38, 0x1_0008);
    setup.set(0x44, 1);
    setup.set(0x70, READY);
    assert_eq!(setup.get(0x70), READY | u32::from(status::NEEDS_RESET));
    assert_eq!((setup.interrupts(), setup.get(0x60)), (1, 2));
}

#[test]
fn tells_of_a_new_configuration_space() {
    let mut setup = setup();
    setup.start();
    let generation = setup.get(0xfc);
    setup.device.slot().update(json!("fresh")).unwrap();
    assert_eq!(setup.get(0xfc), generation + 1);
    assert_eq!((setup.interrupts(), setup.get(0x60)), (1, 2));
    let mut bytes = [0xff; 8];
    setup.device.read(0x100, &mut bytes);
    assert_eq!(&bytes, b"fresh\0\0\0");
}

#[test]
fn passes_writes_to_the_configuration_space_on() {
    let mut setup = setup();
    setup.start();
    setup.device.write(0x104, b"X");
    setup.device.write(0x104, b"YZ#!");
    let mut bytes = [0xff; 8];
    setup.device.read(0x100, &mut bytes);
    assert_eq!(&bytes, b"confXg\0\0");
}

#[test]
fn counts_its_interrupts() {
    let mut setup = setup();
    setup.start();
    setup.device.slot().update(json!("fresh")).unwrap();
    let counted = InterruptMetrics {
        triggers: 1,
        config_updates: 0,
    };
    assert_eq!(setup.device.interrupts(), counted);
}

#[test]
fn has_no_queue_behind_the_last_and_no_shared_memory() {
    let mut setup = setup();
    setup.set(0x30, 0x1_0000);
    assert_eq!((setup.get(0x34), setup.get(0x44)), (0, 0));
    assert_eq!((setup.get(0xb0), setup.get(0xb4)), (u32::MAX, u32::MAX));
    setup.set(0x50, 9);
}

#[test]
fn goes_on_after_a_restore() {
    let mut old = setup();
    old.start();
    let memory = old.memory.memory();
    let mut driver = Driver::new(&memory, RING, QUEUE_SIZE);
    old.device.slot().pause();
    driver.offer(&[readable(0x4000, 4), writable(0x5000, 4)]);
    let json = serde_json::to_string(&old.device.save()).unwrap();

    let mut new = in_memory(old.memory.clone());
    new.device.load(serde_json::from_str(&json).unwrap()).unwrap();
    assert_eq!(serde_json::to_string(&new.device.save()).unwrap(), json);
    new.device.slot().resume();
    assert_eq!(
        (driver.used(), new.interrupts(), new.get(0x70)),
        (Some((0, 4)), 1, READY)
    );
}

#[test]
fn refuses_an_impossible_interrupt_status() {
    let mut setup = setup();
    let mut state = setup.device.save();
    state.interrupt_status = 4;
    assert!(matches!(
        setup.device.load(state),
        Err(StateError::Inconsistent { .. })
    ));
}

proptest! {
    #[test]
    fn survives_any_accesses(
        started in any::<bool>(),
        accesses in prop::collection::vec((0u64..0x120, prop::collection::vec(any::<u8>(), 0..9), any::<bool>()), 1..60),
    ) {
        let mut setup = setup();
        if started {
            setup.start();
        }
        for (offset, mut data, write) in accesses {
            if write {
                setup.device.write(offset, &data);
            } else {
                setup.device.read(offset, &mut data);
            }
        }
        setup.set(0x70, 0);
        prop_assert!(setup.host.is_empty());
    }
}
