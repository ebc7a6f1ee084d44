//! Loading a kernel: an ELF `vmlinux` or a `bzImage`, told apart by their first bytes. Called by the control thread.
//!
//! An image is input: whatever it says is checked against the file and the guest's RAM before anything is placed.

use std::path::PathBuf;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::image::{Image, ImageError};
use super::{bzimage, elf};
use crate::memory::{GuestMemory, MemoryError};
use crate::x86_64::layout;

/// How the first vCPU enters the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// In 32-bit protected mode with a start info (the PVH boot ABI).
    Pvh(GuestAddress),
    /// In long mode with a zero page (the Linux 64-bit boot protocol).
    Linux64(GuestAddress),
}

/// How an uncompressed kernel comes into guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// Its file is mapped over guest RAM as far as possible, so that VMs share its pages. Only its code, which Linux
    /// patches, is copied before the start.
    Mapped,
    /// It is read into guest RAM, whose pages stay whole: a huge page cannot be replaced in parts.
    Copied,
}

/// A kernel in guest memory.
#[derive(Debug, PartialEq, Eq)]
pub struct LoadedKernel {
    /// Where it starts.
    pub entry: Entry,
    /// The first address behind everything that it needs for itself.
    pub end: u64,
    /// The highest address at which it takes an initrd.
    pub initrd_max: u64,
    /// The setup header of a `bzImage`, as it stands in the file from offset 0x1f1 on.
    pub setup_header: Option<Vec<u8>>,
}

/// A kernel image cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// It is no kernel.
    #[error(
        "{path} is neither an ELF vmlinux nor a bzImage: give one of those, as building Linux for x86_64 makes them"
    )]
    NotAKernel {
        /// The file.
        path: PathBuf,
    },
    /// It is a kernel that this machine cannot run.
    #[error("{path} cannot be booted: {what}")]
    Unsuitable {
        /// The file.
        path: PathBuf,
        /// What is in the way.
        what: &'static str,
    },
    /// Its headers contradict themselves.
    #[error("{path} is damaged: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The contradiction.
        what: &'static str,
    },
    /// It does not fit.
    #[error("{path} needs guest memory from {start:#x} to {end:#x}, which is not there: raise mem_size_mib")]
    NoRoom {
        /// The file.
        path: PathBuf,
        /// First address.
        start: u64,
        /// First address behind.
        end: u64,
    },
    /// A part cannot be mapped.
    #[error("cannot map a segment of {path}")]
    Map {
        /// The file.
        path: PathBuf,
        /// Why.
        source: MemoryError,
    },
}

/// Loads the kernel in `image`.
pub fn load(memory: &GuestMemory, image: &Image, placement: Placement) -> Result<LoadedKernel, KernelError> {
    // Both formats show themselves within the first two sectors.
    let head = image.read(
        "headers",
        0,
        usize::try_from(image.size().min(1024)).expect("at most 1024"),
    )?;
    if head.starts_with(b"\x7fELF") {
        return elf::load(memory, image, &head, placement);
    }
    if head.get(0x202..0x206) == Some(b"HdrS") {
        return bzimage::load(memory, image, &head);
    }
    Err(KernelError::NotAKernel {
        path: image.path().to_owned(),
    })
}

/// Checks that `start..end` is RAM that a kernel may take: above the first MiB and within one region.
pub(super) fn check_room(
    memory: &GuestMemory,
    image: &Image,
    start: u64,
    end: Option<u64>,
) -> Result<u64, KernelError> {
    let path = || image.path().to_owned();
    let end = end.ok_or_else(|| KernelError::Damaged {
        path: path(),
        what: "an address overflows",
    })?;
    if start < layout::HIGH_MEMORY {
        let what = "it wants to be loaded below 1 MiB";
        return Err(KernelError::Unsuitable { path: path(), what });
    }
    let region = memory.find_region(GuestAddress(start));
    if region.is_none_or(|region| end - 1 > region.last_addr().0) {
        return Err(KernelError::NoRoom {
            path: path(),
            start,
            end,
        });
    }
    Ok(end)
}

/// A little-endian number of `N` bytes in a header; none behind its end.
pub(super) fn field<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests;
