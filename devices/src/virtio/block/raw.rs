//! [`Raw`]: an image whose bytes are the disk's, a regular file or a block device, and all system calls on it. Data goes
//! straight between the guest's pages and the host's page cache, or with O_DIRECT the disk.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::Arc;

use vm_memory::VolatileSlice;

use super::backend::Place;
use super::direct::Direct;
use super::request::Request;
use super::{Backend, OpenError, SECTOR};
use crate::virtio::image_lock::Lock;
use crate::virtio::{Buffers, Chain};

const PUNCH_HOLE: libc::c_int = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

/// From `linux/fs.h`: `_IO(0x12, 119)` and `_IO(0x12, 104)`.
const BLKDISCARD: libc::Ioctl = 0x1277;
const BLKSSZGET: libc::Ioctl = 0x1268;

/// An open raw image.
#[derive(Debug)]
pub(super) struct Raw {
    file: Arc<File>,
    lock: [Lock; 1],
    size: u64,
    /// For a block device the size of its blocks, in which it discards.
    block: Option<u64>,
    /// How requests are aligned, when they go past the page cache.
    pub(super) direct: Option<Direct>,
    /// On a file system that has no disk.
    in_memory: bool,
}

impl Raw {
    /// Opens and locks the image at `path`, to go past the page cache if `direct`. Never blocks, creates or shortens
    /// anything.
    pub(super) fn open(path: &str, read_only: bool, direct: bool, held: &[Lock]) -> Result<Self, OpenError> {
        if !direct {
            return Self::open_with(path, read_only, held, 0);
        }
        let mut raw = Self::open_with(path, read_only, held, libc::O_DIRECT)?;
        let direct = Direct::of(&raw.file).map_err(|source| OpenError::Host {
            op: "find the alignment of",
            path: path.to_owned(),
            source,
        })?;
        raw.direct = Some(direct);
        Ok(raw)
    }

    /// The same for a guest that has the bytes of the file as its disk: none of its writes makes the file longer.
    pub(super) fn open_disk(
        path: &str,
        read_only: bool,
        direct: bool,
        held: &[Lock],
    ) -> Result<Self, OpenError> {
        let mut raw = Self::open(path, read_only, direct, held)?;
        let block = raw.direct.as_ref().map_or(1, Direct::block);
        // What is no whole block could only be written together with what is behind it.
        let tail = raw.size % block;
        if tail >= SECTOR {
            log::warn!(
                "the disk image '{path}' ends with a part of a block of {block} bytes: the guest will not see it"
            );
        }
        raw.size -= tail;
        Ok(raw)
    }

    fn open_with(path: &str, read_only: bool, held: &[Lock], flags: libc::c_int) -> Result<Self, OpenError> {
        // To open a FIFO or a device node can have effects, so its kind is looked at before and, as the path may
        // have changed in between, after.
        let metadata = std::fs::metadata(path).map_err(|e| open_error(path, read_only, e))?;
        check_kind(path, &metadata)?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY | flags)
            .open(path)
            .map_err(|e| match e.kind() {
                ErrorKind::InvalidInput if flags != 0 => OpenError::NotDirect {
                    path: path.to_owned(),
                    source: e,
                },
                _ => open_error(path, read_only, e),
            })?;
        let host = |op| {
            let path = path.to_owned();
            move |source| OpenError::Host { op, path, source }
        };
        let metadata = file.metadata().map_err(host("examine"))?;
        check_kind(path, &metadata)?;
        set_blocking(&file, flags).map_err(host("set the mode of"))?;
        let size = file.seek(SeekFrom::End(0)).map_err(host("find the size of"))?;
        let (block, in_memory) = match metadata.file_type().is_block_device() {
            true => (
                Some(block_size(&file).map_err(host("find the block size of"))?),
                false,
            ),
            false => (None, is_on_tmpfs(&file).map_err(host("find the file system of"))?),
        };
        let file = Arc::new(file);
        let lock = [Lock::take(path, &file, !read_only, held)?];
        Ok(Self {
            file,
            lock,
            size,
            block,
            direct: None,
            in_memory,
        })
    }

    fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The way for a request that is not aligned as the kernel wants it past the page cache.
    fn detour(&self, offset: u64, buffers: &Buffers<'_>) -> Option<&Direct> {
        self.direct
            .as_ref()
            .filter(|direct| !direct.takes(offset, buffers))
    }

    fn fallocate(&self, mode: libc::c_int, range: &Range<u64>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let (offset, len) = (off_t(range.start)?, off_t(range.end - range.start)?);
        // SAFETY: needed as std has no fallocate. It takes numbers only, and the descriptor is open.
        answer(|| unsafe { libc::fallocate(self.fd(), mode, offset, len) })
    }

    /// Zeros that the host makes without being sent them. For a block device the kernel makes commands of its own of
    /// these, for whole blocks.
    fn zero_in_place(&self, range: &Range<u64>, may_unmap: bool) -> io::Result<()> {
        let unsupported = || Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        let block = self.block.unwrap_or(1);
        if !range.start.is_multiple_of(block) || !range.end.is_multiple_of(block) {
            return unsupported();
        }
        // Who writes a part of a block would bring back what it has read of the rest.
        let _writer = self.direct.as_ref().map(Direct::writer);
        let modes = [PUNCH_HOLE, libc::FALLOC_FL_ZERO_RANGE];
        for mode in &modes[usize::from(!may_unmap)..] {
            match self.fallocate(*mode, range) {
                Err(error) if is_unsupported(&error) => {}
                done => return done,
            }
        }
        unsupported()
    }

    /// Zeros from memory, for file systems that can do no better.
    fn write_zero_bytes(&self, range: &Range<u64>) -> io::Result<()> {
        let mut zeros = [0; 64 << 10];
        let mut at = range.start;
        while at < range.end {
            let piece = usize::try_from(range.end - at).map_or(zeros.len(), |left| left.min(zeros.len()));
            let mut buffers = Buffers::new();
            buffers.push(&VolatileSlice::from(&mut zeros[..piece]));
            self.write(at, &mut buffers)?;
            at += u64::try_from(piece).expect("a usize fits");
        }
        Ok(())
    }
}

