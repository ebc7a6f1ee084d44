//! [`Direct`]: requests of an image that is opened with O_DIRECT, which the kernel takes only if they are aligned.
//!
//! Nearly all requests of guests are, and go as they are. The others go through a buffer; one that writes a part of a
//! block reads the rest of it first, and meanwhile nobody else writes. Only what is already in the kernel, by io_uring, goes
//! on: such a write is [`Announced`] and, if it may have been undone, written again.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::SECTOR;
use super::announced::{Announced, Announcements};
use crate::virtio::Buffers;

/// What is assumed where the kernel does not tell.
const DEFAULT_ALIGNMENT: u32 = 4096;
/// Bytes that go through the buffer at a time.
const PIECE: u64 = 256 << 10;

/// How requests must be aligned, and how others are carried out.
#[derive(Debug)]
pub(super) struct Direct {
    /// Of addresses in memory.
    memory: usize,
    /// Of offsets and lengths, in bytes.
    block: u64,
    /// Taken by whoever writes; alone, by whoever writes a part of a block.
    writers: RwLock<()>,
    /// Writes that take no turn; none where no request writes a part of a block.
    announcements: Option<Announcements>,
}

impl Direct {
    /// Asks the kernel what `file`, which is open with O_DIRECT, needs.
    pub(super) fn of(file: &File) -> io::Result<Self> {
        // SAFETY: needed as std has no statx. Zero is a value of all fields, the path is a C string, the kernel writes to
        // a structure that lives longer, and the descriptor is open.
        let (answer, told) = unsafe {
            let mut told: libc::statx = std::mem::zeroed();
            let (flags, mask) = (libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN);
            (
                libc::statx(file.as_raw_fd(), c"".as_ptr(), flags, mask, &mut told),
                told,
            )
        };
        if answer != 0 {
            return Err(io::Error::last_os_error());
        }
        let known = |alignment: u32| {
            if alignment == 0 {
                DEFAULT_ALIGNMENT
            } else {
                alignment
            }
        };
        let memory = known(told.stx_dio_mem_align);
        Ok(Self::new(
            usize::try_from(memory).expect("a u32 fits"),
            u64::from(known(told.stx_dio_offset_align)),
        ))
    }

    pub(super) fn new(memory: usize, block: u64) -> Self {
        Self {
            memory,
            block,
            writers: RwLock::default(),
            announcements: (block > SECTOR).then(Announcements::default),
        }
    }

    /// The unit of offsets and lengths, in bytes.
    pub(super) fn block(&self) -> u64 {
        self.block
    }

    /// Whether the kernel takes a request as it is.
    pub(super) fn takes(&self, offset: u64, buffers: &Buffers<'_>) -> bool {
        let whole = |len: usize| u64::try_from(len).is_ok_and(|len| len.is_multiple_of(self.block));
        let fits =
            |piece: &libc::iovec| piece.iov_base.addr().is_multiple_of(self.memory) && whole(piece.iov_len);
        offset.is_multiple_of(self.block) && buffers.iovecs().iter().all(fits)
    }

    /// Held while a request that is taken as it is writes.
    pub(super) fn writer(&self) -> RwLockReadGuard<'_, ()> {
        self.writers.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody writes but the kernel on its own; for a write to a range that goes through the buffer.
    pub(super) fn alone(&self, range: Range<u64>) -> Alone<'_> {
        let turn = self.writers.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(announcements) = &self.announcements {
            announcements
                .begin(range.start - range.start % self.block..range.end.next_multiple_of(self.block));
        }
        Alone {
            announcements: self.announcements.as_ref(),
            _turn: turn,
        }
    }

    /// To be held while the kernel carries out a write of whole blocks that is taken as it is; none where nothing can undo
    /// it. Who writes a part of one of its blocks meanwhile may bring back what the rest held before. That takes a guest
    /// that has both writes to the block under way at a time, and then either may be the last: one that has met another is
    /// done once more.
    pub(super) fn announce(&self, range: Range<u64>) -> Option<Announced> {
        self.announcements
            .as_ref()
            .map(|announcements| announcements.announce(range))
    }

    /// Fills `buffers` from `offset` on.
    pub(super) fn read(&self, file: &File, offset: u64, buffers: &Buffers<'_>) -> io::Result<()> {
        self.each_piece(offset, buffers, |place, bytes, done| {
            if read_up_to(file, place.start, bytes)? < place.inner.end {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            buffers.write(done, &bytes[place.inner.clone()]);
            Ok(())
        })
    }

    /// Writes `buffers` at `offset`.
    pub(super) fn write(&self, file: &File, offset: u64, buffers: &Buffers<'_>) -> io::Result<()> {
        let len = u64::try_from(buffers.len()).expect("a usize fits");
        let alone = self.alone(offset..offset + len);
        let result = self.each_piece(offset, buffers, |place, bytes, done| {
            if place.inner.len() < bytes.len() {
                let there = read_up_to(file, place.start, bytes)?;
                // Behind the end of the file, where there may still be what came before it in the buffer.
                bytes[there..].fill(0);
            }
            buffers.read(done, &mut bytes[place.inner.clone()]);
            file.write_all_at(bytes, place.start)
        });
        drop(alone);
        result
    }

    /// Calls `work` with each piece of a request: where it is, an aligned buffer for the blocks that it touches, and how
    /// many bytes came before it.
    fn each_piece(
        &self,
        offset: u64,
        buffers: &Buffers<'_>,
        mut work: impl FnMut(Place, &mut [u8], usize) -> io::Result<()>,
    ) -> io::Result<()> {
        let len = u64::try_from(buffers.len()).expect("a usize fits");
        let (mut at, end) = (offset, offset + len);
        let most = usize::try_from(len.min(PIECE) + 2 * self.block).expect("pieces are small");
        let mut room = vec![0; most + self.memory];
        let first = room.as_ptr().align_offset(self.memory);
        let room = &mut room[first..first + most];
        while at < end {
            let start = at - at % self.block;
            let stop = end.min(start + PIECE);
            let cover = (stop - start).next_multiple_of(self.block);
            let small = |value: u64| usize::try_from(value).expect("pieces are small");
            let place = Place {
                start,
                inner: small(at - start)..small(stop - start),
            };
            work(place, &mut room[..small(cover)], small(at - offset))?;
            at = stop;
        }
        Ok(())
    }
}

