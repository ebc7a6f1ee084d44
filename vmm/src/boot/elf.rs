//! ELF kernels: the loadable segments of an uncompressed `vmlinux`.
//!
//! Segments that the kernel does not write are mapped copy-on-write over guest RAM as far as whole pages of file and memory
//! coincide, so that of their data a boot reads only what the guest touches, and VMs share it. Their ragged ends are copied,
//! and so are the segments that the kernel writes, and everything where RAM is of huge pages.
//!
//! Linux patches its code all over while it boots. Each page of mapped code would come to the guest by three faults: read,
//! written and so copied, and found again. So code is the guest's own from the beginning: what fills huge pages is read
//! into RAM, which has such pages, and of the rest the pages are copied. The first of the huge pages stays mapped in any
//! case: by it those who look into `/proc/PID/smaps` tell where guest RAM is.

use std::ops::Range;

use vm_memory::GuestAddress;

use super::image::Image;
use super::kernel::{Entry, KernelError, LoadedKernel, Placement, check_room, field};
use crate::memory::{self, GuestMemory};
use crate::x86_64::layout::PAGE_SIZE;

const HEADER_SIZE: usize = 64;
const PROGRAM_HEADER_SIZE: usize = 56;
/// More than any kernel has.
const MAX_PROGRAM_HEADERS: usize = 64;
/// Kernel notes take a few hundred bytes.
const MAX_NOTES: u64 = 64 << 10;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const SECTION_HEADER_SIZE: usize = 64;
/// A kernel has some dozens.
const MAX_SECTION_HEADERS: usize = 256;
const SHT_PROGBITS: u32 = 1;
const SHF_EXECINSTR: u64 = 4;
/// Linux pads its code to huge pages at two places. The padding is told by one look at each part of this size.
const CODE_PART: u64 = 64 << 10;
const CODE_LOOK: usize = 64;
const HUGE_PAGE: u64 = memory::HUGE_PAGE as u64;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const PF_W: u32 = 2;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: the PVH entry point.
const NOTE_PHYS32_ENTRY: u32 = 18;

#[derive(Clone, Copy)]
struct Segment {
    kind: u32,
    writable: bool,
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
}

/// Loads an ELF kernel whose first bytes are `head`.
pub(super) fn load(
    memory: &GuestMemory,
    image: &Image,
    head: &[u8],
    placement: Placement,
) -> Result<LoadedKernel, KernelError> {
    let (entry, segments) = parse(image, head)?;
    let loaded = check_layout(memory, image, &segments)?;
    let pvh = segments
        .iter()
        .filter(|s| s.kind == PT_NOTE)
        .find_map(|s| pvh_entry(image, s).transpose());
    let entry = match pvh.transpose()? {
        Some(address) => Entry::Pvh(GuestAddress(address.into())),
        None => Entry::Linux64(GuestAddress(entry)),
    };
    let (Entry::Pvh(start) | Entry::Linux64(start)) = entry;
    if !loaded.iter().any(|range| range.contains(&start.0)) {
        return Err(KernelError::Damaged {
            path: image.path().to_owned(),
            what: "its entry point is in none of its segments",
        });
    }
    let code = match placement {
        Placement::Mapped => code_sections(image, head),
        Placement::Copied => Vec::new(),
    };
    for segment in segments.iter().filter(|s| s.kind == PT_LOAD && s.memory_size > 0) {
        let loader = Loader {
            memory,
            image,
            segment,
        };
        match placement {
            Placement::Mapped if !segment.writable => loader.map(&code)?,
            // The guest is sure to write it: two faults and a copy for each small page cost more than to read into large
            // ones.
            Placement::Mapped | Placement::Copied => {
                loader.copy(segment.address..segment.address + segment.file_size)?
            }
        }
    }
    // The kernel maps its initrd below 4 GiB; 2 GiB is what its oldest boot protocol allows.
    Ok(LoadedKernel {
        entry,
        end: loaded.last().map_or(0, |range| range.end),
        initrd_max: 0x7fff_ffff,
        setup_header: None,
    })
}

