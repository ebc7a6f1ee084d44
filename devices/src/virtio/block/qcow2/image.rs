//! [`Qcow2`]: the requests on an image.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use imago::{FormatAccess, Mapping};

use super::chain::{Allowed, Files, Opener, flawed};
use super::error::Flaw;
use super::file::fill_zeros;
use super::store::Store;
use crate::virtio::block::announced::Announcements;
use crate::virtio::block::backend::Place;
use crate::virtio::block::raw::Raw;
use crate::virtio::block::request::Request;
use crate::virtio::block::{Backend, BackingRule, CacheType, Config, OpenError};
use crate::virtio::buffers;
use crate::virtio::image_lock::Lock;
use crate::virtio::{Buffers, Chain};

/// The largest cluster.
const MAX_BOUNCE: usize = 2 << 20;

/// An open image. One request at a time works on its tables; the kernel may work on data by itself meanwhile.
pub(in crate::virtio::block) struct Qcow2 {
    size: u64,
    read_only: bool,
    /// The driver has no flushes, so that each run has to bring the tables to the host.
    settles_runs: bool,
    files: Files,
    /// What the kernel does in clusters of this image. They must not become free before it is over: they would soon have
    /// other data, or a table.
    pinned: Announcements,
    image: Mutex<Image>,
}

struct Image {
    format: FormatAccess<Store>,
    store: Store,
    cluster: u64,
    /// True when a commit waits for the disk, so that the image is whole even after a crash of the host.
    durable: bool,
    /// True when tables may have changed since the last commit.
    changed: bool,
    /// Kept from request to request, so that one that is in several places needs no allocation.
    part: buffers::Storage,
    /// Data that were compressed, on their way to the guest.
    bounce: Vec<u8>,
}

impl Qcow2 {
    /// Opens the image of a valid config and what is behind it.
    pub(in crate::virtio::block) fn open(config: &Config, held: &[Lock]) -> Result<Self, OpenError> {
        let path = config.path_on_host.as_deref().unwrap_or_default();
        let read_only = config.read_only();
        let allowed = match config.backing.unwrap_or_default() {
            BackingRule::Deny => Allowed::Files(config.backing_files.as_deref().unwrap_or_default()),
            BackingRule::Allow => Allowed::Any,
        };
        let opener = Opener {
            read_only,
            direct: config.direct,
            allowed,
            held,
        };
        let file = Box::new(Raw::open(path, read_only, config.direct, held)?);
        let path = Path::new(path);
        if !read_only && file.locks().iter().any(|lock| lock.is_among(held)) {
            return Err(flawed(path, Flaw::Open));
        }
        Self::over(file, path, opener, config.cache_type)
    }

    /// Opens the image that `file` holds. If the driver has no flushes, a crash of the host can damage it.
    pub(super) fn over(
        file: Box<dyn Backend>,
        path: &Path,
        opener: Opener<'_>,
        cache_type: CacheType,
    ) -> Result<Self, OpenError> {
        let read_only = opener.read_only;
        let durable = cache_type == CacheType::Writeback;
        let opened = opener.open(path, file)?;
        Ok(Self {
            size: opened.format.size(),
            read_only,
            settles_runs: !durable,
            files: opened.files,
            pinned: Announcements::default(),
            image: Mutex::new(Image {
                format: opened.format,
                store: opened.store,
                cluster: opened.cluster,
                durable,
                changed: false,
                part: buffers::Storage::default(),
                bounce: Vec::new(),
            }),
        })
    }

