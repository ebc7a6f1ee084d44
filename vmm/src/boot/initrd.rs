//! Placing the initial RAM disk: as high as the kernel takes it, below the hole. Called by the control thread.

use std::path::PathBuf;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::image::{Image, ImageError};
use super::kernel::LoadedKernel;
use crate::memory::GuestMemory;
use crate::x86_64::layout::PAGE_SIZE;

/// An initrd in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Initrd {
    /// Where it begins.
    pub address: u64,
    /// Its bytes.
    pub size: u64,
}

/// An initrd cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum InitrdError {
    /// The file.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// It does not fit beside the kernel.
    #[error(
        "the initrd {path} has {size} bytes, and {free} are free behind the kernel: raise mem_size_mib or shrink it"
    )]
    NoRoom {
        /// The file.
        path: PathBuf,
        /// Its bytes.
        size: u64,
        /// Bytes between the kernel and the end of low memory.
        free: u64,
    },
}

/// Reads the initrd straight into guest memory.
pub fn load(memory: &GuestMemory, image: &Image, kernel: &LoadedKernel) -> Result<Initrd, InitrdError> {
    let low = memory.iter().next().map_or(0, |region| region.last_addr().0 + 1);
    let top = low.min(kernel.initrd_max.saturating_add(1));
    let (size, bottom) = (image.size(), kernel.end.next_multiple_of(PAGE_SIZE));
    let address = top
        .checked_sub(size)
        .map(|address| address / PAGE_SIZE * PAGE_SIZE);
    let Some(address) = address.filter(|address| *address >= bottom) else {
        let free = top.saturating_sub(bottom);
        return Err(InitrdError::NoRoom {
            path: image.path().to_owned(),
            size,
            free,
        });
    };
    image.read_to_guest("contents", 0, size, (memory, GuestAddress(address)))?;
    Ok(Initrd { address, size })
}
