//! [`Uring`]: requests of a drive that are in flight in the kernel, by io_uring.
//!
//! The device pushes requests, submits them together, and takes back those that have landed. What a request needs stays
//! here until then: its chain, and the guest memory that the chain names. The ring's descriptor becomes readable when
//! something lands.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use io_uring::register::Restriction;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use vm_memory::{GuestMemoryBackend, VolatileSlice};

use super::announced::Announced;
use super::backend::{MAX_FILES, Place};
use super::request::Request;
use crate::GuestMemory;
use crate::virtio::{Buffers, Chain, ChainStorage};

/// The most requests in flight. As many as an honest driver can have: each takes an entry of the queue.
pub(super) const DEPTH: u16 = 256;

/// From `linux/io_uring.h`.
const REGISTER_FILES_UPDATE: u8 = 6;

/// A request that was popped and not yet answered.
pub(super) struct Flight {
    pub(super) chain: Chain<'static>,
    pub(super) status: VolatileSlice<'static>,
    pub(super) request: Request,
    /// Bytes of data that it moves.
    pub(super) bytes: usize,
    /// When it began.
    pub(super) start: Instant,
    place: Place,
    /// Bytes that were moved so far.
    done: u64,
    /// Whether a write is to be durable before it is answered.
    pub(super) write_through: bool,
}

/// Requests in flight over the files of one backend.
pub(super) struct Uring {
    ring: IoUring,
    /// By the number that goes with a request through the kernel.
    flights: Vec<Option<Flight>>,
    free: Vec<u16>,
    spare: Vec<ChainStorage>,
    /// What keeps the memory of the flights mapped while the device is not being called.
    memory: Vec<GuestMemory>,
}

// SAFETY: needed because the chains and status bytes hold pointers to guest memory, which any thread may use; `memory`
// keeps it mapped. The ring is used through `&mut self` only.
unsafe impl Send for Uring {}

impl Uring {
    /// A ring over `files`.
    pub(super) fn new(files: &[Arc<File>]) -> io::Result<Self> {
        // It begins disabled, to be restricted: nobody can make it do more than a drive needs.
        let ring = IoUring::builder().setup_r_disabled().build(u32::from(DEPTH))?;
        let submitter = ring.submitter();
        submitter.register_files(&table(files))?;
        submitter.register_restrictions(&mut [
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()),
            Restriction::register_op(REGISTER_FILES_UPDATE),
        ])?;
        submitter.register_enable_rings()?;
        Ok(Self {
            ring,
            flights: Vec::new(),
            free: Vec::new(),
            spare: Vec::new(),
            memory: Vec::new(),
        })
    }

    /// Works on other files from now on. Nothing is in flight. After an error some of the old ones are gone.
    pub(super) fn set_files(&mut self, files: &[Arc<File>]) -> io::Result<()> {
        let table = table(files);
        match self.ring.submitter().register_files_update(0, &table)? {
            count if count == table.len() => Ok(()),
            _ => Err(ErrorKind::OutOfMemory.into()),
        }
    }

    /// True when nothing is in flight.
    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.flights.len()
    }

    /// True when no other request can be taken.
    pub(super) fn is_full(&self) -> bool {
        self.flights.len() - self.free.len() == usize::from(DEPTH)
    }

    /// A chain to pop into, with allocations of earlier ones.
    pub(super) fn chain<'m>(&mut self) -> Chain<'m> {
        self.spare.pop().unwrap_or_default().into()
    }

    /// Ends the use of a chain.
    pub(super) fn give_back(&mut self, chain: Chain<'_>) {
        self.spare.push(chain.into_storage());
    }

    /// Takes a request that reads, writes or flushes, and is valid. It goes with the next [`Uring::submit`]. Returns when
    /// it began.
    ///
    /// # Safety
    ///
    /// The caller calls [`Uring::keep`] with the memory of the chain before it lets go of that memory.
    pub(super) unsafe fn push(
        &mut self,
        chain: Chain<'_>,
        status: &VolatileSlice<'_>,
        request: Request,
        bytes: usize,
        place: Place,
        write_through: bool,
    ) -> Instant {
        let start = Instant::now();
        let flight = Flight {
            // SAFETY: needed to keep the chain in this structure. As the caller promises, `memory` keeps it valid.
            chain: unsafe { chain.detach() },
            // SAFETY: as above; the status byte is one byte of the same memory.
            status: unsafe { VolatileSlice::new(status.ptr_guard_mut().as_ptr(), 1) },
            request,
            bytes,
            start,
            place,
            done: 0,
            write_through,
        };
        let number = self.free.pop().unwrap_or_else(|| {
            self.flights.push(None);
            u16::try_from(self.flights.len() - 1).expect("at most DEPTH are taken")
        });
        let flight = self.flights[usize::from(number)].insert(flight);
        let entry = flight.entry(number);
        self.queue(&entry);
        start
    }

    /// Starts everything that was pushed. `wait` waits until something has landed.
    pub(super) fn submit(&mut self, wait: bool) -> io::Result<()> {
        loop {
            match self.ring.submit_and_wait(usize::from(wait)) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                done => return done.map(drop),
            }
        }
    }

    /// The next request that has landed, with what became of it.
    pub(super) fn land(&mut self) -> Option<(Flight, io::Result<()>)> {
        loop {
            let landed: cqueue::Entry = self.ring.completion().next()?;
            let number = u16::try_from(landed.user_data()).expect("numbers come back as they were");
            let slot = &mut self.flights[usize::from(number)];
            let flight = slot.as_mut().expect("a request lands once");
            match flight.take(landed.result()) {
                None => {
                    let entry = flight.entry(number);
                    self.queue(&entry);
                }
                Some(result) => {
                    self.free.push(number);
                    return slot.take().map(|flight| (flight, result));
                }
            }
        }
    }

    /// True when requests wait for a submission: new ones, or what the kernel has done in part.
    pub(super) fn has_more(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    /// Keeps `mem` mapped as long as something is in flight.
    pub(super) fn keep(&mut self, mem: &GuestMemory) {
        if self.is_empty() {
            self.memory.clear();
        } else if !self.memory.iter().any(|kept| is_same(kept, mem)) {
            self.memory.push(mem.clone());
        }
    }

    /// Waits until nothing is in flight, and forgets what became of it.
    pub(super) fn drain(&mut self) {
        while !self.is_empty() {
            if let Err(error) = self.submit(true) {
                // The kernel is short of something, for a moment. Memory that it writes to cannot be let go of.
                log::warn!("cannot wait for the requests of a drive: {error}");
                thread::sleep(Duration::from_millis(10));
            }
            while let Some((flight, _)) = self.land() {
                self.give_back(flight.chain);
            }
        }
        self.memory.clear();
    }

    fn queue(&mut self, entry: &squeue::Entry) {
        // SAFETY: needed as the kernel works with addresses. They are those of a flight, which stays in `flights` with
        // its pieces where they are until it has landed, and whose memory stays mapped.
        let queued = unsafe { self.ring.submission().push(entry) };
        queued.expect("there is an entry for each request in flight");
    }
}

