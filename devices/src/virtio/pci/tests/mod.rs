//! A small guest that knows the function only through ECAM and the bus, as an operating system does.

mod interrupts;
mod registers;
mod setup;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, Weak};

use vm_memory::GuestAddressSpace;

use super::*;
use crate::bus::{Bus, SharedDevice};
use crate::pci::msix::MsiMessage;
use crate::pci::{BarMapper, Ecam, PciSegment};
use crate::testing::{Driver, Inline, memory};
use crate::virtio::echo::{Echo, QUEUE_SIZE};
use crate::virtio::slot::status;

const ECAM: u64 = 0xe000_0000;
const BAR: u64 = 0x40_0000_0000;
const FUNCTION: u64 = ECAM + (1 << 15);
const RING: u64 = 0x1_0000;
const NEGOTIATING: u8 = status::ACKNOWLEDGE | status::DRIVER;
const NEGOTIATED: u8 = NEGOTIATING | status::FEATURES_OK;
const READY: u8 = NEGOTIATED | status::DRIVER_OK;

#[derive(Default)]
struct Router(Mutex<Vec<(u16, MsiMessage)>>);

impl MsiRouter for Router {
    fn route(&self, vector: u16, message: MsiMessage) -> io::Result<()> {
        self.0.lock().unwrap().push((vector, message));
        Ok(())
    }
}

#[derive(Default)]
struct Wire(AtomicBool);

impl LevelLine for Wire {
    fn set(&self, asserted: bool) {
        self.0.store(asserted, Ordering::SeqCst);
    }
}

struct Mapper {
    bus: Arc<Bus>,
    function: Mutex<Option<Weak<Mutex<PciVirtio>>>>,
}

impl BarMapper for Mapper {
    fn moved(&self, _: u8, old: Option<u64>, new: Option<u64>) -> io::Result<()> {
        if let Some(old) = old {
            assert!(self.bus.remove(old));
        }
        let function = self.function.lock().unwrap().as_ref().and_then(Weak::upgrade);
        let device: SharedDevice = function.unwrap();
        new.map_or(Ok(()), |new| {
            self.bus.insert(new, BAR_LEN, device).map_err(io::Error::other)
        })
    }
}

struct Guest {
    bus: Arc<Bus>,
    function: Arc<Mutex<PciVirtio>>,
    host: Arc<Inline>,
    router: Arc<Router>,
    wire: Arc<Wire>,
    memory: SharedMemory,
}

fn parts(memory: &SharedMemory) -> (Arc<Inline>, Arc<Router>, Arc<Wire>, PciVirtio) {
    let (host, router, wire) = (
        Arc::<Inline>::default(),
        Arc::<Router>::default(),
        Arc::<Wire>::default(),
    );
    let resources = PciResources {
        bar_address: BAR,
        notify_ports: 0x1000,
        interrupt_line: 10,
        router: Arc::clone(&router) as Arc<dyn MsiRouter>,
        intx: Arc::clone(&wire) as Arc<dyn LevelLine>,
    };
    let lanes = Arc::clone(&host) as Arc<dyn LaneHost>;
    let function = PciVirtio::new(Box::new(Echo::new()), resources, memory.clone(), lanes).unwrap();
    (host, router, wire, function)
}

impl Guest {
    fn new() -> Self {
        let guest = Self::restored(SharedMemory::new(memory(0x2_0000)), |_| {});
        guest.write_config(4, &[6, 0]);
        guest
    }

    /// Attaches a new function after `load` had it.
    fn restored(memory: SharedMemory, load: impl FnOnce(&mut PciVirtio)) -> Self {
        let (host, router, wire, mut function) = parts(&memory);
        load(&mut function);
        let (bus, function) = (Arc::new(Bus::new()), Arc::new(Mutex::new(function)));
        let mapper = Mapper {
            bus: Arc::clone(&bus),
            function: Mutex::new(Some(Arc::downgrade(&function))),
        };
        let segment = Arc::new(PciSegment::new(Arc::new(mapper)));
        segment.attach(1, Arc::clone(&function) as _).unwrap();
        let ecam = Arc::new(Mutex::new(Ecam::new(segment)));
        bus.insert(ECAM, crate::pci::root::ECAM_LEN, ecam).unwrap();
        Self {
            bus,
            function,
            host,
            router,
            wire,
            memory,
        }
    }

    fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        assert!(self.bus.read(FUNCTION + offset, &mut data));
        data
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        assert!(self.bus.write(FUNCTION + offset, data));
    }

    fn get<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        assert!(self.bus.read(BAR + offset, &mut data));
        data
    }

    /// Writes to a place in the notification capability's BAR, as a driver does that reaches no ports.
    fn notify_at(&self, offset: u32) {
        let notify = self.capability(9, Some(cap::NOTIFY));
        let window = self.capability(9, Some(cap::PCI));
        self.write_config(window + 4, &self.config::<1>(notify + 4));
        self.write_config(window + 8, &offset.to_le_bytes());
        self.write_config(window + 12, &2u32.to_le_bytes());
        self.write_config(window + 16, &[0, 0]);
    }

    fn set(&self, offset: u64, data: &[u8]) {
        assert!(self.bus.write(BAR + offset, data));
    }

    fn status(&self) -> u8 {
        self.get::<1>(20)[0]
    }

    /// The offset in configuration space of the virtio capability `kind`.
    fn capability(&self, id: u8, kind: Option<u8>) -> u64 {
        let mut at = self.config::<1>(0x34)[0];
        loop {
            let [found, next, _, found_kind] = self.config(u64::from(at));
            if found == id && kind.is_none_or(|kind| kind == found_kind) {
                return u64::from(at);
            }
            assert_ne!(next, 0, "there is no such capability");
            at = next;
        }
    }

    /// As far as FEATURES_OK, in the order in which Linux does it.
    fn negotiate(&self) {
        self.set(20, &[0]);
        self.set(20, &[status::ACKNOWLEDGE]);
        self.set(20, &[NEGOTIATING]);
        self.set(0, &1u32.to_le_bytes());
        assert_eq!(self.get(4), [1, 0, 0, 0]);
        self.set(8, &0u32.to_le_bytes());
        self.set(12, &0u32.to_le_bytes());
        self.set(8, &1u32.to_le_bytes());
        self.set(12, &1u32.to_le_bytes());
        self.set(20, &[NEGOTIATED]);
        assert_eq!(self.status(), NEGOTIATED);
    }

    /// Sets queue 0 up at [`RING`].
    fn set_up_queue(&self) {
        let memory = self.memory.memory();
        let config = Driver::new(&memory, RING, QUEUE_SIZE).config();
        self.set(22, &[0, 0]);
        assert_eq!((self.get(24), self.get(28)), ([8, 0], [0, 0]));
        self.set(24, &config.size.to_le_bytes());
        for (offset, address) in [
            (32, config.desc_table),
            (40, config.avail_ring),
            (48, config.used_ring),
        ] {
            let bytes = address.to_le_bytes();
            self.set(offset, &bytes[..4]);
            self.set(offset + 4, &bytes[4..]);
        }
        self.set(28, &[1, 0]);
        assert_eq!(self.get(28), [1, 0]);
    }

    fn start(&self) {
        self.negotiate();
        self.set_up_queue();
        self.set(20, &[READY]);
        assert_eq!(self.status(), READY);
    }

    /// Turns MSI-X on with all vectors open, the configuration on vector 0 and queue 0 on vector 1.
    fn enable_msix(&self) {
        let control = self.capability(0x11, None) + 2;
        self.write_config(control, &0xc000u16.to_le_bytes());
        for vector in 0..3u8 {
            let at = TABLE_OFFSET + 16 * u64::from(vector);
            self.set(at, &0xfee0_0000u32.to_le_bytes());
            self.set(at + 4, &[0; 4]);
            self.set(at + 8, &[0x40 + vector, 0, 0, 0]);
            self.set(at + 12, &[0; 4]);
        }
        self.set(16, &[0, 0]);
        self.set(22, &[0, 0]);
        self.set(26, &[1, 0]);
        self.write_config(control, &0x8000u16.to_le_bytes());
    }

    fn sent(&self, vector: usize) -> u64 {
        let function = self.function.lock().unwrap();
        function.irqfds().nth(vector).unwrap().read().unwrap_or(0)
    }

    fn pin(&self) -> bool {
        self.wire.0.load(Ordering::SeqCst)
    }
}
