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

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;
    use vmm_sys_util::tempdir::TempDir;

    use super::super::image::ImageKind;
    use super::super::kernel::Entry;
    use super::*;
    use crate::memory;

    const MIB: u64 = 1 << 20;
    const MIB_BYTES: usize = 1 << 20;

    fn load_bytes(
        size: usize,
        mib: u64,
        (end, initrd_max): (u64, u64),
    ) -> (GuestMemory, Result<Initrd, InitrdError>) {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("initrd");
        std::fs::write(&path, vec![5; size]).unwrap();
        let image = Image::open(ImageKind::Initrd, &path).unwrap();
        let memory = memory::create(mib).unwrap();
        let kernel = LoadedKernel {
            entry: Entry::Pvh(GuestAddress(MIB)),
            end,
            initrd_max,
            setup_header: None,
        };
        let loaded = load(&memory, &image, &kernel);
        (memory, loaded)
    }

    #[test]
    fn lies_page_aligned_at_the_top_of_low_ram() {
        let (memory, loaded) = load_bytes(5000, 16, (8 * MIB, u64::MAX));
        let address = loaded.unwrap().address;
        assert_eq!(address, 16 * MIB - 0x2000);
        let around_the_end: [u8; 2] = memory.read_obj(GuestAddress(address + 4999)).unwrap();
        assert_eq!(around_the_end, [5, 0]);
    }

    #[test]
    fn stays_below_the_hole_and_below_the_limit_of_the_kernel() {
        let (_, below_hole) = load_bytes(4096, 4096, (8 * MIB, u64::MAX));
        let (_, below_limit) = load_bytes(4096, 16, (2 * MIB, 4 * MIB - 1));
        assert_eq!(below_hole.unwrap().address, 0xc000_0000 - 4096);
        assert_eq!(below_limit.unwrap().address, 4 * MIB - 4096);
    }

    #[test]
    fn may_fill_all_room_behind_the_kernel_and_not_a_byte_more() {
        let (_, exactly) = load_bytes(MIB_BYTES, 16, (15 * MIB, u64::MAX));
        let (_, more) = load_bytes(MIB_BYTES + 1, 16, (15 * MIB, u64::MAX));
        assert_eq!(exactly.unwrap().address, 15 * MIB);
        assert!(matches!(
            more,
            Err(InitrdError::NoRoom {
                size: 1_048_577,
                free: 1_048_576,
                ..
            })
        ));
    }

    #[test]
    fn larger_than_ram_is_an_error() {
        assert!(load_bytes(2 * MIB_BYTES, 1, (0, u64::MAX)).1.is_err());
    }
}
