//! The driver's side of a balloon, in plain memory.

mod hinting;
mod inflate;
mod noise;
mod ranges;
mod reporting;
mod state;
mod statistics;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::GuestMemory;
use crate::testing::{self, Driver, Piece, Recorder, readable, writable};
use crate::virtio::{DeviceError, Queue, VirtioDevice};

const PAGE: u64 = PAGE_SIZE;
/// Guest memory: 1 MiB, of which the first half has rings and requests.
const MEMORY: usize = 1 << 20;
/// Where requests lie.
const REQUEST: u64 = 0x4_0000;
/// The first page that tests give away, as an address and as a number.
const FIRST: u64 = 0x8_0000;
const FIRST_PFN: u32 = 0x80;

fn config() -> Config {
    Config {
        amount_mib: 1,
        ..Config::default()
    }
}

/// Statistics, hinting and reporting together.
fn full_config() -> Config {
    Config {
        amount_mib: 1,
        deflate_on_oom: true,
        stats_polling_interval_s: 1,
        free_page_hinting: true,
        free_page_reporting: true,
    }
}

/// Memory of which no byte is zero.
fn memory() -> GuestMemory {
    let mem = testing::memory(MEMORY);
    mem.write_slice(&vec![0xaa; MEMORY], GuestAddress(0)).unwrap();
    mem
}

/// A running device with its driver, which has set up the queues of the features that it accepted, as Linux does.
struct Guest<'m> {
    mem: &'m GuestMemory,
    device: Balloon,
    drivers: Vec<Driver<'m>>,
    queues: Vec<Queue>,
    recorder: Arc<Recorder>,
    features: u64,
}

impl<'m> Guest<'m> {
    fn new(mem: &'m GuestMemory, config: &Config) -> Self {
        Self::with_features(mem, config, u64::MAX)
    }

    /// A driver that knows only these features.
    fn with_features(mem: &'m GuestMemory, config: &Config, known: u64) -> Self {
        let device = config.build().unwrap();
        let features = device.info().features & known;
        let optional = [feature::STATS_VQ, feature::FREE_PAGE_HINT, feature::REPORTING];
        let wanted = 2 + optional.iter().filter(|bit| features & **bit != 0).count();
        Self::set_up(mem, device, features, &(0..wanted).collect::<Vec<_>>())
    }

    /// A driver that sets up the queues with these indexes.
    fn set_up(mem: &'m GuestMemory, device: Balloon, features: u64, indexes: &[usize]) -> Self {
        let mut guest = Self {
            mem,
            drivers: Vec::new(),
            queues: Vec::new(),
            recorder: testing::recorder(),
            features,
            device,
        };
        for index in 0..guest.device.info().queue_sizes.len() {
            let driver = Driver::new(mem, 0x1000 * (1 + index as u64), 64);
            let mut config = driver.config();
            config.ready = indexes.contains(&index);
            guest.queues.push(Queue::new(config, false, mem).unwrap());
            guest.drivers.push(driver);
        }
        guest.run(|device, io| device.activate(io)).unwrap();
        guest
    }

    fn run<R>(&mut self, work: impl FnOnce(&mut Balloon, &mut crate::virtio::Io<'_>) -> R) -> R {
        let mut io = testing::io(self.mem, &mut self.queues, &self.recorder, self.features);
        work(&mut self.device, &mut io)
    }

    fn kick(&mut self, queue: u16) -> Result<(), DeviceError> {
        self.run(|device, io| device.on_queue(queue, io))
    }

    /// Offers page numbers to inflate or deflate, and kicks.
    fn send_pfns(&mut self, queue: u16, pfns: &[u32]) {
        let bytes: Vec<u8> = pfns.iter().flat_map(|pfn| pfn.to_le_bytes()).collect();
        self.send(queue, &bytes);
    }

    /// Offers these bytes, and kicks.
    fn send(&mut self, queue: u16, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(REQUEST)).unwrap();
        let piece = readable(REQUEST, u32::try_from(bytes.len()).unwrap());
        self.offer(queue, &[piece]);
    }

    /// Offers a chain, and kicks.
    fn offer(&mut self, queue: u16, pieces: &[Piece]) {
        self.drivers[usize::from(queue)].offer(pieces);
        self.kick(queue).unwrap();
    }

    fn used(&mut self, queue: u16) -> Option<(u16, u32)> {
        self.drivers[usize::from(queue)].used()
    }

    fn patch(&mut self, patch: &Patch) -> Result<(), String> {
        let patch = serde_json::to_value(patch).unwrap();
        let updated = self.run(|device, io| device.update(patch, io));
        updated.map_err(|error| error.to_string())
    }

    /// A field of the configuration space.
    fn field(&self, offset: usize) -> u32 {
        let bytes = self.device.config_space()[offset..].first_chunk().unwrap();
        u32::from_le_bytes(*bytes)
    }

    fn count(&self, name: &str) -> u64 {
        self.device.metrics()[name].as_u64().unwrap()
    }

    /// Which pages from [`FIRST`] on read as zero.
    fn zeroed(&self, pages: u64) -> Vec<bool> {
        (0..pages).map(|page| self.is_zero(FIRST + page * PAGE)).collect()
    }

    fn is_zero(&self, address: u64) -> bool {
        let mut page = vec![1; 4096];
        self.mem.read_slice(&mut page, GuestAddress(address)).unwrap();
        page.iter().all(|byte| *byte == 0)
    }

    fn status(&self) -> Value {
        self.device.status()
    }
}

#[test]
fn offers_what_the_config_says() {
    let offered = |config: &Config| {
        let device = config.build().unwrap();
        let queues = device.info().queue_sizes.len();
        let own = device.info().features & !crate::virtio::feature::COMMON;
        (own, queues, device.config_space().len())
    };
    let with = |change: fn(&mut Config)| {
        let mut config = config();
        change(&mut config);
        offered(&config)
    };
    assert_eq!(offered(&config()), (0, 2, 8));
    assert_eq!(with(|config| config.deflate_on_oom = true), (1 << 2, 2, 8));
    assert_eq!(with(|config| config.stats_polling_interval_s = 1), (1 << 1, 3, 8));
    assert_eq!(with(|config| config.free_page_hinting = true), (1 << 3, 4, 12));
    assert_eq!(with(|config| config.free_page_reporting = true), (1 << 5, 5, 8));
    assert_eq!(offered(&full_config()), (0b10_1110, 5, 12));
}

#[test]
fn the_target_in_pages_fits_32_bits() {
    let with = |amount_mib| Config {
        amount_mib,
        ..Config::default()
    };
    assert!(with((1 << 24) - 1).build().is_ok());
    let refusal = with(1 << 24).build().err().unwrap().to_string();
    assert!(refusal.starts_with("Amount of pages requested is too large: amount_mib is 16777216"));
}

#[test]
fn the_body_has_two_required_fields() {
    let read = |text: &str| serde_json::from_str::<Config>(text).map_err(|error| error.to_string());
    assert_eq!(read(r#"{"amount_mib":1,"deflate_on_oom":false}"#), Ok(config()));
    assert!(
        read(r#"{"amount_mib":1}"#)
            .unwrap_err()
            .contains("missing field `deflate_on_oom`")
    );
    assert!(read("null").unwrap_err().contains("struct BalloonDeviceConfig"));
    assert_eq!(
        serde_json::to_string(&config()).unwrap(),
        concat!(
            r#"{"amount_mib":1,"deflate_on_oom":false,"stats_polling_interval_s":0,"#,
            r#""free_page_hinting":false,"free_page_reporting":false}"#
        )
    );
}