impl Backend for Raw {
    fn size(&self) -> u64 {
        self.size
    }

    fn files(&self) -> Vec<Arc<File>> {
        vec![Arc::clone(&self.file)]
    }

    fn place(&self, request: Request, chain: &Chain<'_>, _write_through: bool) -> Option<Place> {
        if request == Request::Flush {
            return Some(Place::default());
        }
        let (range, buffers) = request.data(chain)?;
        if self.detour(range.start, buffers).is_some() {
            return None;
        }
        Some(Place {
            file: 0,
            offset: range.start,
            announced: match &self.direct {
                Some(direct) if request.changes_disk() => direct.announce(range),
                _ => None,
            },
            pinned: None,
        })
    }

    fn in_memory(&self) -> bool {
        self.in_memory
    }

    fn locks(&self) -> &[Lock] {
        &self.lock
    }

    fn read(&self, offset: u64, buffers: &mut Buffers<'_>) -> io::Result<()> {
        if let Some(direct) = self.detour(offset, buffers) {
            return direct.read(&self.file, offset, buffers);
        }
        // An image that has become shorter ends early.
        transfer(offset, buffers, ErrorKind::UnexpectedEof, |pieces, count, at| {
            // SAFETY: needed to read into guest memory with no copy in between. `Buffers` holds `count` pieces of
            // mapped guest memory, which Rust takes no references to; the descriptor is open.
            unsafe { libc::preadv(self.fd(), pieces, count, at) }
        })
    }

    fn write(&self, offset: u64, buffers: &mut Buffers<'_>) -> io::Result<()> {
        if let Some(direct) = self.detour(offset, buffers) {
            return direct.write(&self.file, offset, buffers);
        }
        let _writer = self.direct.as_ref().map(Direct::writer);
        transfer(offset, buffers, ErrorKind::WriteZero, |pieces, count, at| {
            // SAFETY: needed to write from guest memory with no copy in between. `Buffers` holds `count` pieces of
            // mapped guest memory; the descriptor is open.
            unsafe { libc::pwritev(self.fd(), pieces, count, at) }
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        let result = match self.block {
            Some(block) => discard_blocks(self.fd(), &range, block),
            None => self.fallocate(PUNCH_HOLE, &range),
        };
        // It is only a hint, so a host that cannot take it has done all it can.
        result.or_else(|error| {
            if is_unsupported(&error) {
                Ok(())
            } else {
                Err(error)
            }
        })
    }

    fn write_zeroes(&self, range: Range<u64>, may_unmap: bool) -> io::Result<()> {
        match self.zero_in_place(&range, may_unmap) {
            Err(error) if is_unsupported(&error) => self.write_zero_bytes(&range),
            done => done,
        }
    }
}

fn off_t(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| ErrorKind::InvalidInput.into())
}

/// Takes back what kept the opening from waiting: io_uring answers for some file systems that it would have to wait.
fn set_blocking(file: &File, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: needed as std has no fcntl. It takes numbers only, and the descriptor is open.
    answer(|| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) })
}

/// Makes a system call that answers zero, again as long as signals interrupt it.
fn answer(mut call: impl FnMut() -> libc::c_int) -> io::Result<()> {
    loop {
        if call() == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Whether the file system or the block device cannot do at all what it was asked for.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY)
    )
}

/// The size of a block device's logical blocks.
fn block_size(file: &File) -> io::Result<u64> {
    let mut size: libc::c_int = 0;
    // SAFETY: needed as std has no ioctl. The kernel writes one int to a place that lives longer; the descriptor is open.
    answer(|| unsafe { libc::ioctl(file.as_raw_fd(), BLKSSZGET, &mut size) })?;
    u64::try_from(size).map_err(|_| ErrorKind::InvalidData.into())
}

/// Whether the file system that a file is on keeps everything in memory.
fn is_on_tmpfs(file: &File) -> io::Result<bool> {
    // SAFETY: needed as std has no fstatfs. Zero is a value of all fields, the kernel writes to a structure that lives
    // longer, and the descriptor is open.
    let (told, file_system) = unsafe {
        let mut file_system: libc::statfs = std::mem::zeroed();
        (libc::fstatfs(file.as_raw_fd(), &mut file_system), file_system)
    };
    match told {
        0 => Ok(file_system.f_type == libc::TMPFS_MAGIC),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Discards the whole blocks of a range; a block device refuses any other.
fn discard_blocks(fd: RawFd, range: &Range<u64>, block: u64) -> io::Result<()> {
    let block = block.max(1);
    let (start, end) = (range.start.next_multiple_of(block), range.end / block * block);
    if start >= end {
        return Ok(());
    }
    let place = [start, end - start];
    // SAFETY: needed as std has no ioctl. The kernel reads two numbers that live longer; the descriptor is open.
    answer(|| unsafe { libc::ioctl(fd, BLKDISCARD, &place) })
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
        let count = libc::c_int::try_from(pieces.len()).map_err(|_| ErrorKind::InvalidInput)?;
        let at = off_t(offset)?;
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
