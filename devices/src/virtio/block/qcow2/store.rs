//! [`Store`]: an image's file as imago sees it.

use std::fmt;
use std::io::{self, ErrorKind};
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;

use super::file::HostFile;
use super::journal::{Journal, SMALLEST_TABLE};

/// The file of an image: reads go to it, writes to its [`Journal`]. Clones are of the same file.
#[derive(Clone)]
pub(super) struct Store(Arc<Shared>);

struct Shared {
    path: PathBuf,
    /// Its place in the chain, where the image of the drive is 0.
    depth: usize,
    file: HostFile,
    journal: Mutex<Journal>,
    helper: CommonStorageHelper,
}

impl Store {
    /// Gives a file to imago, which is behind `depth` others.
    pub(super) fn new(path: PathBuf, depth: usize, file: HostFile, journal: Journal) -> Self {
        Self(Arc::new(Shared {
            path,
            depth,
            file,
            journal: Mutex::new(journal),
            helper: CommonStorageHelper::default(),
        }))
    }

    /// How many images it is behind.
    pub(super) fn depth(&self) -> usize {
        self.0.depth
    }

    /// What imago wrote and what is not in the file yet.
    pub(super) fn journal(&self) -> MutexGuard<'_, Journal> {
        self.0.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Commits the journal.
    pub(super) fn commit(&self, durable: bool) -> io::Result<()> {
        self.journal().commit(self, durable)
    }
}

impl Deref for Store {
    type Target = HostFile;

    fn deref(&self) -> &HostFile {
        &self.0.file
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.path.display().fmt(f)
    }
}

impl Storage for Store {
    fn size(&self) -> io::Result<u64> {
        Ok(self.len())
    }

    unsafe fn pure_readv(&self, into: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        let journal = self.journal();
        for mut slice in into.into_inner() {
            match journal.table(offset, slice.len()) {
                Some(table) => slice.copy_from_slice(table),
                None => self.read_bytes(offset, &mut slice)?,
            }
            offset = offset.saturating_add(slice.len() as u64);
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, from: IoVector<'_>, offset: u64) -> io::Result<()> {
        self.end(offset, from.len())?;
        if offset == 0 && from.len() >= SMALLEST_TABLE as u64 {
            let what = "the refcounts of the image say that its header is free";
            return Err(io::Error::new(ErrorKind::InvalidData, what));
        }
        let mut data = Vec::new();
        for slice in from.into_inner() {
            data.extend_from_slice(&slice);
        }
        self.journal().write(offset, data);
        Ok(())
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.end(offset, len)?;
        self.journal().write_zeros(offset, len);
        Ok(())
    }

    /// imago calls this when it is about to free clusters.
    fn settle_writes(&self) -> io::Result<()> {
        self.journal().note_freed();
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.0.helper
    }
}
