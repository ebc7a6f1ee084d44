//! The first virtio-mmio device of a machine (virtio 1.2 §4.2.2), and how a [`TinyKernel`] drives it.

use crate::TinyKernel;

/// Its register window, and some of its registers.
const MMIO: u32 = 0xc000_1000;
const DRIVER_FEATURES: u32 = MMIO + 0x20;
const DRIVER_FEATURES_SEL: u32 = MMIO + 0x24;
const QUEUE_SEL: u32 = MMIO + 0x30;
const QUEUE_NUM: u32 = MMIO + 0x38;
const QUEUE_READY: u32 = MMIO + 0x44;
const QUEUE_NOTIFY: u32 = MMIO + 0x50;
const STATUS: u32 = MMIO + 0x70;
const QUEUE_DESC: u32 = MMIO + 0x80;
const QUEUE_DRIVER: u32 = MMIO + 0x90;
const QUEUE_DEVICE: u32 = MMIO + 0xa0;

/// Where the parts of a queue are that the driver and the device write, behind its descriptors.
pub const AVAIL: u32 = 0x1000;
/// See [`AVAIL`].
pub const USED: u32 = 0x2000;

impl TinyKernel {
    /// Agrees with the device on `VIRTIO_F_VERSION_1` alone.
    pub fn agree(self) -> Self {
        self.store(STATUS, 3)
            .store(DRIVER_FEATURES_SEL, 1)
            .store(DRIVER_FEATURES, 1)
            .store(STATUS, 11)
    }

    /// Sets up a queue of `size` entries whose parts begin at the address `ring`.
    pub fn set_queue(self, queue: u32, size: u32, ring: u32) -> Self {
        self.store(QUEUE_SEL, queue)
            .store(QUEUE_NUM, size)
            .store(QUEUE_DESC, ring)
            .store(QUEUE_DRIVER, ring + AVAIL)
            .store(QUEUE_DEVICE, ring + USED)
            .store(QUEUE_READY, 1)
    }

    /// Tells the device that its driver is ready.
    pub fn set_driver_ok(self) -> Self {
        self.store(STATUS, 15)
    }

    /// Tells the device that a queue has something new.
    pub fn kick(self, queue: u32) -> Self {
        self.store(QUEUE_NOTIFY, queue)
    }
}
