//! [`Room`]: receive buffers of the guest, popped for the time of one turn.
//!
//! Linux offers buffers of 4 KiB. So a read from a host program's socket fills many at once, right behind the places
//! of their headers, and the headers are written when it is known how far the data goes.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

use super::packet::{HEADER_BYTES, HEADER_LEN, Header};
use crate::virtio::{Buffers, Chain, ChainStorage, QueueError, Ring};

/// The most pieces of one read.
const MAX_PIECES: usize = 1024;

/// Popped and still empty buffers. Each has place for a header and at least one byte.
pub(super) struct Room<'r, 'q, 'm> {
    ring: &'r mut Ring<'q, 'm>,
    chains: VecDeque<Chain<'m>>,
    spares: &'r mut Vec<ChainStorage>,
    /// Bytes of payload that they hold.
    capacity: usize,
    pieces: usize,
    /// What a read goes into.
    payload: Buffers<'m>,
    /// Buffers that were too short for a packet.
    too_short: u64,
}

impl<'r, 'q, 'm> Room<'r, 'q, 'm> {
    pub(super) fn new(ring: &'r mut Ring<'q, 'm>, spares: &'r mut Vec<ChainStorage>) -> Self {
        ring.disable_notify();
        Self {
            ring,
            chains: VecDeque::new(),
            spares,
            capacity: 0,
            pieces: 0,
            payload: Buffers::new(),
            too_short: 0,
        }
    }

    /// Pops buffers until they hold `wanted` bytes or there are no more; false when there is none.
    pub(super) fn gather(&mut self, wanted: usize) -> Result<bool, QueueError> {
        // A driver that offers nothing but useless buffers meets the bound.
        for _ in 0..self.ring.size() {
            if self.capacity >= wanted || !self.pop()? {
                break;
            }
        }
        Ok(!self.chains.is_empty())
    }

    /// Pops one buffer; false when there is none, or no more fit into a read.
    fn pop(&mut self) -> Result<bool, QueueError> {
        let mut chain = self.spares.pop().map_or_else(Chain::new, Chain::from);
        if !self.ring.pop(&mut chain)? {
            self.spares.push(chain.into_storage());
            return Ok(false);
        }
        let (len, pieces) = (chain.writable.len(), chain.writable.iovecs().len());
        let first = self.chains.is_empty();
        if len > HEADER_LEN && (first || self.pieces + pieces <= MAX_PIECES) {
            self.capacity += len - HEADER_LEN;
            self.pieces += pieces;
            self.chains.push_back(chain);
            return Ok(true);
        }
        if first {
            self.ring.push(chain.head(), 0);
            self.too_short += 1;
        } else {
            // Its turn comes when those before it have been used.
            self.ring.unpop(1);
        }
        self.spares.push(chain.into_storage());
        Ok(first)
    }

    /// Asks the driver to tell of more buffers; true when there are some by now.
    pub(super) fn await_more(&mut self) -> Result<bool, QueueError> {
        let more = self.ring.enable_notify()?;
        if more {
            self.ring.disable_notify();
        }
        Ok(more)
    }

    /// Gives the driver a packet without payload. A buffer was gathered.
    pub(super) fn put(&mut self, header: Header) {
        self.use_first(0, header);
    }

    /// Reads up to `limit` bytes from `socket` into the gathered buffers; they stay where they are until
    /// [`Room::deliver`].
    pub(super) fn read(&mut self, socket: BorrowedFd<'_>, limit: usize) -> io::Result<usize> {
        self.payload.clear();
        for chain in &self.chains {
            self.payload.extend_from(&chain.writable, HEADER_LEN);
            if self.payload.len() >= limit {
                break;
            }
        }
        self.payload.truncate(limit);
        self.payload.receive(socket)
    }

    /// Gives the driver the `len` bytes that were read, in packets with this header; returns their count.
    pub(super) fn deliver(&mut self, len: usize, header: Header) -> u64 {
        let (mut left, mut packets) = (len, 0);
        while left > 0 {
            left -= self.use_first(left, header);
            packets += 1;
        }
        packets
    }

    /// Uses the first buffer for a packet that carries up to `len` of the bytes read; returns how many.
    fn use_first(&mut self, len: usize, header: Header) -> usize {
        let chain = self.chains.pop_front().expect("the caller has gathered buffers");
        let capacity = chain.writable.len() - HEADER_LEN;
        let len = len.min(capacity);
        let len_field = u32::try_from(len).expect("a read is limited to MAX_PAYLOAD");
        let header = Header {
            len: len_field,
            ..header
        };
        chain.writable.write(0, &header.to_bytes());
        self.ring.push(chain.head(), HEADER_BYTES + len_field);
        self.capacity -= capacity;
        self.pieces -= chain.writable.iovecs().len();
        self.spares.push(chain.into_storage());
        len
    }

    /// Makes the packets visible to the driver.
    pub(super) fn publish(&mut self) {
        self.ring.publish();
    }

    /// Gives back what was not used; returns how many buffers were too short for a packet.
    pub(super) fn close(self) -> u64 {
        let unused = u16::try_from(self.chains.len()).expect("no more than the queue has entries");
        self.ring.unpop(unused);
        self.ring.publish();
        let storages = self.chains.into_iter().map(Chain::into_storage);
        self.spares.extend(storages);
        self.too_short
    }
}