    fn image(&self) -> MutexGuard<'_, Image> {
        self.image.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backend for Qcow2 {
    fn size(&self) -> u64 {
        self.size
    }

    fn files(&self) -> Vec<Arc<File>> {
        self.files.open.clone()
    }

    /// Data that lie in one piece are read there; they are written where they are in place. All else changes tables.
    fn place(&self, request: Request, chain: &Chain<'_>, write_through: bool) -> Option<Place> {
        let image = self.image();
        if request == Request::Flush {
            let only_data = !self.read_only && !image.changed && !image.store.has_lost();
            return only_data.then(|| image.store.place(request, chain, write_through))?;
        }
        if request.changes_disk() && image.changed && (write_through || self.settles_runs) {
            // Its answer would promise that tables are on the host which lead to what it writes.
            return None;
        }
        let (range, _) = request.data(chain)?;
        let (store, offset, in_place) = image.find(&range)?;
        let may_move = store.depth() == 0 && !self.read_only;
        if (may_move || request.changes_disk()) && !in_place {
            return None;
        }
        let mut place = store.place(request.at(offset), chain, write_through)?;
        place.file = u32::try_from(store.depth()).ok()?;
        place.pinned = may_move.then(|| self.pinned.announce(range));
        Some(place)
    }

    fn in_memory(&self) -> bool {
        self.files.in_memory
    }

    fn locks(&self) -> &[Lock] {
        &self.files.locks
    }

    fn read(&self, offset: u64, buffers: &mut Buffers<'_>) -> io::Result<()> {
        self.image().read(offset, buffers)
    }

    fn write(&self, offset: u64, buffers: &mut Buffers<'_>) -> io::Result<()> {
        self.image().write(offset, buffers)
    }

    fn sync(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        let mut image = self.image();
        let result = image.commit(true);
        image.changed &= result.is_err();
        if image.store.take_lost() && result.is_ok() {
            // The host said so when no flush had asked.
            return Err(io::Error::other("the host has lost what was written before"));
        }
        result
    }

    fn settles_runs(&self) -> bool {
        self.settles_runs
    }

    fn settle(&self) -> io::Result<()> {
        self.image().settle()
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        let mut image = self.image();
        for part in self.pinned.rest(range) {
            image.discard(part)?;
        }
        Ok(())
    }

    fn write_zeroes(&self, range: Range<u64>, may_unmap: bool) -> io::Result<()> {
        let mut image = self.image();
        let mut at = range.start;
        for part in self.pinned.rest(range.clone()) {
            image.fill_with_zeros(at..part.start)?;
            at = part.end;
            image.write_zeroes(part, may_unmap)?;
        }
        image.fill_with_zeros(at..range.end)
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        if let Err(error) = self.settle() {
            let store = &self.image().store;
            log::error!("cannot write the last changes of the tables of the qcow2 image '{store}': {error}");
        }
    }
}

impl Image {
    fn read(&mut self, mut offset: u64, buffers: &mut Buffers<'_>) -> io::Result<()> {
        while !buffers.is_empty() {
            let (mapping, len) = self.format.get_mapping(offset, buffers.len() as u64)?;
            let mut len = usize::try_from(len).map_or(buffers.len(), |len| len.min(buffers.len()));
            match mapping {
                Mapping::Raw { storage, offset, .. } if len == buffers.len() => {
                    return storage.read(offset, buffers);
                }
                Mapping::Raw { storage, offset, .. } => {
                    with_part(&mut self.part, buffers, len, |part| storage.read(offset, part))?;
                }
                Mapping::Zero { .. } => with_part(&mut self.part, buffers, len, |part| {
                    fill_zeros(part, 0);
                    Ok(())
                })?,
                Mapping::Special { layer, offset, .. } => {
                    // The guest may change its memory at any time, and what decompresses reads back what it wrote.
                    len = len.min(MAX_BOUNCE);
                    self.bounce.resize(len, 0);
                    layer.read(self.bounce.as_mut_slice(), offset)?;
                    buffers.write(0, &self.bounce);
                }
                _ => len = 0,
            }
            if len == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            buffers.advance(len);
            offset += len as u64;
        }
        Ok(())
    }

    fn write(&mut self, offset: u64, buffers: &mut Buffers<'_>) -> io::Result<()> {
        let mut part = std::mem::take(&mut self.part);
        let result = self.put(offset, buffers.len() as u64, |store, at, len| {
            if len == buffers.len() {
                return store.write(at, buffers);
            }
            with_part(&mut part, buffers, len, |part| store.write(at, part))?;
            buffers.advance(len);
            Ok(())
        });
        self.part = part;
        result
    }

