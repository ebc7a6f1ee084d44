//! What the fuzz targets of virtio devices share.

pub mod driver;
pub mod registers;
pub mod wire;

use devices::{GuestMemory, testing};

/// Bytes of guest memory.
pub const MEMORY: u64 = 1 << 18;

/// Fresh guest memory.
pub fn memory() -> GuestMemory {
    testing::memory(MEMORY as usize)
}
