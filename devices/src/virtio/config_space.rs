//! [`ConfigSpace`]: a device's configuration space as the registers show it.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// The copy that a slot's registers read and that whoever has the device renews: the slot, or the lane's io thread.
/// Nobody holds its lock while taking another one.
#[derive(Debug, Default)]
pub struct ConfigSpace(Mutex<Shown>);

#[derive(Debug, Default)]
struct Shown {
    bytes: Vec<u8>,
    generation: u8,
}

impl ConfigSpace {
    /// A first copy.
    pub fn new(bytes: &[u8]) -> Self {
        let space = Self::default();
        space.restore(bytes, 0);
        space
    }

    /// Shows `bytes` from now on. True when they differ from what was shown, and then in a new generation.
    pub fn set(&self, bytes: &[u8]) -> bool {
        let mut shown = self.lock();
        let differs = shown.bytes != bytes;
        if differs {
            shown.bytes = bytes.to_vec();
            shown.generation = shown.generation.wrapping_add(1);
        }
        differs
    }

    /// Shows what a snapshot has kept.
    pub(super) fn restore(&self, bytes: &[u8], generation: u8) {
        *self.lock() = Shown {
            bytes: bytes.to_vec(),
            generation,
        };
    }

    /// Tells a driver that reads several fields whether they belong together (virtio 1.2 §2.5.1).
    pub fn generation(&self) -> u8 {
        self.lock().generation
    }

    /// Reads from `offset` on; bytes behind the end read as zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Ok(offset) = usize::try_from(offset) else {
            return;
        };
        if let Some(rest) = self.lock().bytes.get(offset..) {
            let count = rest.len().min(data.len());
            data[..count].copy_from_slice(&rest[..count]);
        }
    }

    /// Where a write of `len` bytes at `offset` goes; none when a part of it is behind the end.
    pub(super) fn place(&self, offset: u64, len: usize) -> Option<usize> {
        let offset = usize::try_from(offset).ok()?;
        let end = offset.checked_add(len)?;
        (end <= self.lock().bytes.len()).then_some(offset)
    }

    fn lock(&self) -> MutexGuard<'_, Shown> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn has_a_new_generation_with_new_bytes_only() {
        let space = ConfigSpace::new(&[1, 2]);
        assert!(!space.set(&[1, 2]));
        assert_eq!(space.generation(), 0);
        assert!(space.set(&[1, 3]));
        assert_eq!(space.generation(), 1);
    }

    #[test]
    fn reads_zeros_behind_the_end() {
        let space = ConfigSpace::new(&[1, 2]);
        let mut data = [9; 3];
        space.read(1, &mut data);
        assert_eq!(data, [2, 0, 0]);
        space.read(u64::MAX, &mut data);
        assert_eq!(data, [0; 3]);
    }

    #[test]
    fn has_a_place_for_what_ends_inside() {
        let space = ConfigSpace::new(&[1, 2]);
        assert_eq!((space.place(0, 2), space.place(1, 1)), (Some(0), Some(1)));
        assert_eq!((space.place(1, 2), space.place(2, 1)), (None, None));
        assert_eq!((space.place(u64::MAX, 1), space.place(u64::MAX, 8)), (None, None));
    }
}
