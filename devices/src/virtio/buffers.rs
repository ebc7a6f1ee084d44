//! [`Buffers`]: the guest memory that one side of a descriptor chain names, ready for `readv` and `writev`.
//!
//! Data moves between the guest's pages and a file descriptor with no copy in between: the pieces are kept as
//! `iovec`s. Every piece was checked against guest memory when it was pushed, and the lifetime keeps that memory
//! mapped, so using them later needs no second look-up.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::{ByteValued, VolatileSlice};

/// A sequence of guest memory pieces, used as one run of bytes.
///
/// The guest may change the bytes at any time: whatever is read must be copied out once and then checked.
#[derive(Default)]
pub struct Buffers<'m> {
    pieces: Vec<libc::iovec>,
    len: usize,
    memory: PhantomData<&'m ()>,
}

/// The allocation of a [`Buffers`] that is not in use: it holds no pieces.
#[derive(Default)]
pub struct Storage(Vec<libc::iovec>);

// SAFETY: needed because pointers are not `Send`, and a device that keeps the allocation moves between threads. The
// vector is empty, so there is no pointer in it.
unsafe impl Send for Storage {}

impl From<Storage> for Buffers<'_> {
    fn from(storage: Storage) -> Self {
        Self {
            pieces: storage.0,
            len: 0,
            memory: PhantomData,
        }
    }
}

impl<'m> Buffers<'m> {
    /// Ends the use of the pieces and keeps their allocation.
    pub fn into_storage(mut self) -> Storage {
        self.pieces.clear();
        Storage(self.pieces)
    }

