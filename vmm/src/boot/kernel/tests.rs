use std::fs;
use std::path::Path;

use proptest::prelude::*;
use vm_memory::Bytes;

use super::*;
use crate::boot::image::ImageKind;
use crate::memory;

const MIB: u64 = 1 << 20;
const NOTE: u64 = 0x300;

/// One segment of a test kernel.
#[derive(Clone, Copy)]
struct Load {
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
}

/// A file that vanishes with the test.
struct TempFile(std::path::PathBuf);

impl TempFile {
    fn new(bytes: &[u8]) -> Self {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("mayfly-kernel-{}-{number}", std::process::id()));
        fs::write(&path, bytes).unwrap();
        Self(path)
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// An ELF kernel: headers, a note with a PVH entry when `pvh` is given, and one byte pattern per page.
fn elf(loads: &[Load], pvh: Option<u32>) -> Vec<u8> {
    let end = loads
        .iter()
        .map(|load| load.offset + load.file_size)
        .max()
        .unwrap_or(0)
        .max(0x1000);
    let mut file: Vec<u8> = (0..end)
        .map(|at| u8::try_from(at / 4096 % 251 + 1).unwrap())
        .collect();
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    let headers = loads.len() + usize::from(pvh.is_some());
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &2u16.to_le_bytes());
    put(18, &62u16.to_le_bytes());
    let entry = loads.first().map_or(0, |load| load.address);
    put(24, &entry.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &u16::try_from(headers).unwrap().to_le_bytes());
    let mut header = |index: usize, kind: u32, load: &Load| {
        let at = 64 + index * 56;
        put(at, &kind.to_le_bytes());
        for (field, value) in [
            (8, load.offset),
            (24, load.address),
            (32, load.file_size),
            (40, load.memory_size),
        ] {
            put(at + field, &value.to_le_bytes());
        }
    };
    for (index, load) in loads.iter().enumerate() {
        header(index, 1, load);
    }
    if let Some(entry) = pvh {
        header(
            loads.len(),
            4,
            &Load {
                offset: NOTE,
                address: 0,
                file_size: 40,
                memory_size: 40,
            },
        );
        let foreign = [4u32, 3, 18].map(u32::to_le_bytes).concat();
        put(0x300, &[&foreign[..], b"GNU\0abc\0"].concat());
        let note = [4u32, 4, 18].map(u32::to_le_bytes).concat();
        put(0x314, &[&note[..], b"Xen\0", &entry.to_le_bytes()].concat());
    }
    file
}

