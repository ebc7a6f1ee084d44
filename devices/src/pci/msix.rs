//! MSI-X (PCI 3.0 §6.8.2) in two halves: [`Msix`], the table and the capability that the guest programs under the
//! function's lock, and [`MsixVectors`], through which io loops raise interrupts with no lock.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::StateError;

/// The most vectors a function can have.
pub const MAX_VECTORS: u16 = 2048;
/// Bytes of a table entry.
pub const ENTRY_LEN: u64 = 16;
/// Capability id.
pub const CAPABILITY: u8 = 0x11;

/// Message control bits.
pub mod control {
    /// MSI-X is in use.
    pub const ENABLE: u16 = 1 << 15;
    /// All vectors are masked.
    pub const FUNCTION_MASK: u16 = 1 << 14;
    /// The bits that the guest can write.
    pub const ALL: u16 = ENABLE | FUNCTION_MASK;
}

/// Vector control: the vector is masked.
const ENTRY_MASKED: u32 = 1;

/// The memory write that is an interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiMessage {
    /// Where, in the address space of the interrupt controllers.
    pub address: u64,
    /// What.
    pub data: u32,
}

/// Makes a vector's eventfd send a message. Called on vCPU threads under the function's lock.
pub trait MsiRouter: Send + Sync {
    /// From now on the eventfd of `vector` sends `message`. On failure the vector stays masked.
    fn route(&self, vector: u16, message: MsiMessage) -> io::Result<()>;
}

struct Vector {
    irqfd: EventFd,
    /// By itself, by the function, or because MSI-X is off.
    masked: AtomicBool,
    pending: AtomicBool,
}

/// The raising half, shared by the table and the io loops.
pub struct MsixVectors(Box<[Vector]>);

impl MsixVectors {
    /// `count` masked vectors. Fails when no descriptor is left.
    pub fn new(count: u16) -> io::Result<Self> {
        let vector = |_| {
            Ok(Vector {
                irqfd: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
                masked: AtomicBool::new(true),
                pending: AtomicBool::new(false),
            })
        };
        (0..count).map(vector).collect::<io::Result<_>>().map(Self)
    }

    /// One descriptor per vector, in order: writing it sends the vector's message.
    pub fn irqfds(&self) -> impl Iterator<Item = &EventFd> {
        self.0.iter().map(|vector| &vector.irqfd)
    }

    /// Sends the interrupt; while the vector is masked it becomes pending instead, and this is false. A vector
    /// that does not exist is never sent.
    pub fn raise(&self, vector: u16) -> bool {
        let Some(vector) = self.0.get(usize::from(vector)) else {
            return true;
        };
        if !vector.masked.load(Ordering::SeqCst) {
            vector.send();
            return true;
        }
        vector.pending.store(true, Ordering::SeqCst);
        // An unmasking thread that looked before this store would leave the interrupt behind.
        if vector.masked.load(Ordering::SeqCst) {
            return false;
        }
        vector.send_pending();
        true
    }

    /// Forgets all pending interrupts; true when there was one.
    pub fn take_pending(&self) -> bool {
        let take = |taken, vector: &Vector| vector.pending.swap(false, Ordering::SeqCst) || taken;
        self.0.iter().fold(false, take)
    }

    fn set_masked(&self, vector: usize, masked: bool) {
        let vector = &self.0[vector];
        vector.masked.store(masked, Ordering::SeqCst);
        if !masked {
            vector.send_pending();
        }
    }

    fn pending(&self) -> impl Iterator<Item = bool> {
        self.0.iter().map(|vector| vector.pending.load(Ordering::SeqCst))
    }
}

impl Vector {
    fn send(&self) {
        // Only a full counter refuses, and then the interrupt is on its way already.
        let _ = self.irqfd.write(1);
    }

    fn send_pending(&self) {
        if self.pending.swap(false, Ordering::SeqCst) {
            self.send();
        }
    }
}

/// A table entry: address low, address high, data, vector control.
type Entry = [u32; 4];

/// The saved state; the message control word is in the configuration space.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    entries: Vec<Entry>,
    pending: Vec<bool>,
}

/// The table and the mode.
pub struct Msix {
    entries: Vec<Entry>,
    /// What the router was told last; routing is expensive, so it is not told the same twice.
    routed: Vec<Option<MsiMessage>>,
    vectors: Arc<MsixVectors>,
    router: Arc<dyn MsiRouter>,
    control: u16,
    routings: u64,
}

impl Msix {
    /// MSI-X turned off, and every entry masked as after reset.
    pub fn new(vectors: Arc<MsixVectors>, router: Arc<dyn MsiRouter>) -> Self {
        let count = vectors.0.len();
        Self {
            entries: vec![[0, 0, 0, ENTRY_MASKED]; count],
            routed: vec![None; count],
            vectors,
            router,
            control: 0,
            routings: 0,
        }
    }