impl AsRawFd for Uring {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        self.drain();
    }
}

impl Flight {
    /// What is to be done once more, now that a write has landed that others may have undone.
    pub(super) fn again(&self) -> Option<Request> {
        match self.request {
            Request::Write { offset } if !self.chain.readable.is_empty() => Some(Request::Write {
                offset: offset + self.done,
            }),
            _ => None,
        }
    }

    /// What is left to be done, for the kernel.
    fn entry(&self, number: u16) -> squeue::Entry {
        let pieces = |buffers: &Buffers<'_>| {
            let iovecs = buffers.iovecs();
            let count = u32::try_from(iovecs.len()).expect("a queue bounds the pieces of a chain");
            (iovecs.as_ptr(), count)
        };
        let file = types::Fixed(self.place.file);
        let entry = match self.request {
            Request::Read { .. } => {
                let (pieces, count) = pieces(&self.chain.writable);
                let read = opcode::Readv::new(file, pieces, count);
                read.offset(self.place.offset + self.done).build()
            }
            Request::Write { .. } => {
                let (pieces, count) = pieces(&self.chain.readable);
                let flags = if self.write_through { libc::RWF_DSYNC } else { 0 };
                let write = opcode::Writev::new(file, pieces, count);
                write
                    .offset(self.place.offset + self.done)
                    .rw_flags(flags)
                    .build()
            }
            _ => {
                let flush = opcode::Fsync::new(file);
                flush.flags(types::FsyncFlags::DATASYNC).build()
            }
        };
        entry.user_data(u64::from(number))
    }

    /// Takes what the kernel says of it; none when there is more to do.
    fn take(&mut self, result: i32) -> Option<io::Result<()>> {
        let (buffers, nothing) = match self.request {
            Request::Read { .. } => (&mut self.chain.writable, ErrorKind::UnexpectedEof),
            Request::Write { .. } => (&mut self.chain.readable, ErrorKind::WriteZero),
            _ if result >= 0 => return Some(Ok(())),
            _ => return Some(Err(io::Error::from_raw_os_error(-result))),
        };
        match usize::try_from(result) {
            Ok(0) => Some(Err(nothing.into())),
            // What is left in the buffers then is done again.
            Ok(_) if self.place.announced.as_ref().is_some_and(Announced::has_met) => Some(Ok(())),
            Ok(count) => {
                buffers.advance(count);
                self.done += u64::try_from(count).expect("a usize fits");
                buffers.is_empty().then_some(Ok(()))
            }
            Err(_) if result == -libc::EINTR => None,
            Err(_) => Some(Err(io::Error::from_raw_os_error(-result))),
        }
    }
}

/// All entries of the ring's table of files.
fn table(files: &[Arc<File>]) -> Vec<RawFd> {
    let mut table: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
    table.resize(MAX_FILES, -1);
    table
}

/// Whether both are the same mappings.
fn is_same(one: &GuestMemory, other: &GuestMemory) -> bool {
    one.num_regions() == other.num_regions()
        && (one.iter().zip(other.iter())).all(|(one, other)| std::ptr::eq(one, other))
}
