//! A host whose disk is full, or loses what was written, under a copy-on-write image.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::super::backend::{Backend, Place};
use super::super::qcow2::tests::{Builder, Platter, get, open, open_file, open_with};
use super::super::raw::Raw;
use super::super::request::Request;
use super::super::{IoEngine, SECTOR};
use super::direct::image_on_disk;
use super::*;
use crate::virtio::image_lock::Lock;
use crate::virtio::{Buffers, Chain};

const CLUSTER: u32 = 512;

/// An empty image of which the first L2 table and one cluster of data have room in the file: each table maps 32 KiB.
fn image_with_room() -> Platter {
    let mut bytes = Builder {
        cluster_bits: 9,
        ..Builder::default()
    }
    .build();
    assert_eq!(bytes.len(), 4 * 512);
    bytes.resize(6 * 512, 0);
    Platter::new(bytes)
}

fn drive(platter: &Platter, cache_type: CacheType) -> Block {
    let mut device = Config {
        cache_type,
        ..config(&image(512))
    }
    .build()
    .unwrap();
    let durable = cache_type == CacheType::Writeback;
    device.backend = Arc::new(open_with(platter, false, durable).unwrap());
    device
}

#[test]
fn a_pause_while_the_host_is_full_leaves_the_drive_at_work_and_loses_nothing() {
    let (platter, mem) = (image_with_room(), testing::memory(1 << 20));
    let (mut device, mut guest) = (drive(&platter, CacheType::Writeback), Guest::new(&mem));
    guest.fill(DATA, &[7; CLUSTER as usize]);
    let data = [readable(DATA, CLUSTER)];
    assert_eq!(guest.request(&mut device, OUT, 0, &data), (OK, 1));
    platter.fill(Some(0));
    let mut io = testing::io(guest.mem, &mut guest.queues, &guest.recorder, guest.features);
    device.quiesce(&mut io).unwrap();
    assert_eq!(guest.request(&mut device, FLUSH, 0, &[]), (IO_ERROR, 1));
    platter.fill(None);
    assert_eq!(guest.request(&mut device, FLUSH, 0, &[]), (OK, 1));
    let image = open(&Platter::new(platter.bytes())).unwrap();
    assert_eq!(get(&image, 0, 512).unwrap(), [7; 512]);
}