/// A compressed kernel in a file of this size, which is a multiple of 16.
fn bzimage(size: usize) -> Vec<u8> {
    let mut file = vec![0xabu8; size];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    let paragraphs = u32::try_from((size - 1024) / 16).unwrap();
    put(0x1f4, &paragraphs.to_le_bytes());
    put(0x201, &[0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x236, &1u16.to_le_bytes());
    put(0x258, &(16 * MIB).to_le_bytes());
    put(0x260, &0x10_0000u32.to_le_bytes());
    file
}

fn load_bytes(bytes: &[u8], mib: u64) -> (GuestMemory, Result<LoadedKernel, KernelError>) {
    let file = TempFile::new(bytes);
    let memory = memory::create(mib).unwrap();
    let image = Image::open(ImageKind::Kernel, &file.0).unwrap();
    let loaded = load(&memory, &image, Placement::Mapped);
    (memory, loaded)
}

fn byte(memory: &GuestMemory, address: u64) -> u8 {
    memory.read_obj(GuestAddress(address)).unwrap()
}

const ALIGNED: Load = aligned(0);

/// A segment of so many bytes, a ragged end and zeroes.
const fn aligned(size: u64) -> Load {
    Load {
        offset: 0x1000,
        address: 16 * MIB,
        file_size: size + 0x2800,
        memory_size: size + 0x5000,
    }
}

#[test]
fn an_elf_kernel_with_a_pvh_note_is_entered_there() {
    let (_, loaded) = load_bytes(&elf(&[ALIGNED], Some(0x100_0040)), 32);
    let loaded = loaded.unwrap();
    assert_eq!(loaded.entry, Entry::Pvh(GuestAddress(0x100_0040)));
    assert_eq!(loaded.end, 16 * MIB + 0x5000);
}

#[test]
fn an_elf_kernel_without_the_note_is_entered_at_its_entry() {
    let (_, loaded) = load_bytes(&elf(&[ALIGNED], None), 32);
    assert_eq!(loaded.unwrap().entry, Entry::Linux64(GuestAddress(16 * MIB)));
}

#[test]
fn whole_pages_ragged_ends_and_zeroes_are_where_they_belong() {
    let ragged = Load {
        offset: 0x1800,
        address: 16 * MIB + 0x800,
        file_size: 0x2000,
        memory_size: 0x3000,
    };
    let (memory, loaded) = load_bytes(&elf(&[ragged], None), 32);
    loaded.unwrap();
    let at = |offset| byte(&memory, 16 * MIB + offset);
    assert_eq!([at(0x7ff), at(0x800), at(0xfff)], [0, 2, 2]);
    assert_eq!([at(0x1000), at(0x1fff)], [3, 3]);
    assert_eq!([at(0x2000), at(0x27ff), at(0x2800), at(0x37ff)], [4, 4, 0, 0]);
}

#[test]
fn a_segment_with_another_alignment_in_the_file_is_copied() {
    let odd = Load {
        offset: 0x1010,
        address: 16 * MIB,
        file_size: 0x1ff0,
        memory_size: 0x1ff0,
    };
    let (memory, loaded) = load_bytes(&elf(&[odd], None), 32);
    loaded.unwrap();
    assert_eq!([byte(&memory, 16 * MIB), byte(&memory, 16 * MIB + 0xff0)], [2, 3]);
}

/// How many mappings of this process are of this file.
fn mappings(path: &Path) -> usize {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.matches(path.to_str().unwrap()).count()
}

#[test]
fn a_copied_kernel_is_the_same_and_its_file_is_not_mapped() {
    let file = TempFile::new(&elf(&[ALIGNED], None));
    let image = Image::open(ImageKind::Kernel, &file.0).unwrap();
    let loaded = |placement| {
        let memory = memory::create(32).unwrap();
        let loaded = load(&memory, &image, placement).unwrap();
        let mut bytes = vec![0; 0x6000];
        memory.read_slice(&mut bytes, GuestAddress(16 * MIB)).unwrap();
        (loaded, bytes, mappings(&file.0))
    };
    let (mapped, copied) = (loaded(Placement::Mapped), loaded(Placement::Copied));
    assert_eq!((mapped.0, mapped.1), (copied.0, copied.1));
    assert_eq!((mapped.2, copied.2), (1, 0));
}

/// Adds a table with one section of code to an ELF kernel.
fn add_code_section(file: &mut Vec<u8>, offset: u64, size: u64) {
    add_code_sections(file, &[(offset, size)]);
}

/// Adds a table of sections of code, each with offset and size, to an ELF kernel.
fn add_code_sections(file: &mut Vec<u8>, sections: &[(u64, u64)]) {
    let table = file.len() as u64;
    file[40..48].copy_from_slice(&table.to_le_bytes());
    file[58..60].copy_from_slice(&64u16.to_le_bytes());
    file[60..62].copy_from_slice(&u16::try_from(sections.len()).unwrap().to_le_bytes());
    for (offset, size) in sections {
        let words = [1, 6, 0, *offset, *size, 0, 0, 0];
        let mut header = words.map(u64::to_le_bytes).concat();
        // The first two numbers, name and kind, have 4 bytes each.
        header[..8].copy_from_slice(&[0, 0, 0, 0, 1, 0, 0, 0]);
        file.extend(header);
    }
}

/// KiB of a mapping of this file that are this process's own.
fn own_kib(path: &Path) -> u64 {
    let maps = fs::read_to_string("/proc/self/smaps").unwrap();
    let (_, mapping) = maps.split_once(path.to_str().unwrap()).unwrap();
    let line = mapping.lines().find(|line| line.starts_with("Anonymous:"));
    line.unwrap().split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn the_code_of_a_mapped_kernel_is_the_guests_own_and_its_padding_is_shared() {
    const PART: u64 = 64 << 10;
    let load = Load {
        offset: 0x1000,
        address: 16 * MIB,
        file_size: 6 * PART,
        memory_size: 6 * PART,
    };
    let mut bytes = elf(&[load], None);
    // Code, padding, a page of code that begins a part, and data.
    for part in [0, 2] {
        let at = usize::try_from(load.offset + part * PART).unwrap();
        bytes[at..at + 4].copy_from_slice(b"code");
    }
    add_code_section(&mut bytes, load.offset, 2 * PART + 100);
    let file = TempFile::new(&bytes);
    let image = Image::open(ImageKind::Kernel, &file.0).unwrap();
    let memory = memory::create(32).unwrap();
    super::load(&memory, &image, Placement::Mapped).unwrap();
    assert_eq!(own_kib(&file.0), 64 + 4);
    let mut loaded = vec![0; usize::try_from(load.file_size).unwrap()];
    memory
        .read_slice(&mut loaded, GuestAddress(load.address))
        .unwrap();
    assert!(loaded == bytes[0x1000..][..loaded.len()]);
}

/// The ranges of a mapped file in the memory of this process, as pairs of length and offset, in order.
fn mapped_parts(path: &Path) -> Vec<(u64, u64)> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let number = |text: &str| u64::from_str_radix(text, 16).unwrap();
    let part = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        let (start, end) = words[0].split_once('-').unwrap();
        (number(end) - number(start), number(words[2]))
    };
    let path = path.to_str().unwrap();
    maps.lines()
        .filter(|line| line.ends_with(path))
        .map(part)
        .collect()
}

