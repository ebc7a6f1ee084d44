use std::io::Write;

use vm_memory::Bytes;
use vmm_sys_util::tempfile::TempFile;

use super::*;

const PAGE: u64 = layout::PAGE_SIZE;
const PAGE_BYTES: usize = 4096;

fn file_of(bytes: &[u8]) -> File {
    let mut file = TempFile::new().unwrap().into_file();
    file.write_all(bytes).unwrap();
    file
}

#[test]
fn small_ram_is_one_zeroed_region() {
    let memory = create(16).unwrap();

    assert_eq!(memory.num_regions(), 1);
    assert_eq!(memory.last_addr(), GuestAddress(16 * MIB - 1));
    assert_eq!(memory.read_obj::<u64>(GuestAddress(16 * MIB - 8)).unwrap(), 0);
}

#[test]
fn large_ram_leaves_the_hole_free() {
    let memory = create(5 * 1024).unwrap();

    assert_eq!(memory.last_addr(), GuestAddress(6 * 1024 * MIB - 1));
    assert!(!memory.address_in_range(GuestAddress(layout::HOLE.start)));
    assert!(memory.address_in_range(GuestAddress(layout::HOLE.end)));
}

#[test]
fn regions_start_where_huge_pages_start() {
    let memory = create(4 * 1024 + 1).unwrap();

    assert!(
        memory
            .iter()
            .all(|region| region.as_ptr().addr() % HUGE_PAGE == 0)
    );
}

/// The kernel's flags of the mapping that holds the first byte of RAM.
fn mapping_flags(memory: &GuestMemory) -> Vec<String> {
    let place = memory.get_host_address(GuestAddress(0)).unwrap().addr();
    let holds = |line: &str| {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        let address = |text| usize::from_str_radix(text, 16).ok();
        range.is_some_and(|(start, end)| {
            address(start).is_some_and(|start| start <= place) && address(end).is_some_and(|end| place < end)
        })
    };
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = smaps.lines().skip_while(|line| !holds(line));
    let flags = lines.find_map(|line| line.strip_prefix("VmFlags: ")).unwrap();
    flags.split(' ').map(str::to_owned).collect()
}

#[test]
fn transparent_huge_pages_are_asked_for() {
    let flags = |pages| mapping_flags(&create_of(pages, Sharing::Private, 16).unwrap());

    assert!(flags(HugePages::Transparent).contains(&"hg".to_owned()));
    assert!(!flags(HugePages::None).contains(&"hg".to_owned()));
}

#[test]
fn without_reserved_huge_pages_the_remedy_is_named() {
    let message = create_of(HugePages::Hugetlbfs2M, Sharing::Private, 1 << 20)
        .unwrap_err()
        .to_string();

    assert!(
        message.contains("524288 free huge pages") && message.contains("nr_hugepages"),
        "{message}"
    );
}

#[test]
fn a_tebibyte_can_be_had_without_touching_it() {
    let memory = create(1 << 20).unwrap();

    memory.write_obj(1u8, GuestAddress(1 << 39)).unwrap();
}

#[test]
fn dropped_ram_is_unmapped() {
    let start = {
        let memory = create(64).unwrap();
        memory.get_host_address(GuestAddress(0)).unwrap().addr()
    };

    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let of_that_size = format!("{start:08x}-{:08x} ", start + 64 * (1 << 20));
    assert!(!maps.contains(&of_that_size));
}

#[test]
fn refuses_no_ram() {
    assert!(matches!(create(0), Err(MemoryError::Zero)));
}

#[test]
fn refuses_more_ram_than_the_cpu_addresses_and_names_the_limit() {
    let message = create(u64::MAX).unwrap_err().to_string();

    assert!(
        message.starts_with("18446744073709551615 MiB of RAM are more than"),
        "{message}"
    );
}

#[test]
fn a_mapped_file_is_seen_by_the_guest_and_not_changed_by_it() {
    let memory = create(16).unwrap();
    let file = file_of(&[7; 3 * PAGE_BYTES]);

    map_private_file(&memory, GuestAddress(PAGE), &file, PAGE, 2 * PAGE).unwrap();
    memory.write_obj(9u8, GuestAddress(PAGE)).unwrap();

    let mut bytes = [0; 3];
    memory.read_slice(&mut bytes, GuestAddress(3 * PAGE - 2)).unwrap();
    assert_eq!(bytes, [7, 7, 0]);
    let mut on_disk = [0];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut on_disk, PAGE).unwrap();
    assert_eq!(on_disk, [7]);
}

