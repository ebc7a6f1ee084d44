//! What the fuzz targets of virtio devices share.

pub mod device;
pub mod driver;
pub mod registers;
pub mod wire;

use devices::GuestMemory;
use devices::testing::{self, Inline};

/// Bytes of guest memory.
pub const MEMORY: u64 = 1 << 18;

/// Fresh guest memory.
pub fn memory() -> GuestMemory {
    testing::memory(MEMORY as usize)
}

/// Reports every descriptor that the devices watch for themselves.
pub fn ready(host: &Inline) {
    let watched = host
        .watch
        .watched
        .lock()
        .expect("nothing panics with the lock")
        .clone();
    for (_, token) in watched
        .into_iter()
        .filter(|(_, token)| *token > u32::from(u16::MAX))
    {
        host.event(token);
    }
}
