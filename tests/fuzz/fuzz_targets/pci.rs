//! Any accesses to a virtio PCI function of any kind through the ports, the ECAM and its BAR, wherever the guest puts
//! that: nothing panics, a reset always brings the device back, and a saved state always loads.
#![no_main]

use std::io;
use std::sync::{Arc, Mutex, Weak};

use arbitrary::Arbitrary;
use devices::SharedMemory;
use devices::bus::Bus;
use devices::interrupt_line::LevelLine;
use devices::pci::root::{CONFIG_PORTS, CONFIG_PORTS_LEN, ECAM_LEN};
use devices::pci::{BarMapper, ConfigPorts, Ecam, MsiMessage, MsiRouter, PciFunction, PciSegment};
use devices::testing::Inline;
use devices::virtio::pci::{BAR_LEN, PciResources, PciVirtio};
use devices::virtio::slot::Transport;
use libfuzzer_sys::fuzz_target;
use mayfly_fuzz::device::{self, Kind};
use mayfly_fuzz::registers::Access;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

const ECAM_BASE: u64 = 0xe000_0000;
const BAR_BASE: u64 = 0xc000_0000;
const NOTIFY_PORTS: u16 = 0x1000;
const SLOT: u8 = 1;
/// Of the common configuration (virtio 1.2 §4.1.4.3).
const DEVICE_STATUS: u64 = 0x14;

/// Accepts every message, and has no wire.
struct Interrupts;

impl MsiRouter for Interrupts {
    fn route(&self, _: u16, message: MsiMessage) -> io::Result<()> {
        // The host refuses some.
        if message.data & 0xff == 0xff {
            Err(io::ErrorKind::Other.into())
        } else {
            Ok(())
        }
    }
}

impl LevelLine for Interrupts {
    fn set(&self, _: bool) {}
}

/// Moves the function's BAR on the bus.
struct Mapper {
    /// Weak, because the bus leads back here through the ECAM.
    bus: Weak<Bus>,
    function: Mutex<Weak<Mutex<PciVirtio>>>,
    /// Where the function's notification ports are now.
    ports: Mutex<Option<u16>>,
}

impl BarMapper for Mapper {
    fn moved(&self, _: u8, old: Option<u64>, new: Option<u64>) -> io::Result<()> {
        let bus = self.bus.upgrade().expect("the bus outlives the segment");
        if let Some(old) = old {
            assert!(bus.remove(old), "the BAR was on the bus");
        }
        let function = self
            .function
            .lock()
            .expect("nothing panics with the lock")
            .upgrade();
        match (new, function) {
            (Some(new), Some(function)) => bus.insert(new, BAR_LEN, function).map_err(io::Error::other),
            _ => Ok(()),
        }
    }

    fn moved_io(&self, _: u8, old: Option<u16>, new: Option<u16>) -> io::Result<()> {
        let mut ports = self.ports.lock().expect("nothing panics with the lock");
        assert_eq!(*ports, old, "the segment knows where the ports are");
        // Some ports are taken.
        let refused = new.is_some_and(|port| port & 0x100 != 0);
        *ports = new.filter(|_| !refused);
        if refused {
            Err(io::ErrorKind::AddrInUse.into())
        } else {
            Ok(())
        }
    }
}

struct Machine {
    ports: Bus,
    bus: Arc<Bus>,
    host: Arc<Inline>,
    memory: SharedMemory,
    function: Arc<Mutex<PciVirtio>>,
    kind: Kind,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// The two configuration ports.
    Ports(Access),
    /// The function's configuration space through the ECAM.
    Config(Access),
    /// Any function's.
    Ecam(Access, u8),
    /// Anywhere in the BAR.
    Bar(Access),
    /// One of the BAR's regions, from its start.
    Region(u8, Access),
    /// Turns decoding of the BARs on.
    Decode,
    /// The next status that leads to a running device.
    Advance,
    /// A queue: which, its size, and its rings' page.
    Queue(u8, u8, u8),
    /// Guest memory.
    Memory(u16, u64),
    /// A queue's notification.
    Kick(u8),
    /// The device's own descriptors are reported ready.
    Ready,
    /// Save, and load into a new function.
    Snapshot,
}

fuzz_target!(|input: (Kind, Vec<Step>)| {
    let (kind, steps) = input;
    let machine = Machine::new(kind);
    for step in &steps {
        machine.run(step);
    }
    machine.function().slot().set_status(0);
    assert!(machine.host.is_empty(), "a reset stops the device");
    assert_eq!(machine.function().slot().status(), 0);
});

fn function(kind: Kind, memory: &SharedMemory, host: &Arc<Inline>) -> PciVirtio {
    let resources = PciResources {
        bar_address: BAR_BASE,
        notify_ports: NOTIFY_PORTS,
        interrupt_line: 5,
        router: Arc::new(Interrupts),
        intx: Arc::new(Interrupts),
    };
    PciVirtio::new(
        device::any(kind),
        resources,
        memory.clone(),
        Arc::clone(host) as _,
    )
    .expect("the host has descriptors left")
}

