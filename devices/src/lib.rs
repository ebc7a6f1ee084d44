//! Device models of Mayfly. They know guest memory, file descriptors and the virtio specification; they know no KVM,
//! no HTTP and no JSON route, so that all of them run in unit tests with plain memory.
//!
//! # How to add a virtio device
//! 1. Write `virtio/NAME.rs` with `Config` (the API body), `Patch`, `Metrics` and `State`, and a struct that
//!    implements [`virtio::VirtioDevice`]. `virtio/rng.rs` is the smallest example.
//! 2. Add one variant to [`catalog::DeviceConfig`] and one arm to its `build`.
//! 3. Add one row to the route table of the `vmm` crate, then the OpenAPI file, the docs and the changelog.
//!
//! # How a virtio device lives
//! A [`virtio::VirtioSlot`] is the half that registers touch; it holds the device until the driver is ready. Then
//! device and queues move into a [`virtio::Lane`], which an io loop owns, and come back on reset. So the data path needs
//! no lock of its own; only what several lanes share has one: a rate limiter, a pair of queues, the tables of a qcow2
//! image, the metadata service.

pub mod acpi;
pub mod bus;
pub mod catalog;
pub mod counters;
pub mod interrupt_line;
pub mod legacy;
pub mod memory_host;
pub mod mmds;
pub mod pci;
mod random;
pub mod rate_limiter;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod threads;
pub mod timer;
mod unix_socket;
pub mod virtio;

/// Guest memory, as every device sees it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
/// Guest memory that may gain regions while devices run; take `.memory()` per run and do not keep it.
pub type SharedMemory = vm_memory::GuestMemoryAtomic<GuestMemory>;
