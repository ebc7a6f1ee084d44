//! [`HostFile`]: the file of one image, with the bounds that an image must not leave.

use std::io::{self, ErrorKind};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vm_memory::VolatileSlice;

use crate::virtio::block::Backend;
use crate::virtio::block::backend::Place;
use crate::virtio::block::request::Request;
use crate::virtio::{Buffers, Chain};

const ZEROS: [u8; 4096] = [0; 4096];

/// A file that reads as zeros behind its end and grows up to a limit.
pub(super) struct HostFile {
    backend: Box<dyn Backend>,
    /// Bytes that it has at least.
    len: AtomicU64,
    /// Bytes that it never has more of.
    limit: u64,
    /// The host has lost writes, which it says only once.
    lost: AtomicBool,
}

impl HostFile {
    /// A file that does not grow until [`Self::let_grow`].
    pub(super) fn new(backend: Box<dyn Backend>) -> Self {
        let len = backend.size();
        Self {
            backend,
            len: len.into(),
            limit: len,
            lost: AtomicBool::new(false),
        }
    }

    /// Lets it grow by `bytes`.
    pub(super) fn let_grow(&mut self, bytes: u64) {
        self.limit = self.limit.saturating_add(bytes);
    }

    /// Bytes in it.
    pub(super) fn len(&self) -> u64 {
        self.len.load(Ordering::Relaxed)
    }

    /// Where the kernel can carry out a request on the file by itself: not behind its end.
    pub(super) fn place(&self, request: Request, chain: &Chain<'_>, write_through: bool) -> Option<Place> {
        let end = request.data(chain).map_or(0, |(range, _)| range.end);
        (end <= self.len()).then(|| self.backend.place(request, chain, write_through))?
    }

    /// Fills `buffers`. What is left in them then is of no meaning.
    pub(super) fn read(&self, offset: u64, buffers: &mut Buffers<'_>) -> io::Result<()> {
        let there = self.len().saturating_sub(offset);
        let there = usize::try_from(there).unwrap_or(usize::MAX);
        if there >= buffers.len() {
            return self.backend.read(offset, buffers);
        }
        fill_zeros(buffers, there);
        buffers.truncate(there);
        if buffers.is_empty() {
            return Ok(());
        }
        self.backend.read(offset, buffers)
    }

    /// Fills plain bytes.
    pub(super) fn read_bytes(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let mut buffers = Buffers::new();
        buffers.push(&VolatileSlice::from(bytes));
        self.read(offset, &mut buffers)
    }

    /// Writes `buffers`. What is left in them then is of no meaning.
    pub(super) fn write(&self, offset: u64, buffers: &mut Buffers<'_>) -> io::Result<()> {
        let end = self.end(offset, buffers.len() as u64)?;
        self.backend.write(offset, buffers)?;
        self.len.fetch_max(end, Ordering::Relaxed);
        Ok(())
    }

    /// Writes plain bytes, which stay as they are.
    pub(super) fn write_bytes(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let mut buffers = Buffers::new();
        buffers.push(&VolatileSlice::from(bytes));
        self.write(offset, &mut buffers)
    }

    /// Makes a range read as zeros. The file then reaches to its end: no table may lead behind that.
    pub(super) fn write_zeros(&self, range: Range<u64>) -> io::Result<()> {
        let end = self.end(range.start, range.end.saturating_sub(range.start))?;
        if range.is_empty() {
            return Ok(());
        }
        // Behind the end, too: a write that failed may have left something there.
        self.backend.write_zeroes(range, true)?;
        if end > self.len() {
            self.write_bytes(end - 1, &mut [0])?;
        }
        Ok(())
    }

    /// Makes all writes durable.
    pub(super) fn sync(&self) -> io::Result<()> {
        let result = self.backend.sync();
        if result.is_err() {
            self.lost.store(true, Ordering::Relaxed);
        }
        result
    }

    /// Whether a sync has failed that [`Self::take_lost`] has not told of.
    pub(super) fn has_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Tells once whether a sync has failed.
    pub(super) fn take_lost(&self) -> bool {
        self.lost.swap(false, Ordering::Relaxed)
    }

    /// The end of a range that may be written.
    pub(super) fn end(&self, offset: u64, len: u64) -> io::Result<u64> {
        let end = offset.checked_add(len).filter(|end| *end <= self.limit);
        end.ok_or_else(|| {
            let what =
                format!("a table of the image leads to {len} bytes at {offset:#x}, far behind its end");
            io::Error::new(ErrorKind::InvalidData, what)
        })
    }
}

/// Fills `buffers` with zeros from their byte `from` on.
pub(super) fn fill_zeros(buffers: &Buffers<'_>, mut from: usize) {
    while from < buffers.len() {
        let piece = (buffers.len() - from).min(ZEROS.len());
        buffers.write(from, &ZEROS[..piece]);
        from += piece;
    }
}
