//! [`Image`]: the file behind a pmem device.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::Arc;

use crate::memory_host::MemoryHostError;
use crate::virtio::image_lock::{Lock, LockError};

/// What the size of the memory is a multiple of: Linux maps persistent memory in pieces of 2 MiB.
pub(super) const GRANULE: u64 = 2 << 20;

/// Why a pmem device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file cannot be opened.
    #[error("cannot open '{path}' {mode}{hint}")]
    Open {
        /// The file.
        path: String,
        /// What it was to be opened for.
        mode: &'static str,
        /// What to do.
        hint: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("'{path}' cannot be memory: a pmem device needs a regular file or a block device")]
    NotAFile {
        /// What was given.
        path: String,
    },
    /// There is not a byte in it.
    #[error("the file '{path}' has size 0: make it as large as the memory is to be (truncate -s)")]
    Empty {
        /// The file.
        path: String,
    },
    /// The guest cannot be given the memory.
    #[error("'{path}' cannot be the guest's memory")]
    Memory {
        /// The file.
        path: String,
        /// Why not.
        source: MemoryHostError,
    },
    /// Somebody else has it, or the host does not lock it.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The host refused something else.
    #[error("cannot {op} '{path}'")]
    Host {
        /// What was tried.
        op: &'static str,
        /// The file.
        path: String,
        /// Why not.
        source: io::Error,
    },
}

/// An open file, locked, and its size.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) file: Arc<File>,
    pub(super) lock: Lock,
    /// Bytes in the file, not zero.
    pub(super) size: u64,
}

impl Image {
    /// Opens and locks the file at `path`. Never blocks, creates or shortens anything.
    pub(super) fn open(path: &str, read_only: bool) -> Result<Self, OpenError> {
        // To open a FIFO or a device node can have effects, so its kind is looked at before and, as the path may have
        // changed in between, after.
        let metadata = std::fs::metadata(path).map_err(|source| open_error(path, read_only, source))?;
        check_kind(path, &metadata)?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY)
            .open(path)
            .map_err(|source| open_error(path, read_only, source))?;
        let host = |op| {
            let path = path.to_owned();
            move |source| OpenError::Host { op, path, source }
        };
        check_kind(path, &file.metadata().map_err(host("examine"))?)?;
        let size = file.seek(SeekFrom::End(0)).map_err(host("find the size of"))?;
        if size == 0 {
            return Err(OpenError::Empty { path: path.into() });
        }
        let file = Arc::new(file);
        let lock = Lock::take(path, &file, !read_only, &[])?;
        Ok(Self { file, lock, size })
    }

    /// Bytes that the guest sees: the file's, and zeros up to the next granule. No file has more than 2^63 bytes.
    pub(super) fn memory_size(&self) -> u64 {
        self.size.next_multiple_of(GRANULE)
    }
}

fn check_kind(path: &str, metadata: &std::fs::Metadata) -> Result<(), OpenError> {
    let kind = metadata.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(());
    }
    Err(OpenError::NotAFile { path: path.into() })
}

fn open_error(path: &str, read_only: bool, source: io::Error) -> OpenError {
    let denied = matches!(
        source.kind(),
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem
    );
    let (mode, hint) = match (read_only, denied) {
        (true, _) => ("for reading", ""),
        (false, false) => ("for reading and writing", ""),
        (false, true) => (
            "for reading and writing",
            ": change its owner or mode, or set read_only",
        ),
    };
    OpenError::Open {
        path: path.into(),
        mode,
        hint,
        source,
    }
}