/// Held by who writes a part of a block.
pub(super) struct Alone<'d> {
    announcements: Option<&'d Announcements>,
    _turn: RwLockWriteGuard<'d, ()>,
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        if let Some(announcements) = self.announcements {
            announcements.end();
        }
    }
}

/// Where a piece of a request is.
struct Place {
    /// Where its first block begins in the file.
    start: u64,
    /// Which bytes of its blocks it means.
    inner: Range<usize>,
}

/// Reads until `bytes` is full or the file ends; returns how many there were.
fn read_up_to(file: &File, offset: u64, bytes: &mut [u8]) -> io::Result<usize> {
    loop {
        match file.read_at(bytes, offset) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // A read that ends within a block has met the end of the file.
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use crate::testing::buffers;
    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    fn numbered(len: usize) -> Vec<u8> {
        (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect()
    }

    fn file(bytes: &[u8]) -> TempFile {
        let file = TempFile::new().unwrap();
        file.as_file().write_all(bytes).unwrap();
        file
    }

    #[test]
    fn takes_what_is_aligned_in_all_its_pieces() {
        let mut room = vec![0; 3 << 12];
        let first = room.as_ptr().align_offset(4096);
        let room = &mut room[first..first + 8192];
        let direct = Direct::new(512, 4096);
        assert!(direct.takes(8192, &buffers(&mut [&mut room[..4096]])));
        assert!(!direct.takes(512, &buffers(&mut [&mut room[..4096]])));
        assert!(!direct.takes(0, &buffers(&mut [&mut room[..512]])));
        assert!(!direct.takes(0, &buffers(&mut [&mut room[1..4097]])));
        let (one, two) = room.split_at_mut(4096);
        assert!(direct.takes(0, &buffers(&mut [&mut *one, &mut *two])));
        assert!(!direct.takes(0, &buffers(&mut [one, &mut two[..100]])));
    }

    #[test]
    fn reads_and_writes_parts_of_blocks_and_nothing_beside_them() {
        let mut expected = numbered(1 << 20);
        let image = file(&expected);
        let direct = Direct::new(4096, 4096);
        for (offset, len) in [
            (0, 512),
            (512, 4096),
            (4095, 2),
            (700, 600_000),
            (1 << 19, 1 << 19),
        ] {
            let (mut head, mut tail) = (vec![0xaa; len / 3], vec![0xbb; len - len / 3]);
            let mut pieces = [&mut head[..], &mut tail[..]];
            direct
                .write(image.as_file(), offset, &buffers(&mut pieces))
                .unwrap();
            let at = usize::try_from(offset).unwrap();
            expected[at..at + len / 3].fill(0xaa);
            expected[at + len / 3..at + len].fill(0xbb);
            let mut back = vec![0; len];
            direct
                .read(image.as_file(), offset, &buffers(&mut [&mut back[..]]))
                .unwrap();
            assert!(back == expected[at..at + len], "{offset} {len}");
        }
        assert!(std::fs::read(image.as_path()).unwrap() == expected);
    }

    #[test]
    fn a_file_that_grows_by_a_part_of_a_block_has_zeros_behind_it() {
        let image = file(&[]);
        let direct = Direct::new(4096, 4096);
        // The last piece is shorter than the one before it.
        let len = usize::try_from(PIECE).unwrap() + 4096 + 512;
        let mut data = vec![0xaa; len];
        direct
            .write(image.as_file(), 0, &buffers(&mut [&mut data[..]]))
            .unwrap();
        data.resize(len.next_multiple_of(4096), 0);
        assert!(std::fs::read(image.as_path()).unwrap() == data);
    }

    #[test]
    fn a_write_in_the_kernel_is_told_of_parts_of_its_blocks_that_are_written_meanwhile() {
        let image = file(&numbered(1 << 16));
        let direct = Direct::new(512, 4096);
        let announce = |block: u64| direct.announce(4096 * block..4096 * (block + 1)).unwrap();
        let (before, beside) = (announce(1), announce(2));
        let mut sector = [0; 512];
        direct
            .write(image.as_file(), 4096 + 512, &buffers(&mut [&mut sector]))
            .unwrap();
        let after = announce(1);
        assert_eq!(
            [&before, &beside, &after].map(Announced::has_met),
            [true, false, false]
        );
        let alone = direct.alone(4096..4097);
        let (during, beside) = (announce(1), announce(0));
        drop(alone);
        assert_eq!(
            [&during, &beside, &after].map(Announced::has_met),
            [true, false, true]
        );
        drop([before, during, after, beside]);
        assert!(!announce(1).has_met());
    }

    #[test]
    fn blocks_of_a_sector_have_no_parts_to_tell_of() {
        assert!(Direct::new(4096, 512).announce(0..512).is_none());
    }

    #[test]
    fn a_read_behind_the_end_fails() {
        let image = file(&[1; 700]);
        let mut back = [0; 512];
        let error = Direct::new(512, 512).read(image.as_file(), 512, &buffers(&mut [&mut back[..]]));
        assert_eq!(error.unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }
}
