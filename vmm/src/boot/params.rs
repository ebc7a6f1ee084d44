//! What the kernel is told at entry: the memory map, the command line, the initrd and the ACPI tables, in the form of
//! its boot protocol. Called by the control thread.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use super::bzimage::SETUP_HEADER;
use super::initrd::Initrd;
use crate::memory::GuestMemory;
use crate::x86_64::layout;

/// Type of usable memory, in both protocols.
const RAM: u32 = 1;
/// Type of memory that the guest must leave alone, in both protocols.
const RESERVED: u32 = 2;

/// A range of the memory map.
struct Range {
    start: u64,
    end: u64,
    kind: u32,
}

/// The guest's memory map.
fn memory_map(memory: &GuestMemory) -> Vec<Range> {
    let mut map = vec![
        Range {
            start: 0,
            end: layout::EBDA,
            kind: RAM,
        },
        Range {
            start: layout::EBDA,
            end: layout::LEGACY_VIDEO,
            kind: RESERVED,
        },
        Range {
            start: layout::ACPI_TABLES.start,
            end: layout::ACPI_TABLES.end,
            kind: RESERVED,
        },
        Range {
            start: layout::PCI_ECAM.start,
            end: layout::PCI_ECAM.end,
            kind: RESERVED,
        },
    ];
    map.extend(memory.iter().map(|region| {
        let start = region.start_addr().0.max(layout::HIGH_MEMORY);
        Range {
            start,
            end: region.last_addr().0 + 1,
            kind: RAM,
        }
    }));
    map.sort_by_key(|range| range.start);
    map
}

/// Writes the start info of the PVH boot ABI (`hvm_start_info` version 1), its module list and memory map.
pub(super) fn write_start_info(
    memory: &GuestMemory,
    initrd: Option<Initrd>,
    rsdp: GuestAddress,
) -> Result<(), GuestMemoryError> {
    const MAGIC: u32 = 0x336e_c578;
    const VERSION: u32 = 1;
    const MODULES: u64 = layout::PVH_START_INFO + 0x40;
    const MAP: u64 = layout::PVH_START_INFO + 0x80;
    let map = memory_map(memory);
    let count = u32::try_from(map.len()).expect("a handful");

    let mut info = Vec::new();
    for word in [MAGIC, VERSION, 0, u32::from(initrd.is_some())] {
        info.extend(word.to_le_bytes());
    }
    for long in [MODULES, layout::COMMAND_LINE, rsdp.0, MAP] {
        info.extend(long.to_le_bytes());
    }
    info.extend(count.to_le_bytes());
    info.extend(0u32.to_le_bytes());
    memory.write_slice(&info, GuestAddress(layout::PVH_START_INFO))?;

    let module = initrd.map_or([0; 4], |initrd| [initrd.address, initrd.size, 0, 0]);
    memory.write_slice(&module.map(u64::to_le_bytes).concat(), GuestAddress(MODULES))?;
    let mut entries = Vec::new();
    for Range { start, end, kind } in map {
        entries.extend(start.to_le_bytes());
        entries.extend((end - start).to_le_bytes());
        entries.extend(u64::from(kind).to_le_bytes());
    }
    memory.write_slice(&entries, GuestAddress(MAP))
}

/// Writes the zero page of the Linux boot protocol (`boot_params`), with the setup header of a bzImage if there is one.
pub(super) fn write_zero_page(
    memory: &GuestMemory,
    setup_header: Option<&[u8]>,
    initrd: Option<Initrd>,
    rsdp: GuestAddress,
) -> Result<(), GuestMemoryError> {
    const ACPI_RSDP: usize = 0x70;
    const E820_COUNT: usize = 0x1e8;
    const BOOT_FLAG: usize = 0x1fe;
    const MAGIC: usize = 0x202;
    const LOADER: usize = 0x210;
    const RAMDISK: usize = 0x218;
    const COMMAND_LINE: usize = 0x228;
    const ALIGNMENT: usize = 0x230;
    const E820_TABLE: usize = 0x2d0;
    const UNKNOWN_LOADER: u8 = 0xff;

    let mut page = vec![0; 4096];
    let mut put = |offset: usize, bytes: &[u8]| page[offset..offset + bytes.len()].copy_from_slice(bytes);
    match setup_header {
        // The page has room for the largest header: its length is one byte.
        Some(header) => put(SETUP_HEADER, header),
        None => {
            put(BOOT_FLAG, &0xaa55u16.to_le_bytes());
            put(MAGIC, b"HdrS");
            put(ALIGNMENT, &0x0100_0000u32.to_le_bytes());
        }
    }
    put(LOADER, &[UNKNOWN_LOADER]);
    put(COMMAND_LINE, &low(layout::COMMAND_LINE));
    put(ACPI_RSDP, &rsdp.0.to_le_bytes());
    if let Some(Initrd { address, size }) = initrd {
        put(RAMDISK, &low(address));
        put(RAMDISK + 4, &low(size));
    }
    let map = memory_map(memory);
    put(E820_COUNT, &[u8::try_from(map.len()).expect("a handful")]);
    for (index, Range { start, end, kind }) in map.into_iter().enumerate() {
        let offset = E820_TABLE + index * 20;
        put(offset, &start.to_le_bytes());
        put(offset + 8, &(end - start).to_le_bytes());
        put(offset + 16, &kind.to_le_bytes());
    }
    memory.write_slice(&page, GuestAddress(layout::ZERO_PAGE))
}

