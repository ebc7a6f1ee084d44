//! The address map of one I/O space (port I/O or MMIO): which device answers which addresses.
//!
//! vCPU threads look addresses up on every exit that no ioeventfd took; the control thread adds and removes
//! ranges. **Lock order**: the bus's own lock is released before a device is locked, and no device locks a second
//! device. A device may reach the bus while locked (a moved PCI BAR), so never hold the bus while locking a device.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// A device that answers register accesses. Called on the vCPU thread that made the access.
pub trait BusDevice: Send {
    /// Reads `data.len()` bytes at `offset` bytes from the start of the range. What the device does not
    /// implement must read as the caller left it (all ones, see [`Bus::read`]).
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes `data` at `offset` bytes from the start of the range.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device as the bus and its owner share it.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// Why a range could not be added.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or runs past the end of the address space.
    #[error("the range of {len:#x} bytes at {base:#x} is empty or runs past the end of the address space")]
    InvalidRange {
        /// First address.
        base: u64,
        /// Bytes.
        len: u64,
    },
    /// Another device answers part of the range.
    #[error("the range of {len:#x} bytes at {base:#x} overlaps another device")]
    Overlap {
        /// First address.
        base: u64,
        /// Bytes.
        len: u64,
    },
}

struct Entry {
    len: u64,
    device: SharedDevice,
}

/// An I/O address space.
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<BTreeMap<u64, Entry>>,
}

impl Bus {
    /// An empty address space.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets `device` answer `len` bytes from `base`.
    pub fn insert(&self, base: u64, len: u64, device: SharedDevice) -> Result<(), BusError> {
        if len == 0 {
            return Err(BusError::InvalidRange { base, len });
        }
        let last = base
            .checked_add(len - 1)
            .ok_or(BusError::InvalidRange { base, len })?;
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        let clash = ranges
            .range(..=last)
            .next_back()
            .is_some_and(|(start, e)| start + (e.len - 1) >= base);
        if clash {
            return Err(BusError::Overlap { base, len });
        }
        ranges.insert(base, Entry { len, device });
        Ok(())
    }

    /// Takes the range that starts at `base` away; true when there was one.
    pub fn remove(&self, base: u64) -> bool {
        self.ranges
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&base)
            .is_some()
    }

    /// Reads at `address`. Bytes that no device answers read as all ones; false when no device answered.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        let Some((offset, device)) = self.find(address, data.len()) else {
            return false;
        };
        device
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .read(offset, data);
        true
    }

    /// Writes at `address`; false when no device answered.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let Some((offset, device)) = self.find(address, data.len()) else {
            return false;
        };
        device
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(offset, data);
        true
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, SharedDevice)> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let (base, entry) = ranges.range(..=address).next_back()?;
        let offset = address - base;
        let end = offset.checked_add(u64::try_from(len).ok()?)?;
        (end <= entry.len).then(|| (offset, Arc::clone(&entry.device)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Register(u8);

    impl BusDevice for Register {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data[0] = self.0 + u8::try_from(offset).unwrap();
        }
        fn write(&mut self, _: u64, data: &[u8]) {
            self.0 = data[0];
        }
    }

    fn register() -> SharedDevice {
        Arc::new(Mutex::new(Register(7)))
    }

    #[test]
    fn routes_an_access_to_the_device_with_its_offset() {
        let bus = Bus::new();
        bus.insert(0x100, 8, register()).unwrap();
        let mut data = [0];
        assert!(bus.read(0x103, &mut data));
        assert_eq!(data, [10]);
        assert!(bus.write(0x100, &[1]));
        bus.read(0x100, &mut data);
        assert_eq!(data, [1]);
    }

    #[test]
    fn reads_all_ones_where_no_device_is() {
        let bus = Bus::new();
        bus.insert(0x100, 4, register()).unwrap();
        let mut data = [0; 4];
        assert!(!bus.read(0x104, &mut data));
        assert_eq!(data, [0xff; 4]);
        assert!(!bus.write(0xff, &[0]));
    }

    #[test]
    fn refuses_an_access_that_straddles_the_end() {
        let bus = Bus::new();
        bus.insert(0x100, 4, register()).unwrap();
        assert!(!bus.read(0x102, &mut [0; 4]));
    }

    #[test]
    fn refuses_overlap_and_empty_and_wrapping_ranges() {
        let bus = Bus::new();
        bus.insert(0x100, 0x10, register()).unwrap();
        assert_eq!(
            bus.insert(0x10f, 1, register()),
            Err(BusError::Overlap { base: 0x10f, len: 1 })
        );
        assert_eq!(
            bus.insert(0xf0, 0x11, register()),
            Err(BusError::Overlap {
                base: 0xf0,
                len: 0x11
            })
        );
        assert!(bus.insert(0xf0, 0x10, register()).is_ok());
        assert_eq!(
            bus.insert(0, 0, register()),
            Err(BusError::InvalidRange { base: 0, len: 0 })
        );
        assert!(bus.insert(u64::MAX, 2, register()).is_err());
        assert!(bus.insert(u64::MAX, 1, register()).is_ok());
    }

    #[test]
    fn forgets_a_removed_range() {
        let bus = Bus::new();
        bus.insert(0x100, 4, register()).unwrap();
        assert!(bus.remove(0x100));
        assert!(!bus.remove(0x100));
        assert!(!bus.read(0x100, &mut [0]));
    }
}
