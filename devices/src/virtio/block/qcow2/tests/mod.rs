//! Tests of copy-on-write images, on disks in memory that remember what happened to them.

mod build;
mod chain;
mod crash;
mod header;
mod inspect;
mod mutations;
mod place;
mod requests;

use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::{io, iter};

use vm_memory::VolatileSlice;

pub(in crate::virtio::block) use build::Builder;
pub(in crate::virtio::block) use inspect::Report;

use super::Qcow2;
use super::chain::{Allowed, Opener};
use crate::testing::Random;
use crate::virtio::Buffers;
use crate::virtio::block::{Backend, CacheType, OpenError};
use crate::virtio::image_lock::Lock;

/// What happened to a disk.
#[derive(Debug, Clone)]
enum Event {
    Write(u64, Vec<u8>),
    Sync,
}

/// A disk in memory.
#[derive(Debug, Clone, Default)]
pub(in crate::virtio::block) struct Platter(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    /// What happened since the start, if that is of interest.
    log: Option<Vec<Event>>,
    /// From this byte on, writes fail.
    full_from: Option<u64>,
}

impl State {
    fn apply(&mut self, offset: usize, data: &[u8]) {
        let end = offset + data.len();
        let len = self.bytes.len().max(end);
        self.bytes.resize(len, 0);
        self.bytes[offset..end].copy_from_slice(data);
    }
}

impl Platter {
    pub(in crate::virtio::block) fn new(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(State {
            bytes,
            ..State::default()
        })))
    }

    pub(in crate::virtio::block) fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().bytes.clone()
    }

    /// Fails writes from this byte on, or none.
    pub(in crate::virtio::block) fn fill(&self, from: Option<u64>) {
        self.0.lock().unwrap().full_from = from;
    }

    fn events(&self) -> usize {
        self.0.lock().unwrap().log.as_ref().map_or(0, Vec::len)
    }
}

impl Backend for Platter {
    fn size(&self) -> u64 {
        self.0.lock().unwrap().bytes.len() as u64
    }

    fn locks(&self) -> &[Lock] {
        &[]
    }

    fn read(&self, offset: u64, buffers: &mut Buffers<'_>) -> io::Result<()> {
        let state = self.0.lock().unwrap();
        let offset = usize::try_from(offset).unwrap();
        let rest = state.bytes.get(offset..offset + buffers.len());
        buffers.write(0, rest.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write(&self, offset: u64, buffers: &mut Buffers<'_>) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        let end = offset + buffers.len() as u64;
        if state.full_from.is_some_and(|full| end > full) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let mut data = vec![0; buffers.len()];
        buffers.read(0, &mut data);
        state.apply(usize::try_from(offset).unwrap(), &data);
        if let Some(log) = &mut state.log {
            log.push(Event::Write(offset, data));
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        if let Some(log) = &mut self.0.lock().unwrap().log {
            log.push(Event::Sync);
        }
        Ok(())
    }

    fn discard(&self, _range: Range<u64>) -> io::Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, range: Range<u64>, _may_unmap: bool) -> io::Result<()> {
        // As with a hole in a file, the end stays where it is.
        let end = range.end.min(self.size());
        let len = usize::try_from(end.saturating_sub(range.start)).unwrap();
        if len == 0 {
            return Ok(());
        }
        put(self, range.start, &vec![0; len])
    }
}

fn put(backend: &impl Backend, offset: u64, data: &[u8]) -> io::Result<()> {
    let mut data = data.to_vec();
    let mut buffers = Buffers::new();
    if !data.is_empty() {
        buffers.push(&VolatileSlice::from(data.as_mut_slice()));
    }
    backend.write(offset, &mut buffers)
}

pub(in crate::virtio::block) fn get(
    backend: &(impl Backend + ?Sized),
    offset: u64,
    len: usize,
) -> io::Result<Vec<u8>> {
    let mut data = vec![0xee; len];
    let mut buffers = Buffers::new();
    // In two pieces, as a guest has it.
    let (head, tail) = data.split_at_mut(len / 2);
    for piece in [head, tail] {
        buffers.push(&VolatileSlice::from(piece));
    }
    backend.read(offset, &mut buffers)?;
    drop(buffers);
    Ok(data)
}

pub(in crate::virtio::block) fn open(platter: &Platter) -> Result<Qcow2, OpenError> {
    open_with(platter, false, true)
}

pub(in crate::virtio::block) fn open_with(
    platter: &Platter,
    read_only: bool,
    durable: bool,
) -> Result<Qcow2, OpenError> {
    open_over(platter, &[], read_only, durable)
}

fn open_over(
    platter: &Platter,
    files: &[String],
    read_only: bool,
    durable: bool,
) -> Result<Qcow2, OpenError> {
    let cache_type = if durable {
        CacheType::Writeback
    } else {
        CacheType::Unsafe
    };
    let opener = Opener {
        read_only,
        direct: false,
        allowed: Allowed::Files(files),
        held: &[],
    };
    let file = Box::new(platter.clone());
    Qcow2::over(file, Path::new("test.qcow2"), opener, cache_type)
}

/// Opens the image in a file.
pub(in crate::virtio::block) fn open_file(
    file: Box<dyn Backend>,
    files: &[String],
    direct: bool,
    cache_type: CacheType,
) -> Qcow2 {
    let opener = Opener {
        read_only: false,
        direct,
        allowed: Allowed::Files(files),
        held: &[],
    };
    Qcow2::over(file, Path::new("test.qcow2"), opener, cache_type).unwrap()
}

/// `len` bytes of sectors that all say `stamp`.
fn stamped(stamp: u64, len: usize) -> Vec<u8> {
    iter::repeat_n(stamp.to_le_bytes(), len / 8).flatten().collect()
}