#[test]
fn refuses_a_file_mapping_past_the_end_of_the_file() {
    let memory = create(16).unwrap();
    let file = file_of(&[7; PAGE_BYTES + 1]);

    let result = map_private_file(&memory, GuestAddress(0), &file, 0, 2 * PAGE);

    assert!(matches!(
        result,
        Err(MemoryError::PastEndOfFile {
            file_size: 4097,
            end: 8192
        })
    ));
}

#[test]
fn refuses_a_file_mapping_that_is_not_made_of_pages() {
    let memory = create(16).unwrap();
    let file = file_of(&[7; 2 * PAGE_BYTES]);

    assert!(map_private_file(&memory, GuestAddress(1), &file, 0, PAGE).is_err());
    assert!(map_private_file(&memory, GuestAddress(0), &file, 1, PAGE).is_err());
    assert!(map_private_file(&memory, GuestAddress(0), &file, 0, PAGE - 1).is_err());
    assert!(map_private_file(&memory, GuestAddress(0), &file, 0, 0).is_err());
}

#[test]
fn refuses_a_file_mapping_that_leaves_ram() {
    let memory = create(16).unwrap();
    let file = file_of(&[7; 2 * PAGE_BYTES]);
    let last_page = GuestAddress(16 * MIB - PAGE);

    let result = map_private_file(&memory, last_page, &file, 0, 2 * PAGE);

    assert!(matches!(result, Err(MemoryError::Range { .. })));
}

/// A region of four pages at 4 GiB.
fn region() -> GuestRegion {
    anonymous(GuestAddress(4 << 30), 4 * PAGE).unwrap()
}

fn read(region: &GuestRegion, offset: u64) -> u8 {
    region.read_obj(MemoryRegionAddress(offset)).unwrap()
}

#[test]
fn writes_to_a_shared_file_reach_it_and_those_behind_it_do_not() {
    let (region, file) = (region(), file_of(&[7; PAGE_BYTES + 1]));
    map_file_over(&region, &file, PAGE + 1, true).unwrap();
    assert_eq!([read(&region, PAGE), read(&region, PAGE + 1)], [7, 0]);

    for offset in [PAGE, 3 * PAGE] {
        region.write_obj(9u8, MemoryRegionAddress(offset)).unwrap();
    }

    let mut last = [0];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut last, PAGE).unwrap();
    assert_eq!(last, [9]);
    assert_eq!(file.metadata().unwrap().len(), PAGE + 1);
    assert_eq!(read(&region, 3 * PAGE), 9);
}

#[test]
fn writes_to_a_private_file_stay_here() {
    let (region, file) = (region(), file_of(&[7; PAGE_BYTES]));
    map_file_over(&region, &file, PAGE, false).unwrap();
    region.write_obj(9u8, MemoryRegionAddress(0)).unwrap();
    let mut first = [0];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut first, 0).unwrap();
    assert_eq!((first, read(&region, 0)), ([7], 9));
}

#[test]
fn a_file_longer_than_its_region_is_refused() {
    assert!(map_file_over(&region(), &file_of(&[7]), 5 * PAGE, true).is_err());
}

#[test]
fn discarded_pages_are_zero_and_others_stay() {
    let region = region();
    for offset in [0, PAGE, 2 * PAGE] {
        region.write_obj(9u8, MemoryRegionAddress(offset)).unwrap();
    }
    discard(&region, PAGE..2 * PAGE).unwrap();
    assert_eq!([0, PAGE, 2 * PAGE].map(|offset| read(&region, offset)), [9, 0, 9]);
    assert!(discard(&region, PAGE..5 * PAGE).is_err());
}

#[test]
fn shared_memory_is_the_content_of_a_file() {
    for pages in [HugePages::None, HugePages::Transparent] {
        let memory = create_of(pages, Sharing::Shared, 4).unwrap();
        memory.write_obj(0x1234_5678u32, GuestAddress(0x10_0000)).unwrap();
        let region = memory.find_region(GuestAddress(0)).unwrap();
        let file = region.file_offset().unwrap();
        let mut bytes = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(file.file(), &mut bytes, 0x10_0000).unwrap();
        assert_eq!(
            (u32::from_le_bytes(bytes), file.file().metadata().unwrap().len()),
            (0x1234_5678, 4 << 20)
        );
    }
    let private = create(4).unwrap();
    assert!(
        private
            .find_region(GuestAddress(0))
            .unwrap()
            .file_offset()
            .is_none()
    );
}