    /// Finds places for `len` bytes from `offset` on, and calls `write` with each place, in order, to fill it.
    fn put(
        &mut self,
        mut offset: u64,
        mut len: u64,
        mut write: impl FnMut(&Store, u64, usize) -> io::Result<()>,
    ) -> io::Result<()> {
        while len > 0 {
            let mapping = self.format.prepare_data_mapping(offset, len, true);
            let mapping = mapping.inspect_err(|_| self.store.journal().forget_copies())?;
            let (at, there) = (mapping.offset(), mapping.length());
            if at < self.cluster {
                let what = "a table of the image says that the header is data";
                return Err(io::Error::new(ErrorKind::InvalidData, what));
            }
            let bytes = usize::try_from(there).map_err(|_| ErrorKind::InvalidData)?;
            if mapping.is_nonblocking() {
                write(&self.store, at, bytes)?;
            } else {
                self.changed = true;
                let copies = self.store.journal().take_copies(at..at + there);
                if self.store.journal().has_freed() {
                    // The new place may be one that was freed just now.
                    self.commit(self.durable)?;
                }
                copies.write(&self.store)?;
                write(&self.store, at, bytes)?;
                self.format.commit_data_mapping(mapping)?;
                self.commit_if_full()?;
            }
            offset += there;
            len -= there;
        }
        Ok(())
    }

    /// In which file and where in it data are, if they are in one piece; and whether they can be written there.
    fn find(&self, range: &Range<u64>) -> Option<(&Store, u64, bool)> {
        let len = range.end - range.start;
        // Who goes the other way meets the error again.
        match self.format.get_mapping(range.start, len).ok()? {
            (
                Mapping::Raw {
                    storage,
                    offset,
                    writable,
                    ..
                },
                there,
            ) if there >= len && offset.checked_add(len).is_some() => {
                let in_place = writable && storage.depth() == 0 && offset >= self.cluster;
                Some((storage, offset, in_place))
            }
            _ => None,
        }
    }

    fn discard(&mut self, range: Range<u64>) -> io::Result<()> {
        self.changed = true;
        match self.format.discard_to_any(range.start, range.end - range.start) {
            // It is only a hint, and images of version 2 do not take it.
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()),
            Err(error) => Err(error),
            Ok(()) => self.commit_if_full(),
        }
    }

    /// Writes zeros: the clusters that the range has in place stay its own.
    fn fill_with_zeros(&mut self, range: Range<u64>) -> io::Result<()> {
        self.put(range.start, range.end - range.start, |store, at, len| {
            store.write_zeros(at..at + len as u64)
        })
    }

    fn write_zeroes(&mut self, range: Range<u64>, may_unmap: bool) -> io::Result<()> {
        let mut at = range.start;
        self.changed = true;
        while at < range.end {
            let left = range.end - at;
            let zeroed = match may_unmap {
                true => self.format.inner_mut().discard_to_zero(at, left),
                false => self.format.inner().ensure_zero_mapping(at, left),
            };
            let (start, len) = match zeroed {
                // Images of version 2 have no clusters of zeros.
                Err(error) if error.kind() == ErrorKind::Unsupported => (range.end, 0),
                zeroed => zeroed?,
            };
            // What is not a whole cluster, before it or, when there is none, all that is left.
            let until = if len == 0 { range.end } else { start };
            self.fill_with_zeros(at..until)?;
            at = until + len;
            self.commit_if_full()?;
        }
        Ok(())
    }

    /// Commits what changed.
    fn settle(&mut self) -> io::Result<()> {
        if self.changed {
            self.commit(self.durable)?;
            self.changed = false;
        }
        Ok(())
    }

    fn commit_if_full(&self) -> io::Result<()> {
        if self.store.journal().is_full() {
            self.commit(self.durable)?;
        }
        Ok(())
    }

    fn commit(&self, durable: bool) -> io::Result<()> {
        self.format.flush()?;
        self.store.commit(durable)
    }
}

/// Lends `buffers` cut to its first `len` bytes.
fn with_part<'m>(
    storage: &mut buffers::Storage,
    buffers: &Buffers<'m>,
    len: usize,
    act: impl FnOnce(&mut Buffers<'m>) -> io::Result<()>,
) -> io::Result<()> {
    let mut part = Buffers::from(std::mem::take(storage));
    part.extend_from(buffers, 0);
    part.truncate(len);
    let result = act(&mut part);
    *storage = part.into_storage();
    result
}