fn parse(image: &Image, head: &[u8]) -> Result<(u64, Vec<Segment>), KernelError> {
    let damaged = |what| KernelError::Damaged {
        path: image.path().to_owned(),
        what,
    };
    let unsuitable = |what| KernelError::Unsuitable {
        path: image.path().to_owned(),
        what,
    };
    let header: &[u8; HEADER_SIZE] = head
        .first_chunk()
        .ok_or_else(|| damaged("its ELF header is cut short"))?;
    let half = |offset| field(header, offset).map_or(0, u16::from_le_bytes);
    let long = |offset| field(header, offset).map_or(0, u64::from_le_bytes);
    if header[4] != CLASS_64 || header[5] != LITTLE_ENDIAN || half(18) != MACHINE_X86_64 {
        return Err(unsuitable("it is not a 64-bit x86 kernel"));
    }
    let (table, size, count) = (long(32), usize::from(half(54)), usize::from(half(56)));
    if size != PROGRAM_HEADER_SIZE || count == 0 || count > MAX_PROGRAM_HEADERS {
        return Err(damaged("its program headers are missing or have an unknown size"));
    }
    let headers = image.read("program headers", table, size * count)?;
    Ok((long(24), headers.chunks_exact(size).map(segment).collect()))
}

fn segment(header: &[u8]) -> Segment {
    let long = |offset| field(header, offset).map_or(0, u64::from_le_bytes);
    Segment {
        kind: field(header, 0).map_or(0, u32::from_le_bytes),
        writable: field(header, 4).map_or(0, u32::from_le_bytes) & PF_W != 0,
        offset: long(8),
        address: long(24),
        file_size: long(32),
        memory_size: long(40),
    }
}

/// Checks all segments before the first is placed; gives where they lie, in order, at least one.
fn check_layout(
    memory: &GuestMemory,
    image: &Image,
    segments: &[Segment],
) -> Result<Vec<Range<u64>>, KernelError> {
    let damaged = |what| KernelError::Damaged {
        path: image.path().to_owned(),
        what,
    };
    let mut ranges = Vec::new();
    for segment in segments.iter().filter(|s| s.kind == PT_LOAD) {
        if segment.file_size > segment.memory_size {
            return Err(damaged("a segment is larger in the file than in memory"));
        }
        if segment.memory_size == 0 {
            continue;
        }
        image.check_range("segments", segment.offset, segment.file_size)?;
        let end = segment.address.checked_add(segment.memory_size);
        ranges.push(segment.address..check_room(memory, image, segment.address, end)?);
    }
    ranges.sort_unstable_by_key(|range| range.start);
    if ranges.windows(2).any(|pair| pair[0].end > pair[1].start) {
        return Err(damaged("its segments overlap"));
    }
    if ranges.is_empty() {
        return Err(damaged("it has no loadable segment"));
    }
    Ok(ranges)
}

/// Puts a segment into guest memory. Ranges are of guest addresses; the sums that they lead to were checked.
struct Loader<'a> {
    memory: &'a GuestMemory,
    image: &'a Image,
    segment: &'a Segment,
}

impl Loader<'_> {
    /// Maps the segment as far as possible, and copies the rest.
    fn map(&self, code: &[Range<u64>]) -> Result<(), KernelError> {
        let Segment { offset, address, .. } = *self.segment;
        let end = address + self.segment.file_size;
        if offset % PAGE_SIZE != address % PAGE_SIZE {
            return self.copy(address..end);
        }
        let first = address.next_multiple_of(PAGE_SIZE).min(end);
        // RAM follows in the last huge page, which stays whole.
        let last = match end / HUGE_PAGE * HUGE_PAGE {
            last if last > first => last,
            _ => (end / PAGE_SIZE * PAGE_SIZE).max(first),
        };
        let code = self.code_between(first..last, code);
        let mut mapped = first;
        self.copy(address..first)?;
        for pages in code.iter().filter_map(|part| huge_pages(part, first)) {
            // Sections can come in any order, and overlap in a file that is made up.
            let pages = pages.start.max(mapped)..pages.end.max(mapped);
            self.map_pages(mapped..pages.start, &code)?;
            mapped = pages.end;
            self.copy(pages)?;
        }
        self.map_pages(mapped..last, &code)?;
        self.copy(last..end)
    }

    /// Maps whole pages, and copies those with code.
    fn map_pages(&self, pages: Range<u64>, code: &[Range<u64>]) -> Result<(), KernelError> {
        if pages.is_empty() {
            return Ok(());
        }
        let (start, size) = (GuestAddress(pages.start), pages.end - pages.start);
        memory::map_private_file(
            self.memory,
            start,
            self.image.file(),
            self.in_file(pages.start),
            size,
        )
        .map_err(|source| KernelError::Map {
            path: self.image.path().to_owned(),
            source,
        })?;
        for part in code {
            let part = part.start.max(pages.start)..part.end.min(pages.end);
            if !part.is_empty() {
                // Nothing but speed depends on it: Linux before 5.14 cannot do it.
                let _ = memory::copy_file_pages(self.memory, GuestAddress(part.start), part.end - part.start);
            }
        }
        Ok(())
    }

    fn copy(&self, range: Range<u64>) -> Result<(), KernelError> {
        if range.is_empty() {
            return Ok(());
        }
        let place = (self.memory, GuestAddress(range.start));
        let (offset, length) = (self.in_file(range.start), range.end - range.start);
        Ok(self.image.read_to_guest("segments", offset, length, place)?)
    }

    /// Where the file has what comes to an address of the segment.
    fn in_file(&self, address: u64) -> u64 {
        self.segment.offset + (address - self.segment.address)
    }

    /// Where between two pages the code of these sections, which are ranges of the file, comes to.
    fn code_between(&self, pages: Range<u64>, sections: &[Range<u64>]) -> Vec<Range<u64>> {
        let Segment { offset, address, .. } = *self.segment;
        let pages = self.in_file(pages.start)..self.in_file(pages.end);
        let parts = sections
            .iter()
            .flat_map(|section| code_parts(self.image, section, &pages));
        let in_guest = |part: Range<u64>| address + (part.start - offset)..address + (part.end - offset);
        parts.map(in_guest).collect()
    }
}