#[test]
fn huge_pages_stay_whole_where_they_are_full_of_code_and_where_the_file_ends() {
    const HUGE: u64 = memory::HUGE_PAGE as u64;
    let load = aligned(5 * HUGE);
    let mut bytes = elf(&[load], None);
    // All but the last 64 KiB of the fourth huge page.
    let code = 4 * HUGE - (64 << 10);
    for at in (load.offset..load.offset + code).step_by(64 << 10) {
        let at = usize::try_from(at).unwrap();
        bytes[at..at + 4].copy_from_slice(b"code");
    }
    add_code_section(&mut bytes, load.offset, code);
    let file = TempFile::new(&bytes);
    let image = Image::open(ImageKind::Kernel, &file.0).unwrap();
    let memory = memory::create(32).unwrap();
    super::load(&memory, &image, Placement::Mapped).unwrap();
    let rest = (2 * HUGE, load.offset + 3 * HUGE);
    assert_eq!(mapped_parts(&file.0), [(HUGE, load.offset), rest]);
    let mut loaded = vec![0; usize::try_from(load.memory_size).unwrap()];
    memory
        .read_slice(&mut loaded, GuestAddress(load.address))
        .unwrap();
    let (content, zeroes) = loaded.split_at(usize::try_from(load.file_size).unwrap());
    assert!(content == &bytes[0x1000..][..content.len()]);
    assert!(zeroes.iter().all(|byte| *byte == 0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn content_does_not_depend_on_the_sections(sections in prop::collection::vec((0..1_700u64, 0..1_700u64), 1..6)) {
        let load = aligned(6 * MIB);
        let mut bytes = elf(&[load], None);
        for part in bytes[0x1000..].chunks_mut(64 << 10) {
            part[..4].copy_from_slice(b"code");
        }
        let whole = bytes[0x1000..].to_vec();
        let sections: Vec<_> = sections.into_iter().map(|(page, pages)| (page * 4096, pages * 4096)).collect();
        add_code_sections(&mut bytes, &sections);
        let (memory, loaded) = load_bytes(&bytes, 32);
        loaded.unwrap();
        let mut content = vec![0; whole.len()];
        memory.read_slice(&mut content, GuestAddress(load.address)).unwrap();
        prop_assert!(content == whole);
    }
}

#[test]
fn a_kernel_boots_with_any_table_of_sections() {
    for (offset, size) in [(0, u64::MAX), (u64::MAX, 2), (0x2000, 0), (1 << 40, 1 << 40)] {
        let mut bytes = elf(&[ALIGNED], None);
        add_code_section(&mut bytes, offset, size);
        assert_eq!(load_bytes(&bytes, 32).1.unwrap().end, 16 * MIB + 0x5000);
        let table = bytes.len() as u64;
        bytes[40..48].copy_from_slice(&table.to_le_bytes());
        load_bytes(&bytes, 32).1.unwrap();
    }
}

#[test]
fn writes_of_the_guest_do_not_reach_the_file() {
    let file = TempFile::new(&elf(&[ALIGNED], None));
    let memory = memory::create(32).unwrap();
    let image = Image::open(ImageKind::Kernel, &file.0).unwrap();
    load(&memory, &image, Placement::Mapped).unwrap();
    memory
        .write_slice(&[0xee; 0x2000], GuestAddress(16 * MIB))
        .unwrap();
    assert_eq!(fs::read(&file.0).unwrap(), elf(&[ALIGNED], None));
}

#[test]
fn refuses_segments_outside_memory_below_a_mib_and_overlapping() {
    let outside = Load {
        address: 64 * MIB,
        ..ALIGNED
    };
    assert!(matches!(
        load_bytes(&elf(&[outside], None), 32).1,
        Err(KernelError::NoRoom { .. })
    ));
    let wrapping = Load {
        address: u64::MAX - 0x1000,
        ..ALIGNED
    };
    assert!(matches!(
        load_bytes(&elf(&[wrapping], None), 32).1,
        Err(KernelError::Damaged { .. })
    ));
    let low = Load {
        address: 0x1000,
        ..ALIGNED
    };
    assert!(matches!(
        load_bytes(&elf(&[low], None), 32).1,
        Err(KernelError::Unsuitable { .. })
    ));
    let over = Load {
        address: 16 * MIB + 0x1000,
        ..ALIGNED
    };
    assert!(matches!(
        load_bytes(&elf(&[ALIGNED, over], None), 32).1,
        Err(KernelError::Damaged { .. })
    ));
}

#[test]
fn refuses_an_entry_point_outside_the_segments() {
    for outside in [16 * MIB - 1, 16 * MIB + 0x5000, 0] {
        let pvh = elf(&[ALIGNED], Some(u32::try_from(outside).unwrap()));
        let mut linux = elf(&[ALIGNED], None);
        linux[24..32].copy_from_slice(&outside.to_le_bytes());
        for file in [pvh, linux] {
            let message = load_bytes(&file, 32).1.unwrap_err().to_string();
            assert!(message.contains("entry point"), "{message}");
        }
    }
}

#[test]
fn refuses_a_segment_that_is_in_the_file_only() {
    let below_ram = Load {
        address: 0x2000,
        memory_size: 0,
        ..ALIGNED
    };
    let (memory, loaded) = load_bytes(&elf(&[ALIGNED, below_ram], None), 32);
    assert!(matches!(loaded, Err(KernelError::Damaged { .. })));
    assert_eq!(byte(&memory, 0x2000), 0);
}

#[test]
fn an_empty_segment_takes_no_place_wherever_it_claims_to_be() {
    let nowhere = Load {
        address: u64::MAX,
        file_size: 0,
        memory_size: 0,
        ..ALIGNED
    };
    let (_, loaded) = load_bytes(&elf(&[ALIGNED, nowhere], None), 32);
    assert_eq!(loaded.unwrap().end, 16 * MIB + 0x5000);
}

#[test]
fn refuses_a_truncated_kernel() {
    let whole = elf(&[ALIGNED], None);
    for len in [4, 63, 100, 0x1000, whole.len() - 1] {
        let (_, loaded) = load_bytes(&whole[..len], 32);
        assert!(loaded.is_err(), "{len}");
    }
}

#[test]
fn refuses_what_is_no_64_bit_kernel() {
    assert!(matches!(
        load_bytes(b"#!/bin/sh\n", 32).1,
        Err(KernelError::NotAKernel { .. })
    ));
    let mut other = elf(&[ALIGNED], None);
    other[4] = 1;
    assert!(matches!(
        load_bytes(&other, 32).1,
        Err(KernelError::Unsuitable { .. })
    ));
    let mut old = bzimage(4096);
    old[0x236] = 0;
    assert!(matches!(
        load_bytes(&old, 32).1,
        Err(KernelError::Unsuitable { .. })
    ));
}

#[test]
fn a_bzimage_is_loaded_at_its_preferred_address() {
    let (memory, loaded) = load_bytes(&bzimage(8192), 32);
    let loaded = loaded.unwrap();
    assert_eq!(loaded.entry, Entry::Linux64(GuestAddress(16 * MIB + 0x200)));
    assert_eq!(loaded.end, 16 * MIB + 0x10_0000);
    assert_eq!(loaded.setup_header.unwrap().len(), 0x202 + 0x6a - 0x1f1);
    assert_eq!(byte(&memory, 16 * MIB), 0xab);
}

#[test]
fn a_bzimage_needs_the_memory_that_it_unpacks_itself_to() {
    let (_, loaded) = load_bytes(&bzimage(8192), 17);
    assert_eq!(loaded.unwrap().end, 17 * MIB);
    let (_, loaded) = load_bytes(&bzimage(8192), 16);
    let message = loaded.unwrap_err().to_string();
    assert!(
        message.contains("from 0x1000000 to 0x1100000") && message.contains("mem_size_mib"),
        "{message}"
    );
}

#[test]
fn refuses_a_truncated_bzimage() {
    let whole = bzimage(8192);
    for len in [0x206, 0x237, 0x263, 1024, 1024 + 0x200] {
        let (_, loaded) = load_bytes(&whole[..len], 32);
        assert!(loaded.is_err(), "{len}");
    }
}

#[test]
fn a_bzimage_is_whole_when_all_that_its_header_counts_is_there() {
    let whole = bzimage(8192);
    for len in (1024 + 0x201..8192).rev().step_by(97).chain(8192 - 33..8192) {
        let (_, loaded) = load_bytes(&whole[..len], 32);
        let message = loaded.unwrap_err().to_string();
        let expected = format!("it has {len} bytes, and 8192 are needed for its compressed kernel");
        assert!(message.ends_with(&expected), "{message}");
    }
    load_bytes(&whole, 32).1.unwrap();
}

#[test]
fn what_follows_a_bzimage_is_not_loaded() {
    for extra in [1, 15, 16, 1472] {
        let mut file = bzimage(8192);
        file.resize(8192 + extra, 0xee);
        let (memory, loaded) = load_bytes(&file, 32);
        assert_eq!(loaded.unwrap().end, 16 * MIB + 0x10_0000);
        let end = 16 * MIB + 8192 - 1024;
        assert_eq!([byte(&memory, end - 1), byte(&memory, end)], [0xab, 0]);
    }
}

#[test]
fn refuses_a_bzimage_whose_entry_is_not_part_of_it() {
    for (paragraphs, suits) in [(0u32, false), (0x20, false), (0x21, true)] {
        let mut file = bzimage(8192);
        file[0x1f4..0x1f8].copy_from_slice(&paragraphs.to_le_bytes());
        let loaded = load_bytes(&file, 32).1;
        assert_eq!(loaded.is_ok(), suits, "{paragraphs}: {loaded:?}");
    }
}

#[test]
fn refuses_a_bzimage_that_claims_to_be_of_any_size() {
    let mut file = bzimage(8192);
    file[0x1f4..0x1f8].copy_from_slice(&u32::MAX.to_le_bytes());
    let message = load_bytes(&file, 32).1.unwrap_err().to_string();
    assert!(message.contains("is cut short"), "{message}");
}

#[test]
fn a_missing_file_is_named() {
    let error = Image::open(ImageKind::Kernel, Path::new("/nonexistent/kernel")).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/kernel"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn survives_damaged_headers(changes in prop::collection::vec((0usize..0x340, any::<u8>()), 1..12), compressed: bool) {
        let mut file = if compressed { bzimage(8192) } else { elf(&[ALIGNED], Some(0x100_0040)) };
        for (at, value) in changes {
            file[at] = value;
        }
        let (_, loaded) = load_bytes(&file, 32);
        if let Ok(loaded) = loaded {
            prop_assert!(loaded.end <= 32 * MIB);
        }
    }
}
