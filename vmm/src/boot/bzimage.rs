//! `bzImage` kernels: compressed, and unpacked by their own first code, which is entered in long mode
//! (Documentation/arch/x86/boot.rst, "64-bit boot protocol").

use vm_memory::GuestAddress;

use super::image::Image;
use super::kernel::{Entry, KernelError, LoadedKernel, check_room, field};
use crate::memory::GuestMemory;

/// Where the setup header begins, in the file and in the zero page.
pub(super) const SETUP_HEADER: usize = 0x1f1;
const SECTOR: u64 = 512;
/// The unit of `syssize`.
const PARAGRAPH: u64 = 16;
/// The 64-bit entry lies here from the start of the protected-mode kernel.
const ENTRY_64: u64 = 0x200;
/// Protocol 2.12 brought the flag that says so.
const MIN_VERSION: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1 << 0;

/// Loads a bzImage whose first two sectors are `head`.
pub(super) fn load(memory: &GuestMemory, image: &Image, head: &[u8]) -> Result<LoadedKernel, KernelError> {
    let path = || image.path().to_owned();
    let short = || KernelError::Damaged {
        path: path(),
        what: "its setup header is cut short",
    };
    let half = |offset| field(head, offset).map(u16::from_le_bytes).ok_or_else(short);
    let word = |offset| {
        field(head, offset)
            .map(u32::from_le_bytes)
            .map(u64::from)
            .ok_or_else(short)
    };
    if half(0x206)? < MIN_VERSION || half(0x236)? & XLF_KERNEL_64 == 0 {
        return Err(KernelError::Unsuitable {
            path: path(),
            what: "it has no 64-bit entry (needs Linux 3.8 or later)",
        });
    }
    let sectors = match head[SETUP_HEADER] {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let start = (sectors + 1) * SECTOR;
    // What its header says, not what is left of the file: a file that was cut short would start, and die unpacking.
    let size = word(0x1f4)? * PARAGRAPH;
    if size <= ENTRY_64 {
        return Err(KernelError::Damaged {
            path: path(),
            what: "its 64-bit entry lies behind the end of its code",
        });
    }
    image.check_range("compressed kernel", start, size)?;
    // Wherever it is loaded, it unpacks itself to its preferred address or above, and works in the memory behind that.
    let address = field(head, 0x258).map(u64::from_le_bytes).ok_or_else(short)?;
    let needed = word(0x260)?.max(size);
    let end = check_room(memory, image, address, address.checked_add(needed))?;
    image.read_to_guest("compressed kernel", start, size, (memory, GuestAddress(address)))?;

    let header_end = 0x202 + usize::from(head[0x201]);
    Ok(LoadedKernel {
        entry: Entry::Linux64(GuestAddress(address + ENTRY_64)),
        end,
        initrd_max: word(0x22c)?,
        setup_header: Some(head.get(SETUP_HEADER..header_end).ok_or_else(short)?.to_vec()),
    })
}