#[test]
fn without_flushes_what_a_full_host_did_not_take_was_not_done() {
    let (platter, mem) = (image_with_room(), testing::memory(1 << 20));
    let (mut device, mut guest) = (drive(&platter, CacheType::Unsafe), Guest::new(&mem));
    platter.fill(Some(6 * 512));
    let offers = [
        (OUT, 0, readable(DATA, CLUSTER)),
        (IN, 0, writable(DATA + 0x1000, CLUSTER)),
        (WRITE_ZEROES, 0, readable(DATA + 0x2000, 16)),
        (DISCARD, 0, readable(DATA + 0x3000, 16)),
    ];
    guest.fill(DATA, &[7; CLUSTER as usize]);
    // These are for the part of the disk that the second table maps.
    guest.fill(DATA + 0x2000, &[64, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]);
    guest.fill(DATA + 0x3000, &[65, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    guest.fill(STATUS, &[0xee; 4]);
    for (number, (kind, sector, data)) in (0..).zip(offers) {
        let header = HEADER + 0x20 * number;
        guest.header(header, kind, sector);
        guest
            .driver
            .offer(&[readable(header, 16), data, writable(STATUS + number, 1)]);
    }
    guest.drain(&mut device);
    assert_eq!(guest.answered(), 4);
    assert_eq!(guest.bytes(STATUS, 4), [IO_ERROR, OK, IO_ERROR, IO_ERROR]);
    assert_eq!(device.metrics()["execute_fails"], 3);

    platter.fill(None);
    let data = [readable(DATA, CLUSTER)];
    assert_eq!(guest.request(&mut device, OUT, 1, &data), (OK, 1));
    let image = open(&Platter::new(platter.bytes())).unwrap();
    assert_eq!(get(&image, 0, 1024).unwrap(), [7; 1024]);
}

/// What is wrong with a host.
#[derive(Clone, Default)]
struct Trouble {
    /// Files end here, if not at zero: of a write over it, what is before it is written.
    full: Arc<AtomicU64>,
    /// Something written was lost, which it says once, as Linux does.
    lost: Arc<AtomicBool>,
}

/// A file of such a host.
struct Troubled {
    raw: Raw,
    trouble: Trouble,
}

impl Backend for Troubled {
    fn size(&self) -> u64 {
        self.raw.size()
    }

    fn files(&self) -> Vec<Arc<File>> {
        self.raw.files()
    }

    fn place(&self, request: Request, chain: &Chain<'_>, write_through: bool) -> Option<Place> {
        self.raw.place(request, chain, write_through)
    }

    fn locks(&self) -> &[Lock] {
        self.raw.locks()
    }

    fn read(&self, offset: u64, buffers: &mut Buffers<'_>) -> io::Result<()> {
        self.raw.read(offset, buffers)
    }

    fn write(&self, offset: u64, buffers: &mut Buffers<'_>) -> io::Result<()> {
        let full = self.trouble.full.load(Ordering::Relaxed);
        let room = usize::try_from(full.saturating_sub(offset)).unwrap();
        if full == 0 || room >= buffers.len() {
            return self.raw.write(offset, buffers);
        }
        buffers.truncate(room);
        if room > 0 {
            self.raw.write(offset, buffers)?;
        }
        Err(ErrorKind::StorageFull.into())
    }

    fn sync(&self) -> io::Result<()> {
        if self.trouble.lost.swap(false, Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.raw.sync()
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        self.raw.discard(range)
    }

    fn write_zeroes(&self, range: Range<u64>, may_unmap: bool) -> io::Result<()> {
        self.raw.write_zeroes(range, may_unmap)
    }
}

/// A drive with an image on such a host.
fn troubled(bytes: &[u8], cache_type: CacheType, engine: IoEngine) -> (TempFile, Trouble, Block) {
    let (file, trouble) = (image_on_disk(0), Trouble::default());
    file.as_file().write_all(bytes).unwrap();
    let troubled = Troubled {
        raw: Raw::open(&path(&file), false, false, &[]).unwrap(),
        trouble: trouble.clone(),
    };
    let image = open_file(Box::new(troubled), &[], false, cache_type);
    let config = Config {
        io_engine: Some(engine),
        cache_type,
        ..config(&file)
    };
    let device = Block::over(&config, Arc::new(image)).unwrap();
    (file, trouble, device)
}

#[test]
fn without_flushes_no_engine_answers_what_the_tables_of_a_full_host_do_not_lead_to() {
    for engine in [IoEngine::Sync, IoEngine::Async] {
        let (file, trouble, mut device) = troubled(&image_with_room().bytes(), CacheType::Unsafe, engine);
        let mem = testing::memory(1 << 20);
        let mut guest = Guest::new(&mem);
        guest.activate(&mut device);
        trouble.full.store(6 * SECTOR, Ordering::Relaxed);
        guest.fill(DATA, &[7; CLUSTER as usize]);
        // A sector that the second table maps, for which there is no room.
        guest.fill(DATA + 0x2000, &[64, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]);
        guest.header(HEADER, OUT, 0);
        guest.header(HEADER + 0x20, WRITE_ZEROES, 0);
        let write = |status| {
            [
                readable(HEADER, 16),
                readable(DATA, CLUSTER),
                writable(STATUS + status, 1),
            ]
        };
        let zeroes = [
            readable(HEADER + 0x20, 16),
            readable(DATA + 0x2000, 16),
            writable(STATUS + 1, 1),
        ];
        // The write once more, to what is then a cluster of its own, in the same run and in one that follows.
        for offers in [&[write(0), zeroes, write(2)][..], &[write(0)][..]] {
            for offer in offers {
                guest.driver.offer(offer);
            }
            guest.drain(&mut device);
            let mut io = testing::io(guest.mem, &mut guest.queues, &guest.recorder, guest.features);
            device.quiesce(&mut io).unwrap();
            assert_eq!(guest.answered(), offers.len());
            assert_eq!(
                guest.bytes(STATUS, offers.len()),
                vec![IO_ERROR; offers.len()],
                "{engine:?}"
            );
        }
        trouble.full.store(0, Ordering::Relaxed);
        guest.driver.offer(&write(0));
        guest.drain(&mut device);
        assert_eq!((guest.answered(), guest.bytes(STATUS, 1)), (1, vec![OK]));
        let image = open(&Platter::new(content(&file))).unwrap();
        assert!(get(&image, 0, 512).unwrap() == [7; 512]);
    }
}

#[test]
fn a_write_that_a_full_host_took_in_part_does_not_show_elsewhere_later() {
    let bytes = Builder::default().build();
    let (_file, trouble, mut device) = troubled(&bytes, CacheType::Writeback, IoEngine::Sync);
    let mem = testing::memory(1 << 20);
    let mut guest = Guest::new(&mem);
    let full = bytes.len() as u64 + 2 * 4096 - 512;
    trouble.full.store(full, Ordering::Relaxed);
    guest.fill(DATA, &[7; 4096]);
    let data = [readable(DATA, 4096)];
    assert_eq!(guest.request(&mut device, OUT, 0, &data).0, IO_ERROR);
    trouble.full.store(0, Ordering::Relaxed);
    assert_eq!(guest.request(&mut device, FLUSH, 0, &[]), (OK, 1));
    for sector in [80, 160] {
        let data = [readable(DATA, 512)];
        assert_eq!(guest.request(&mut device, OUT, sector, &data), (OK, 1));
        let now = get(&*device.backend, sector * SECTOR, 4096).unwrap();
        assert!(now == [vec![7; 512], vec![0; 3584]].concat(), "sector {sector}");
    }
}

#[test]
fn a_pause_does_not_take_from_the_next_flush_that_the_host_has_lost_something() {
    for engine in [IoEngine::Sync, IoEngine::Async] {
        let bytes = Builder::default().build();
        let (_file, trouble, mut device) = troubled(&bytes, CacheType::Writeback, engine);
        let mem = testing::memory(1 << 20);
        let mut guest = Guest::new(&mem);
        guest.activate(&mut device);
        assert_eq!(guest.request(&mut device, OUT, 0, &[readable(DATA, 512)]).0, OK);
        trouble.lost.store(true, Ordering::Relaxed);
        for _ in 0..2 {
            let mut io = testing::io(guest.mem, &mut guest.queues, &guest.recorder, guest.features);
            device.quiesce(&mut io).unwrap();
        }
        assert_eq!(
            guest.request(&mut device, FLUSH, 0, &[]).0,
            IO_ERROR,
            "{engine:?}"
        );
        guest.request_until_done(&mut device, FLUSH, 0, &[]);
    }
}