    /// Gives up the proof that the memory is there, for a request that goes on when this call is over.
    ///
    /// # Safety
    ///
    /// The caller keeps the memory of the pieces mapped as long as it uses them.
    pub unsafe fn detach(self) -> Buffers<'static> {
        Buffers {
            pieces: self.pieces,
            len: self.len,
            memory: PhantomData,
        }
    }

    /// No bytes.
    pub fn new() -> Self {
        Self {
            pieces: Vec::new(),
            len: 0,
            memory: PhantomData,
        }
    }

    /// Forgets all pieces and keeps the allocation.
    pub fn clear(&mut self) {
        self.pieces.clear();
        self.len = 0;
    }

    /// Appends a piece. The caller bounds the sum of lengths (a descriptor chain holds less than 4 GiB).
    pub fn push(&mut self, slice: &VolatileSlice<'m>) {
        self.pieces.push(libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        });
        self.len += slice.len();
    }

    /// Bytes in all pieces together.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when there is not a single byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces, for a vectored system call.
    pub fn iovecs(&self) -> &[libc::iovec] {
        &self.pieces
    }

    /// Reads from `fd` into the pieces and, behind them, into `rest`, with one `readv`. Returns the bytes read.
    pub fn readv(&mut self, fd: BorrowedFd<'_>, rest: &mut [u8]) -> io::Result<usize> {
        self.pieces.push(libc::iovec {
            iov_base: rest.as_mut_ptr().cast(),
            iov_len: rest.len(),
        });
        let count = vec_len(&self.pieces);
        // SAFETY: needed to read into guest memory without a copy. Each piece lies in guest memory that outlives 'm
        // and to which no reference exists; the last one is `rest`, borrowed for the call.
        let read = unsafe { libc::readv(fd.as_raw_fd(), self.pieces.as_ptr(), count) };
        let result = usize::try_from(read).map_err(|_| io::Error::last_os_error());
        self.pieces.pop();
        result
    }

    /// Writes all pieces to `fd` with one `writev`. Returns the bytes written.
    pub fn writev(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: needed to write from guest memory without a copy. Each piece lies in guest memory that outlives 'm.
        let written = unsafe { libc::writev(fd.as_raw_fd(), self.pieces.as_ptr(), vec_len(&self.pieces)) };
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    }

    /// Reads from the socket `fd` into the pieces, without waiting. Returns the bytes read.
    pub fn receive(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let mut message = self.message();
        // SAFETY: needed to read into guest memory without a copy. Each piece lies in guest memory that outlives 'm
        // and to which no reference exists; the message lives across the call.
        let read = unsafe { libc::recvmsg(fd.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }

    /// Writes the pieces to the socket `fd`, as far as it takes them without waiting, and without a SIGPIPE when nobody
    /// reads. Returns the bytes written.
    pub fn send(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: needed to write from guest memory without a copy. Each piece lies in guest memory that outlives 'm,
        // and the message lives across the call.
        let written = unsafe { libc::sendmsg(fd.as_raw_fd(), &self.message(), flags) };
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    }

    fn message(&self) -> libc::msghdr {
        // SAFETY: needed as the structure has private padding. All zero means no name, no pieces, no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.pieces.as_ptr().cast_mut();
        message.msg_iovlen = self.pieces.len();
        message
    }

    /// Appends the pieces of `other` from its byte `offset` on; both then name the same memory.
    pub fn extend_from(&mut self, other: &Buffers<'m>, offset: usize) {
        let mut skip = offset;
        for piece in &other.pieces {
            if skip >= piece.iov_len {
                skip -= piece.iov_len;
                continue;
            }
            self.pieces.push(libc::iovec {
                iov_base: piece.iov_base.cast::<u8>().wrapping_add(skip).cast(),
                iov_len: piece.iov_len - skip,
            });
            self.len += piece.iov_len - skip;
            skip = 0;
        }
    }

    /// Drops the first `count` bytes, or all when there are fewer.
    pub fn advance(&mut self, count: usize) {
        let mut left = count.min(self.len);
        self.len -= left;
        let whole = self
            .pieces
            .iter()
            .take_while(|piece| {
                let gone = left >= piece.iov_len;
                if gone {
                    left -= piece.iov_len;
                }
                gone
            })
            .count();
        self.pieces.drain(..whole);
        if left > 0 {
            let first = &mut self.pieces[0];
            first.iov_base = first.iov_base.cast::<u8>().wrapping_add(left).cast();
            first.iov_len -= left;
        }
    }

    /// Keeps the first `count` bytes and drops the others.
    pub fn truncate(&mut self, count: usize) {
        while self.len > count {
            let over = self.len - count;
            let last = self.pieces.last_mut().expect("a non-zero length has a piece");
            let cut = over.min(last.iov_len);
            last.iov_len -= cut;
            self.len -= cut;
            if last.iov_len == 0 {
                self.pieces.pop();
            }
        }
    }

    /// Takes the last byte away and gives access to it; none when there is none.
    pub fn pop_byte(&mut self) -> Option<VolatileSlice<'m>> {
        let last = *self.pieces.iter().rfind(|piece| piece.iov_len > 0)?;
        let offset = last.iov_len - 1;
        self.truncate(self.len - 1);
        // SAFETY: needed to keep a byte of a piece that is kept as an iovec. The piece came from a VolatileSlice of
        // memory that outlives 'm, it is not empty, and `offset` is its last byte.
        Some(unsafe { VolatileSlice::new(last.iov_base.cast::<u8>().add(offset), 1) })
    }

    /// Moves all pieces of `other` to the end of this one.
    pub fn append(&mut self, other: &mut Buffers<'m>) {
        self.pieces.append(&mut other.pieces);
        self.len += std::mem::take(&mut other.len);
    }

    /// Copies bytes from `offset` on into `out`; returns how many there were.
    pub fn read(&self, offset: usize, out: &mut [u8]) -> usize {
        let mut done = 0;
        self.walk(offset, out.len(), |piece| {
            piece.copy_to(&mut out[done..done + piece.len()]);
            done += piece.len();
        });
        done
    }

    /// Copies `data` to the bytes from `offset` on; returns how many found room.
    pub fn write(&self, offset: usize, data: &[u8]) -> usize {
        let mut done = 0;
        self.walk(offset, data.len(), |piece| {
            piece.copy_from(&data[done..done + piece.len()]);
            done += piece.len();
        });
        done
    }

    /// Reads a plain value at `offset`; none when it does not fit.
    pub fn read_obj<T: ByteValued + Default>(&self, offset: usize) -> Option<T> {
        let mut value = T::default();
        let bytes = value.as_mut_slice();
        (self.read(offset, bytes) == bytes.len()).then_some(value)
    }

    /// Calls `visit` with each contiguous run of the range, in order.
    fn walk(&self, offset: usize, len: usize, mut visit: impl FnMut(VolatileSlice<'_>)) {
        let (mut skip, mut left) = (offset, len);
        for piece in &self.pieces {
            if left == 0 {
                break;
            }
            if skip >= piece.iov_len {
                skip -= piece.iov_len;
                continue;
            }
            let count = left.min(piece.iov_len - skip);
            // SAFETY: needed to copy from a piece that is kept as an iovec. The piece came from a VolatileSlice of
            // memory that outlives 'm, and `skip + count` is within it.
            visit(unsafe { VolatileSlice::new(piece.iov_base.cast::<u8>().add(skip), count) });
            left -= count;
            skip = 0;
        }
    }
}

/// The count as the kernel takes it; it refuses more than 1024.
fn vec_len(pieces: &[libc::iovec]) -> libc::c_int {
    libc::c_int::try_from(pieces.len()).unwrap_or(libc::c_int::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::buffers;
    use std::os::fd::AsFd;

    #[test]
    fn reads_and_writes_across_pieces() {
        let (mut a, mut b) = ([1, 2, 3], [4, 5]);
        let mut pieces = [&mut a[..], &mut b[..]];
        let buffers = buffers(&mut pieces);
        let mut out = [0; 3];
        assert_eq!(buffers.read(1, &mut out), 3);
        assert_eq!(out, [2, 3, 4]);
        assert_eq!(buffers.write(2, &[9, 8, 7, 6]), 3);
        assert_eq!((a, b), ([1, 2, 9], [8, 7]));
    }

    #[test]
    fn reads_nothing_behind_the_end() {
        let mut a = [1];
        let mut pieces = [&mut a[..]];
        assert_eq!(buffers(&mut pieces).read(1, &mut [0; 4]), 0);
        assert_eq!(buffers(&mut pieces).read_obj::<u16>(0), None);
    }

    #[test]
    fn advances_into_the_middle_of_a_piece() {
        let (mut a, mut b) = ([1, 2], [3, 4, 5]);
        let mut pieces = [&mut a[..], &mut b[..]];
        let mut buffers = buffers(&mut pieces);
        buffers.advance(3);
        let mut out = [0; 2];
        assert_eq!((buffers.len(), buffers.read(0, &mut out)), (2, 2));
        assert_eq!(out, [4, 5]);
        buffers.advance(10);
        assert!(buffers.is_empty() && buffers.iovecs().is_empty());
    }

    #[test]
    fn truncates_to_the_first_bytes() {
        let (mut a, mut b) = ([1, 2], [3, 4, 5]);
        let mut pieces = [&mut a[..], &mut b[..]];
        let mut buffers = buffers(&mut pieces);
        buffers.truncate(1);
        assert_eq!((buffers.len(), buffers.iovecs().len()), (1, 1));
        buffers.truncate(0);
        assert!(buffers.iovecs().is_empty());
    }

    #[test]
    fn pops_the_last_byte_and_its_piece_when_that_is_empty() {
        let (mut a, mut b) = ([1, 2], [3]);
        let mut pieces = [&mut a[..], &mut b[..]];
        let mut buffers = buffers(&mut pieces);
        buffers.pop_byte().unwrap().copy_from(&[9u8]);
        assert_eq!((buffers.len(), buffers.iovecs().len()), (2, 1));
        buffers.pop_byte().unwrap().copy_from(&[8u8]);
        assert_eq!((buffers.len(), buffers.iovecs().len()), (1, 1));
        assert!(buffers.pop_byte().is_some() && buffers.pop_byte().is_none());
        assert_eq!((a, b), ([1, 8], [9]));
    }

    #[test]
    fn moves_bytes_between_pieces_and_a_descriptor() {
        let (from, to) = std::os::unix::net::UnixDatagram::pair().unwrap();
        let (mut a, mut b, mut rest) = ([1, 2], [3], [0; 4]);
        assert_eq!(
            buffers(&mut [&mut a[..], &mut b[..]])
                .writev(from.as_fd())
                .unwrap(),
            3
        );
        let mut into = [0; 2];
        let mut pieces = [&mut into[..]];
        let mut buffers = buffers(&mut pieces);
        assert_eq!(buffers.readv(to.as_fd(), &mut rest).unwrap(), 3);
        assert_eq!((buffers.len(), buffers.iovecs().len()), (2, 1));
        assert_eq!((into, rest), ([1, 2], [3, 0, 0, 0]));
    }

    #[test]
    fn receives_and_sends_without_waiting() {
        let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
        let (mut a, mut b, mut into) = ([1, 2], [3], [0; 4]);
        let mut pieces = [&mut into[..]];
        let mut room = buffers(&mut pieces);
        let nothing = room.receive(far.as_fd()).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        let sent = buffers(&mut [&mut a[..], &mut b[..]]).send(near.as_fd());
        assert_eq!((sent.unwrap(), room.receive(far.as_fd()).unwrap()), (3, 3));
        drop(far);
        let refused = buffers(&mut [&mut a[..]]).send(near.as_fd()).unwrap_err();
        assert_eq!((into, refused.kind()), ([1, 2, 3, 0], io::ErrorKind::BrokenPipe));
    }

    #[test]
    fn extends_by_the_rest_of_another() {
        let (mut a, mut b) = ([1, 2, 3], [4, 5]);
        let mut pieces = [&mut a[..], &mut b[..]];
        let other = buffers(&mut pieces);
        let mut all = Buffers::new();
        for offset in [2, 3, 5, 9] {
            all.extend_from(&other, offset);
        }
        let mut out = [0; 8];
        assert_eq!((all.read(0, &mut out), all.len(), other.len()), (5, 5, 5));
        assert_eq!(out[..5], [3, 4, 5, 4, 5]);
    }

    #[test]
    fn appends_the_pieces_of_another() {
        let (mut a, mut b) = ([1, 2], [3]);
        let (mut pieces, mut more) = ([&mut a[..]], [&mut b[..]]);
        let mut all = buffers(&mut pieces);
        let mut other = buffers(&mut more);
        all.append(&mut other);
        let mut out = [0; 3];
        all.read(0, &mut out);
        assert_eq!((out, other.len()), ([1, 2, 3], 0));
    }
}
