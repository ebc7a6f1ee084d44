//! [`Image`]: a raw disk image on the host, and all system calls on it.
//!
//! The control thread opens images; the io loop that owns the device reads and writes them. Data goes straight
//! between the guest's pages and the file.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};

use super::{ConfigError, SECTOR};
use crate::virtio::Buffers;

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

/// An open raw image.
#[derive(Debug)]
pub(super) struct Image {
    file: File,
    sectors: u64,
    read_only: bool,
}

impl Image {
    /// Opens the image at `path`. Never blocks, creates or shortens anything.
    pub(super) fn open(path: &str, read_only: bool) -> Result<Self, OpenError> {
        // To open a FIFO or a device node can have effects, so its kind is looked at before and, as the path may
        // have changed in between, after.
        let metadata = std::fs::metadata(path).map_err(|e| open_error(path, read_only, e))?;
        check_kind(path, &metadata)?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY)
            .open(path)
            .map_err(|e| open_error(path, read_only, e))?;
        let host = |op| {
            let path = path.to_owned();
            move |source| OpenError::Host { op, path, source }
        };
        check_kind(path, &file.metadata().map_err(host("examine"))?)?;
        let size = file.seek(SeekFrom::End(0)).map_err(host("find the size of"))?;
        let (sectors, tail) = (size / SECTOR, size % SECTOR);
        if sectors == 0 {
            let path = path.to_owned();
            return Err(OpenError::TooSmall { path, size });
        }
        if tail != 0 {
            log::warn!(
                "the disk image '{path}' has {size} bytes, which is not a multiple of {SECTOR}: \
                 the guest will not see the last {tail} bytes"
            );
        }
        Ok(Self {
            file,
            sectors,
            read_only,
        })
    }

    /// Sectors that the guest can use.
    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }

    /// True when it was opened for reading only.
    pub(super) fn read_only(&self) -> bool {
        self.read_only
    }

    /// Fills `buffers` from `offset` bytes on. An image that has become shorter is an error.
    pub(super) fn read(&self, offset: u64, buffers: &mut Buffers<'_>) -> io::Result<()> {
        transfer(offset, buffers, ErrorKind::UnexpectedEof, |pieces, count, at| {
            // SAFETY: needed to read into guest memory with no copy in between. `Buffers` holds `count` pieces of
            // mapped guest memory, which Rust takes no references to; the descriptor is open.
            unsafe { libc::preadv(self.fd(), pieces, count, at) }
        })
    }

    /// Writes `buffers` at `offset` bytes.
    pub(super) fn write(&self, offset: u64, buffers: &mut Buffers<'_>) -> io::Result<()> {
        transfer(offset, buffers, ErrorKind::WriteZero, |pieces, count, at| {
            // SAFETY: needed to write from guest memory with no copy in between. `Buffers` holds `count` pieces of
            // mapped guest memory; the descriptor is open.
            unsafe { libc::pwritev(self.fd(), pieces, count, at) }
        })
    }

    /// Makes all writes durable.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Calls `step` until all of `buffers` is transferred; a transfer of nothing is an error of kind `nothing`. What is
/// left in `buffers` then is of no meaning.
fn transfer(
    mut offset: u64,
    buffers: &mut Buffers<'_>,
    nothing: ErrorKind,
    mut step: impl FnMut(*const libc::iovec, libc::c_int, libc::off_t) -> isize,
) -> io::Result<()> {
    while !buffers.is_empty() {
        let pieces = buffers.iovecs();
        let too_large = |_| io::Error::from(ErrorKind::InvalidInput);
        let count = libc::c_int::try_from(pieces.len()).map_err(too_large)?;
        let at = libc::off_t::try_from(offset).map_err(too_large)?;
        match usize::try_from(step(pieces.as_ptr(), count, at)) {
            Ok(0) => return Err(nothing.into()),
            Ok(done) if done == buffers.len() => return Ok(()),
            Ok(done) => {
                buffers.advance(done);
                offset += u64::try_from(done).expect("a usize fits");
            }
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

fn check_kind(path: &str, metadata: &Metadata) -> Result<(), OpenError> {
    let kind = metadata.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(());
    }
    let found = match () {
        () if kind.is_dir() => "a directory",
        () if kind.is_fifo() => "a FIFO",
        () if kind.is_socket() => "a socket",
        () => "a character device",
    };
    let path = path.to_owned();
    Err(OpenError::NotADisk { path, found })
}

fn open_error(path: &str, read_only: bool, source: io::Error) -> OpenError {
    let path = path.to_owned();
    match source.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => OpenError::Missing { path, source },
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => OpenError::Denied {
            path,
            mode: if read_only {
                "for reading"
            } else {
                "for reading and writing"
            },
            hint: if read_only { "" } else { ", or set is_read_only" },
            source,
        },
        _ => OpenError::Host {
            op: "open",
            path,
            source,
        },
    }
}