/// The huge pages that code fills, if any, without that of the address `first`.
fn huge_pages(code: &Range<u64>, first: u64) -> Option<Range<u64>> {
    let start = code.start.max(first + 1).next_multiple_of(HUGE_PAGE);
    let end = code.end / HUGE_PAGE * HUGE_PAGE;
    (start < end).then_some(start..end)
}

/// Where in the file the sections of code lie. None if there is no usable table of them: nobody needs it to boot.
fn code_sections(image: &Image, head: &[u8]) -> Vec<Range<u64>> {
    let half = |offset| field(head, offset).map_or(0, u16::from_le_bytes);
    let (size, count) = (usize::from(half(58)), usize::from(half(60)));
    if size != SECTION_HEADER_SIZE || count > MAX_SECTION_HEADERS {
        return Vec::new();
    }
    let table = field(head, 40).map_or(0, u64::from_le_bytes);
    let headers = image
        .read("section headers", table, size * count)
        .unwrap_or_default();
    headers.chunks_exact(size).filter_map(code_section).collect()
}

/// Where the section lies in the file, if it holds code.
fn code_section(header: &[u8]) -> Option<Range<u64>> {
    let long = |offset| field(header, offset).map(u64::from_le_bytes);
    let is_code = field(header, 4).map(u32::from_le_bytes)? == SHT_PROGBITS && long(8)? & SHF_EXECINSTR != 0;
    let (offset, length) = (long(24)?, long(32)?);
    is_code.then_some(offset..offset.checked_add(length)?)
}

/// The whole pages of `mapped`, a range of pages of the file, with code of a section, but not those with padding only.
fn code_parts(image: &Image, section: &Range<u64>, mapped: &Range<u64>) -> Vec<Range<u64>> {
    let start = section.start.max(mapped.start) / PAGE_SIZE * PAGE_SIZE;
    let end = section.end.min(mapped.end).next_multiple_of(PAGE_SIZE);
    let mut parts: Vec<Range<u64>> = Vec::new();
    for start in (start..end).step_by(usize::try_from(CODE_PART).expect("64 KiB")) {
        let part = start..end.min(start + CODE_PART);
        let look = image.read("code", start, CODE_LOOK).unwrap_or_default();
        if look.windows(2).all(|pair| pair[0] == pair[1]) {
            continue;
        }
        match parts.last_mut() {
            Some(last) if last.end == part.start => last.end = part.end,
            _ => parts.push(part),
        }
    }
    parts
}

/// The PVH entry point among the notes of a segment.
fn pvh_entry(image: &Image, segment: &Segment) -> Result<Option<u32>, KernelError> {
    let length = usize::try_from(segment.file_size.min(MAX_NOTES)).expect("at most MAX_NOTES");
    let notes = image.read("notes", segment.offset, length)?;
    let mut rest = &notes[..];
    while let (Some(name_size), Some(data_size), Some(kind)) = (word(rest, 0), word(rest, 4), word(rest, 8)) {
        let Some(data) = padded(name_size).and_then(|size| size.checked_add(12)) else {
            break;
        };
        let Some(next) = padded(data_size).and_then(|size| size.checked_add(data)) else {
            break;
        };
        if kind == NOTE_PHYS32_ENTRY && rest.get(12..16) == Some(b"Xen\0") {
            return Ok(word(rest, data));
        }
        rest = rest.get(next..).unwrap_or_default();
    }
    Ok(None)
}

fn word(bytes: &[u8], offset: usize) -> Option<u32> {
    field(bytes, offset).map(u32::from_le_bytes)
}

/// Names and data of notes are padded to 4 bytes.
fn padded(size: u32) -> Option<usize> {
    usize::try_from(size).ok()?.checked_next_multiple_of(4)
}
