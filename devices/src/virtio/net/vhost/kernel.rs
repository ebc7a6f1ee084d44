//! [`Kernel`]: the host kernel's vhost-net, which moves frames between queues and a tap on a thread of its own.

use std::fs::File;
use std::sync::PoisonError;

use vhost::net::VhostNet;
use vhost::vhost_kern::net::Net;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::super::OpenError;
use crate::virtio::Queue;
use crate::{GuestMemory, SharedMemory};

/// What is done when a queue is used or broken.
pub(super) struct Signals<'a> {
    /// Written by whoever notifies the queue.
    pub(super) kick: &'a EventFd,
    /// Written when the driver is to be interrupted.
    pub(super) call: &'a EventFd,
    /// Written when the kernel cannot make sense of the queue.
    pub(super) error: &'a EventFd,
}

/// An instance of vhost-net, which belongs to this process.
pub(super) struct Kernel {
    vhost: Net<SharedMemory>,
    /// What the kernel was told of. The mappings stay as long as it may use them.
    memory: SharedMemory,
}

impl Kernel {
    /// Asks the kernel for an instance.
    pub(super) fn open() -> Result<Self, OpenError> {
        let memory = SharedMemory::new(GuestMemory::new());
        let open = || {
            let vhost = Net::new(memory.clone())?;
            vhost.set_owner()?;
            Ok(vhost)
        };
        let vhost = open().map_err(|source| OpenError::Vhost { source })?;
        Ok(Self { vhost, memory })
    }

    /// The features of queues and frames that it knows.
    pub(super) fn features(&self) -> Result<u64, OpenError> {
        let features = self.vhost.get_features();
        features.map_err(|source| OpenError::Vhost { source })
    }

    /// Takes the driver's features that concern it.
    pub(super) fn set_features(&self, features: u64) -> Result<(), vhost::Error> {
        self.vhost.set_features(features)
    }

    /// Tells it where the guest's memory is.
    pub(super) fn set_memory(&self, mem: &GuestMemory) -> Result<(), vhost::Error> {
        self.vhost.set_mem_table(&regions(mem))?;
        self.keep(mem.clone());
        Ok(())
    }

    /// Lets go of the guest's memory. No queue is served, and before one is, the kernel is told anew.
    pub(super) fn forget_memory(&self) {
        self.keep(GuestMemory::new());
    }

    fn keep(&self, mem: GuestMemory) {
        let known = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        known.replace(mem);
    }

    /// Tells it where a queue is, and how far it was served.
    pub(super) fn set_up(
        &self,
        index: usize,
        queue: &Queue,
        signals: &Signals<'_>,
    ) -> Result<(), vhost::Error> {
        let config = queue.config();
        let vhost = &self.vhost;
        vhost.set_vring_num(index, config.size)?;
        vhost.set_vring_base(index, queue.position())?;
        vhost.set_vring_addr(
            index,
            &VringConfigData {
                queue_max_size: config.max_size,
                queue_size: config.size,
                flags: 0,
                desc_table_addr: config.desc_table,
                used_ring_addr: config.used_ring,
                avail_ring_addr: config.avail_ring,
                log_addr: None,
            },
        )?;
        vhost.set_vring_call(index, signals.call)?;
        vhost.set_vring_err(index, signals.error)?;
        vhost.set_vring_kick(index, signals.kick)
    }

    /// Lets it move the frames of a queue, from or to a tap, or stops it; then nothing is in flight any more.
    pub(super) fn set_tap(&self, index: usize, tap: Option<&File>) -> Result<(), vhost::Error> {
        self.vhost.set_backend(index, tap)
    }

    /// How far a queue was served.
    pub(super) fn position(&self, index: usize) -> Result<u16, vhost::Error> {
        let position = self.vhost.get_vring_base(index)?;
        // The positions of a split queue have 16 bits.
        Ok(u16::try_from(position & 0xffff).expect("masked to 16 bits"))
    }
}

/// The guest's memory as the kernel wants to know it.
pub(super) fn regions(mem: &GuestMemory) -> Vec<VhostUserMemoryRegionInfo> {
    mem.iter()
        .map(|region| {
            let start = region.start_addr();
            let host = mem.get_host_address(GuestAddress(start.0));
            VhostUserMemoryRegionInfo {
                guest_phys_addr: start.0,
                memory_size: region.len(),
                userspace_addr: host.expect("a region is mapped") as u64,
                mmap_offset: 0,
                mmap_handle: -1,
            }
        })
        .collect()
}