impl Machine {
    fn new(kind: Kind) -> Self {
        let (bus, ports) = (Arc::new(Bus::new()), Bus::new());
        let (memory, host) = (
            SharedMemory::new(mayfly_fuzz::memory()),
            Arc::new(Inline::default()),
        );
        let function = Arc::new(Mutex::new(function(kind, &memory, &host)));
        let mapper = Mapper {
            bus: Arc::downgrade(&bus),
            function: Mutex::new(Arc::downgrade(&function)),
            ports: Mutex::default(),
        };
        let segment = Arc::new(PciSegment::new(Arc::new(mapper)));
        segment
            .attach(SLOT, Arc::clone(&function) as _)
            .expect("the slot is free");
        let ecam = Arc::new(Mutex::new(Ecam::new(Arc::clone(&segment))));
        bus.insert(ECAM_BASE, ECAM_LEN, ecam).expect("the bus is empty");
        let config_ports = Arc::new(Mutex::new(ConfigPorts::new(segment)));
        ports
            .insert(CONFIG_PORTS, CONFIG_PORTS_LEN, config_ports)
            .expect("the bus is empty");
        Self {
            ports,
            bus,
            host,
            memory,
            function,
            kind,
        }
    }

    fn function(&self) -> std::sync::MutexGuard<'_, PciVirtio> {
        self.function.lock().expect("nothing panics with the lock")
    }

    fn run(&self, step: &Step) {
        match *step {
            Step::Ports(access) => make(&self.ports, CONFIG_PORTS + u64::from(access.offset % 8), access),
            Step::Config(access) => self.config(SLOT << 3, access),
            Step::Ecam(access, devfn) => self.config(devfn, access),
            Step::Bar(access) => self.bar(u64::from(access.offset) % BAR_LEN, access),
            Step::Region(region, access) => {
                self.bar(
                    0x1000 * u64::from(region % 7) + u64::from(access.offset % 64),
                    access,
                );
            }
            Step::Decode => {
                self.bus
                    .write(ECAM_BASE + (u64::from(SLOT) << 15) + 4, &7u16.to_le_bytes());
            }
            Step::Advance => self.advance(),
            Step::Queue(index, size, page) => self.queue(u16::from(index % 8), size, page),
            Step::Memory(address, value) => {
                let memory = self.memory.memory();
                memory
                    .write_obj(value, GuestAddress(u64::from(address)))
                    .expect("16 bits of address lie in memory");
            }
            Step::Kick(queue) => self.host.event(u32::from(queue % 8)),
            Step::Ready => mayfly_fuzz::ready(&self.host),
            Step::Snapshot => self.snapshot(),
        }
    }

    fn config(&self, devfn: u8, access: Access) {
        make(
            &self.bus,
            ECAM_BASE + (u64::from(devfn) << 12) + u64::from(access.offset % 0x1000),
            access,
        );
    }

    fn bar(&self, offset: u64, access: Access) {
        if let Some(base) = self.base() {
            make(&self.bus, base.wrapping_add(offset), access);
        }
    }

    fn base(&self) -> Option<u64> {
        self.function().bar()
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(base) = self.base() {
            self.bus.write(base.wrapping_add(offset), data);
        }
    }

    /// The next step of virtio 1.2 §3.1.1.
    fn advance(&self) {
        let status = self.function().slot().status();
        match status {
            0 => self.write(DEVICE_STATUS, &[1]),
            1 => self.write(DEVICE_STATUS, &[3]),
            3 => {
                // VERSION_1 and nothing else.
                self.write(0x08, &1u32.to_le_bytes());
                self.write(0x0c, &1u32.to_le_bytes());
                self.write(DEVICE_STATUS, &[0xb]);
            }
            _ => self.write(DEVICE_STATUS, &[status | 4]),
        }
    }

    fn queue(&self, index: u16, size: u8, page: u8) {
        let base = 0x1000 * u32::from(page % 64);
        self.write(0x16, &index.to_le_bytes());
        self.write(0x18, &(1u16 << (size % 10)).to_le_bytes());
        for (offset, value) in [(0x20, base), (0x28, base + 0x400), (0x30, base + 0x800)] {
            self.write(offset, &value.to_le_bytes());
        }
        self.write(0x1c, &1u16.to_le_bytes());
        self.function().slot().kick(index);
    }

    fn snapshot(&self) {
        self.function().slot().pause();
        let state = self.function().save();
        self.function().slot().resume();
        let mut copy = function(self.kind, &self.memory, &Arc::default());
        copy.load(state.clone()).expect("what was saved can be loaded");
        assert_eq!(copy.save(), state);
    }
}

fn make(bus: &Bus, address: u64, access: Access) {
    // Whether anybody answers makes no difference to a vCPU.
    access.run(
        |data| _ = bus.read(address, data),
        |data| _ = bus.write(address, data),
    );
}
