//! Disk and kernel images made by tests.

use std::fs::{self, File};
use std::path::Path;

use crate::{Failure, Result};

/// The type of the note that holds a kernel's PVH entry (`XEN_ELFNOTE_PHYS32_ENTRY`), and of none that exists.
const PVH_ENTRY: u32 = 18;
const UNKNOWN_NOTE: u32 = 0x7fff;
const PT_NOTE: u32 = 4;

/// Bytes that look random and are always the same.
pub fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Creates a file of this many bytes, all zero.
pub fn zeros(path: &Path, len: u64) -> Result {
    Ok(File::create(path)?.set_len(len)?)
}

/// Copies an ELF kernel without what says that it has a PVH entry.
pub fn without_pvh_note(kernel: &Path, copy: &Path) -> Result {
    let mut elf = fs::read(kernel)?;
    let (table, entry_size, count) = (read(&elf, 32, 8)?, read(&elf, 54, 2)?, read(&elf, 56, 2)?);
    let mut found = false;
    for index in 0..count {
        let header = table + index * entry_size;
        if read(&elf, header, 4)? == usize::try_from(PT_NOTE)? {
            let (start, len) = (read(&elf, header + 8, 8)?, read(&elf, header + 32, 8)?);
            found |= hide_pvh_note(&mut elf, start, start + len)?;
        }
    }
    if !found {
        return Err(Failure::new(format!("{} has no PVH note", kernel.display())));
    }
    Ok(fs::write(copy, elf)?)
}

/// Changes the type of the note among those in a part of the file; false when it is not there.
fn hide_pvh_note(elf: &mut [u8], mut at: usize, end: usize) -> Result<bool> {
    while at < end {
        let (name, descriptor, kind) = (read(elf, at, 4)?, read(elf, at + 4, 4)?, read(elf, at + 8, 4)?);
        let is_xen = elf.get(at + 12..at + 16) == Some(b"Xen\0");
        if is_xen && kind == usize::try_from(PVH_ENTRY)? {
            elf[at + 8..at + 12].copy_from_slice(&UNKNOWN_NOTE.to_le_bytes());
            return Ok(true);
        }
        at += 12 + name.next_multiple_of(4) + descriptor.next_multiple_of(4);
    }
    Ok(false)
}

/// A little-endian number of `len` bytes.
fn read(bytes: &[u8], at: usize, len: usize) -> Result<usize> {
    let part = bytes
        .get(at..at + len)
        .ok_or_else(|| Failure::new("the ELF file is truncated"))?;
    Ok(part
        .iter()
        .rev()
        .fold(0, |number, byte| number << 8 | usize::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Scratch, TinyKernel};

    #[test]
    fn patterns_are_repeatable_and_not_periodic() {
        let bytes = pattern(4096);
        assert_eq!(bytes, pattern(4096));
        assert_ne!(bytes[..2048], bytes[2048..]);
    }

    #[test]
    fn only_the_type_of_the_note_changes() {
        let scratch = Scratch::new("note").unwrap();
        let kernel = TinyKernel::new().spin().write(&scratch).unwrap();

        without_pvh_note(&kernel, &scratch.join("copy")).unwrap();

        let (before, after) = (
            fs::read(&kernel).unwrap(),
            fs::read(scratch.join("copy")).unwrap(),
        );
        let changed = before.iter().zip(&after).filter(|(old, new)| old != new).count();
        assert_eq!((before.len(), changed), (after.len(), 2));
    }

    #[test]
    fn a_kernel_without_the_note_is_refused() {
        let scratch = Scratch::new("no-note").unwrap();
        let kernel = TinyKernel::new()
            .spin()
            .without_pvh_note()
            .write(&scratch)
            .unwrap();
        assert!(without_pvh_note(&kernel, &scratch.join("copy")).is_err());
    }
}