/// The low half: what is placed for a boot lies below 4 GiB.
fn low(value: u64) -> [u8; 4] {
    u32::try_from(value)
        .expect("boot structures and initrds lie below 4 GiB")
        .to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    const RSDP: GuestAddress = GuestAddress(0xe_0000);
    const INITRD: Initrd = Initrd {
        address: 0xf0_0000,
        size: 5000,
    };

    fn start_info(mib: u64, initrd: Option<Initrd>) -> GuestMemory {
        let memory = memory::create(mib).unwrap();
        write_start_info(&memory, initrd, RSDP).unwrap();
        memory
    }

    fn zero_page(header: Option<&[u8]>) -> GuestMemory {
        let memory = memory::create(16).unwrap();
        write_zero_page(&memory, header, Some(INITRD), RSDP).unwrap();
        memory
    }

    fn word(memory: &GuestMemory, address: u64) -> u32 {
        memory.read_obj(GuestAddress(address)).unwrap()
    }

    fn long(memory: &GuestMemory, address: u64) -> u64 {
        memory.read_obj(GuestAddress(address)).unwrap()
    }

    #[test]
    fn start_info_refers_to_everything() {
        let memory = start_info(16, Some(INITRD));
        let at = layout::PVH_START_INFO;
        let module = long(&memory, at + 16);
        assert_eq!([word(&memory, at), word(&memory, at + 12)], [0x336e_c578, 1]);
        let addresses = [long(&memory, at + 24), long(&memory, at + 32)];
        assert_eq!(addresses, [layout::COMMAND_LINE, RSDP.0]);
        assert_eq!(
            [long(&memory, module), long(&memory, module + 8)],
            [0xf0_0000, 5000]
        );
    }

    #[test]
    fn start_info_without_an_initrd_counts_no_module() {
        assert_eq!(word(&start_info(16, None), layout::PVH_START_INFO + 12), 0);
    }

    #[test]
    fn memory_map_goes_around_the_hole_in_order() {
        let map = memory_map(&memory::create(5 * 1024).unwrap());
        let ram: Vec<_> = map.iter().filter(|range| range.kind == RAM).collect();
        let bounds: Vec<_> = ram.iter().map(|range| (range.start, range.end)).collect();
        let expected = [
            (0, layout::EBDA),
            (0x10_0000, 0xc000_0000),
            (0x1_0000_0000, 0x1_8000_0000),
        ];
        assert_eq!(bounds, expected);
        assert!(map.is_sorted_by(|one, next| one.end <= next.start));
    }

    #[test]
    fn zero_page_of_an_elf_kernel_has_a_header_made_for_it() {
        let (memory, at) = (zero_page(None), layout::ZERO_PAGE);
        let magic: [u8; 4] = memory.read_obj(GuestAddress(at + 0x202)).unwrap();
        assert_eq!(magic, *b"HdrS");
        assert_eq!(
            [word(&memory, at + 0x218), word(&memory, at + 0x21c)],
            [0xf0_0000, 5000]
        );
        assert_eq!(
            [long(&memory, at + 0x70), word(&memory, at + 0x228).into()],
            [RSDP.0, 0x2_0000]
        );
    }

    #[test]
    fn zero_page_has_the_memory_map_even_behind_the_longest_header() {
        let (memory, at) = (zero_page(Some(&[0xee; 0x301 - 0x1f1])), layout::ZERO_PAGE);
        let count: u8 = memory.read_obj(GuestAddress(at + 0x1e8)).unwrap();
        let high_ram = at + 0x2d0 + 3 * 20;
        assert_eq!(count, 5);
        assert_eq!(
            [long(&memory, at + 0x2d0), long(&memory, at + 0x2d8)],
            [0, layout::EBDA]
        );
        assert_eq!(
            [long(&memory, high_ram), long(&memory, high_ram + 8)],
            [0x10_0000, 15 << 20]
        );
    }
}