    /// How often a vector was given a new message.
    pub fn routings(&self) -> u64 {
        self.routings
    }

    /// The capability behind its two header bytes, and its write mask. Table and PBA are in BAR 0.
    pub fn capability(&self, table_offset: u32, pba_offset: u32) -> ([u8; 10], [u8; 2]) {
        let last = u16::try_from(self.entries.len() - 1).expect("at most 2048 vectors");
        let mut body = [0; 10];
        body[..2].copy_from_slice(&last.to_le_bytes());
        body[2..6].copy_from_slice(&table_offset.to_le_bytes());
        body[6..].copy_from_slice(&pba_offset.to_le_bytes());
        (body, control::ALL.to_le_bytes())
    }

    /// Follows the message control word.
    pub fn set_control(&mut self, control: u16) {
        self.control = control & control::ALL;
        (0..self.entries.len()).for_each(|vector| self.update(vector));
    }

    /// The message control word's writable bits.
    pub fn control(&self) -> u16 {
        self.control
    }

    /// Reads the table. Bytes behind its end stay as they are.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.entries.iter().flatten().flat_map(|word| word.to_le_bytes());
        read_bytes(bytes, offset, data);
    }

    /// Writes the table: aligned accesses of 4 and 8 bytes; others have no effect (PCI 3.0 §6.8.2).
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let aligned = matches!(data.len(), 4 | 8) && (offset % ENTRY_LEN).is_multiple_of(data.len() as u64);
        let Ok(vector) = usize::try_from(offset / ENTRY_LEN) else {
            return;
        };
        let (true, Some(entry)) = (aligned, self.entries.get_mut(vector)) else {
            return;
        };
        let first = usize::try_from(offset % ENTRY_LEN / 4).expect("below 4");
        for (word, bytes) in entry[first..].iter_mut().zip(data.chunks_exact(4)) {
            *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        entry[3] &= ENTRY_MASKED;
        self.update(vector);
    }

    /// Reads the pending bits. Bytes behind the last vector's stay as they are.
    pub fn read_pba(&self, offset: u64, data: &mut [u8]) {
        let pending: Vec<_> = self.vectors.pending().collect();
        let byte = |bits: &[bool]| bits.iter().rev().fold(0, |byte, &bit| byte << 1 | u8::from(bit));
        // The array consists of quadwords.
        let padding = pending.len().div_ceil(64) * 8 - pending.len().div_ceil(8);
        let bytes = pending.chunks(8).map(byte).chain(std::iter::repeat_n(0, padding));
        read_bytes(bytes, offset, data);
    }

    /// What a snapshot keeps.
    pub fn save(&self) -> State {
        State {
            entries: self.entries.clone(),
            pending: self.vectors.pending().collect(),
        }
    }

    /// Takes a saved state into a table that is turned off; `set_control` then routes and delivers.
    pub fn load(&mut self, state: State) -> Result<(), StateError> {
        let count = self.entries.len();
        if state.entries.len() != count || state.pending.len() != count {
            return Err(StateError::Inconsistent {
                kind: "msi-x",
                what: format!("it does not have the {count} vectors of this device"),
            });
        }
        self.entries = state.entries;
        self.entries.iter_mut().for_each(|entry| entry[3] &= ENTRY_MASKED);
        for (vector, pending) in self.vectors.0.iter().zip(state.pending) {
            vector.pending.store(pending, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Brings a vector's route and mask in line with its entry and the mode.
    fn update(&mut self, vector: usize) {
        let [low, high, data, entry_control] = self.entries[vector];
        let live = self.control == control::ENABLE && entry_control & ENTRY_MASKED == 0;
        if !live {
            return self.vectors.set_masked(vector, true);
        }
        let message = MsiMessage {
            address: u64::from(high) << 32 | u64::from(low),
            data,
        };
        if self.routed[vector] != Some(message) {
            // Nothing may go out by the old route once the guest has given a new one.
            self.vectors.set_masked(vector, true);
            let number = u16::try_from(vector).expect("at most 2048 vectors");
            if let Err(error) = self.router.route(number, message) {
                log::warn!("MSI-X vector {number} stays masked, {message:x?} cannot be routed: {error}");
                return self.routed[vector] = None;
            }
            self.routed[vector] = Some(message);
            self.routings += 1;
        }
        self.vectors.set_masked(vector, false);
    }
}

fn read_bytes(bytes: impl Iterator<Item = u8>, offset: u64, data: &mut [u8]) {
    let Ok(offset) = usize::try_from(offset) else {
        return;
    };
    data.iter_mut()
        .zip(bytes.skip(offset))
        .for_each(|(to, from)| *to = from);
}

#[cfg(test)]
mod tests;
