//! [`Backend`]: what holds a drive's bytes, and [`open`], which makes the one that a config asks for.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::announced::Announced;
use super::qcow2::{self, Qcow2};
use super::raw::Raw;
use super::request::Request;
use super::{Config, ConfigError, Format, SECTOR};
use crate::virtio::image_lock::{Lock, LockError};
use crate::virtio::{Buffers, Chain};

/// The most files of a backend.
pub(super) const MAX_FILES: usize = 33;

/// Where the kernel can carry out a request by itself.
#[derive(Default)]
pub(super) struct Place {
    /// Which of [`Backend::files`].
    pub(super) file: u32,
    /// Where in it the data begin, which are there in one piece.
    pub(super) offset: u64,
    /// To be held until the kernel is done; a write that has met another then is to be done again, by the backend.
    pub(super) announced: Option<Announced>,
    /// To be held until the kernel is done, so that the data stay where they are.
    pub(super) pinned: Option<Announced>,
}

/// What holds a drive's bytes: a run of [`Backend::size`] bytes that the guest reads and writes.
///
/// The control thread opens it; the io loop that owns the device works on it. A call returns when it is done, and may
/// block on the host's disk. Whoever calls has checked that offsets and ranges lie within the size.
pub(super) trait Backend: Send + Sync {
    /// Bytes. Any that make no whole sector are not for the guest.
    fn size(&self) -> u64;
    /// The files that have the drive's bytes, for an engine that works on them by itself as [`Self::place`] says; none when
    /// there are no such, and [`MAX_FILES`] at most.
    fn files(&self) -> Vec<Arc<File>> {
        Vec::new()
    }
    /// Where in its files the kernel can carry out a request as it is, and make it durable if it is to `write_through`; if
    /// nowhere, the backend's own calls can.
    fn place(&self, _request: Request, _chain: &Chain<'_>, _write_through: bool) -> Option<Place> {
        None
    }
    /// Whether those files are in the host's memory: then no request has a disk to wait for.
    fn in_memory(&self) -> bool {
        false
    }
    /// What keeps its images from other machines.
    fn locks(&self) -> &[Lock];
    /// Fills `buffers` from `offset` on. What is left in `buffers` then is of no meaning.
    fn read(&self, offset: u64, buffers: &mut Buffers<'_>) -> io::Result<()>;
    /// Writes `buffers` at `offset`. What is left in `buffers` then is of no meaning.
    fn write(&self, offset: u64, buffers: &mut Buffers<'_>) -> io::Result<()>;
    /// Makes all that was done before durable.
    fn sync(&self) -> io::Result<()>;
    /// Whether each run of requests has to end with [`Self::settle`], before the driver is told of it: what they did must
    /// not depend on this process any more, unless the driver has flushes for that.
    fn settles_runs(&self) -> bool {
        false
    }
    /// Brings to the host all that is still in this process, also for others to see. What the host does not take stays.
    fn settle(&self) -> io::Result<()> {
        Ok(())
    }
    /// Gives back the space of a range that nobody needs any more, as far as the host can. What a read finds there
    /// afterwards is not defined, but it comes from this drive.
    fn discard(&self, range: Range<u64>) -> io::Result<()>;
    /// Makes a range read as zeros, and gives its space back if `may_unmap` says so and the host can.
    fn write_zeroes(&self, range: Range<u64>, may_unmap: bool) -> io::Result<()>;
}

/// Opens what holds the bytes of a valid config's drive, and locks it; a drive that is opened anew holds locks already.
/// Never blocks, creates or shortens anything.
pub(super) fn open(config: &Config, held: &[Lock]) -> Result<Box<dyn Backend>, OpenError> {
    let path = config.path_on_host.as_deref().unwrap_or_default();
    let backend: Box<dyn Backend> = match config.format.unwrap_or_default() {
        Format::Raw => Box::new(Raw::open_disk(path, config.read_only(), config.direct, held)?),
        Format::Qcow2 => Box::new(Qcow2::open(config, held)?),
    };
    let size = backend.size();
    if size < SECTOR {
        let path = path.to_owned();
        return Err(OpenError::TooSmall { path, size });
    }
    let tail = size % SECTOR;
    if tail != 0 {
        log::warn!(
            "the disk image '{path}' has {size} bytes, which is not a multiple of {SECTOR}: \
             the guest will not see the last {tail} bytes"
        );
    }
    Ok(backend)
}

/// Why a drive could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The config is not valid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// There is no such file.
    #[error(
        "the disk image '{path}' does not exist: check path_on_host, and that every folder in it is there"
    )]
    Missing {
        /// The image.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// The process may not open it.
    #[error("no permission to open the disk image '{path}' {mode}: change its owner or mode{hint}")]
    Denied {
        /// The image.
        path: String,
        /// What it was to be opened for.
        mode: &'static str,
        /// Another remedy.
        hint: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A qcow2 image that is not fit for use.
    #[error(transparent)]
    Qcow2(Box<qcow2::Error>),
    /// Neither a regular file nor a block device.
    #[error("'{path}' is {found}: a drive needs a regular file or a block device")]
    NotADisk {
        /// What was given.
        path: String,
        /// What it is.
        found: &'static str,
    },
    /// Smaller than one sector.
    #[error(
        "the disk image '{path}' has {size} bytes, less than one sector of {SECTOR}: make it larger (truncate -s)"
    )]
    TooSmall {
        /// The image.
        path: String,
        /// Bytes in it.
        size: u64,
    },
    /// Somebody else has it, or the host does not lock it.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The kernel does not let this process overlap requests.
    #[error(
        "this host does not offer io_uring, which io_engine Async of the disk '{path}' needs: use io_engine Sync"
    )]
    Engine {
        /// The image.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// Its file system has no O_DIRECT.
    #[error("the file system of the disk image '{path}' cannot go past the page cache: leave direct out")]
    NotDirect {
        /// The image.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// Anything else that the system refused.
    #[error("cannot {op} the disk image '{path}'")]
    Host {
        /// What was tried.
        op: &'static str,
        /// The image.
        path: String,
        /// Why not.
        source: io::Error,
    },
}
