//! A kernel of a few instructions, for tests of the machine's life cycle: it writes to the serial port, and ends or
//! waits in one of the ways that matter. The same bytes run in protected mode (PVH entry) and in long mode (64-bit
//! entry): they use no stack, no REX prefix and no absolute operand that the two decode differently.

use std::path::PathBuf;

use crate::{Result, Scratch};

/// Where the code is loaded and entered.
const BASE: u32 = 0x10_0000;
/// Where the code is in the file: a page boundary, so that it can be mapped.
const CODE_OFFSET: usize = PAGE;
/// Where the data is loaded.
const DATA: u32 = 0x100_0000;
const PAGE: usize = 0x1000;
/// Segments of code, of data and of notes.
const MAX_SEGMENTS: usize = 3;

/// Machine code under construction.
#[derive(Debug, Clone)]
pub struct TinyKernel {
    code: Vec<u8>,
    data: Vec<u8>,
    pvh: bool,
}

impl Default for TinyKernel {
    fn default() -> Self {
        Self::new()
    }
}

impl TinyKernel {
    /// No instruction yet.
    pub fn new() -> Self {
        // mov edx, 0x3f8 (the serial port, for all that follows)
        Self {
            code: vec![0xba, 0xf8, 0x03, 0x00, 0x00],
            data: Vec::new(),
            pvh: true,
        }
    }

    /// Leaves out the note that names the PVH entry: only the 64-bit entry remains.
    pub fn without_pvh_note(mut self) -> Self {
        self.pvh = false;
        self
    }

    /// Writes a text of up to 100 bytes to the serial port.
    pub fn print(self, text: &str) -> Self {
        let len = u8::try_from(text.len()).expect("the text fits a short jump");
        // jmp over the text
        let mut kernel = self.emit(&[0xeb, len]);
        let at = BASE + u32::try_from(kernel.code.len()).expect("the code is short");
        kernel.code.extend_from_slice(text.as_bytes());
        // mov esi, text; mov ecx, length
        kernel = kernel
            .emit(&[0xbe])
            .emit(&at.to_le_bytes())
            .emit(&[0xb9, len, 0, 0, 0]);
        // next: lodsb; out dx, al; loop next
        kernel.emit(&[0xac, 0xee, 0xe2, 0xfc])
    }

    /// Writes `P` when running in protected mode and `L` in long mode.
    pub fn print_mode(self) -> Self {
        // xor eax, eax; inc eax (a prefix of the nop in long mode); nop; shl eax, 2; add al, 'L'; out dx, al
        self.emit(&[0x31, 0xc0, 0x40, 0x90, 0xc1, 0xe0, 0x02, 0x04, b'L', 0xee])
    }

    /// Writes the lowest byte of a model specific register.
    pub fn print_msr(self, index: u32) -> Self {
        // mov ecx, index; rdmsr; mov edx, 0x3f8; out dx, al
        self.emit(&[0xb9])
            .emit(&index.to_le_bytes())
            .emit(&[0x0f, 0x32, 0xba, 0xf8, 0x03, 0, 0, 0xee])
    }

    /// Writes dots for ever, a little apart.
    pub fn dots(self) -> Self {
        // again: mov al, '.'; out dx, al; mov ecx, 2000; wait: loop wait; jmp again
        self.emit(&[0xb0, b'.', 0xee, 0xb9, 0xd0, 0x07, 0, 0, 0xe2, 0xfe, 0xeb, 0xf4])
    }

    /// Writes back every byte that the serial port receives, for ever.
    pub fn echo(self) -> Self {
        // again: mov dl, 0xfd; in al, dx; and al, 1; jz again; mov dl, 0xf8; in al, dx; out dx, al; jmp again
        self.emit(&[
            0xb2, 0xfd, 0xec, 0x24, 0x01, 0x74, 0xf9, 0xb2, 0xf8, 0xec, 0xee, 0xeb, 0xf3,
        ])
    }

    /// Lets go of all PCI slots, for ever.
    pub fn eject(self) -> Self {
        // mov edx, 0x618 (the register of slots let go of); mov eax, -2; again: out dx, eax; jmp again
        self.emit(&[
            0xba, 0x18, 0x06, 0, 0, 0xb8, 0xfe, 0xff, 0xff, 0xff, 0xef, 0xeb, 0xfd,
        ])
    }

    /// Takes note of the PCI slots that were filled, and lets go of all of them once.
    pub fn eject_once(self) -> Self {
        // mov edx, 0x610 (the register of slots to look at); in eax, dx; mov dl, 0x18; mov eax, -2; out dx, eax; mov edx, 0x3f8
        self.emit(&[
            0xba, 0x10, 0x06, 0, 0, 0xed, 0xb2, 0x18, 0xb8, 0xfe, 0xff, 0xff, 0xff, 0xef, 0xba, 0xf8, 0x03,
            0, 0,
        ])
    }

    /// Waits until it is told to look at a PCI slot.
    pub fn wait_for_slot(self) -> Self {
        // mov edx, 0x610; again: in eax, dx; test eax, eax; jz again; mov edx, 0x3f8
        self.emit(&[
            0xba, 0x10, 0x06, 0, 0, 0xed, 0x85, 0xc0, 0x74, 0xfb, 0xba, 0xf8, 0x03, 0, 0,
        ])
    }

    /// Writes 32 bits to an address, in protected mode.
    pub fn store(self, address: u32, value: u32) -> Self {
        // mov dword [address], value
        self.emit(&[0xc7, 0x05])
            .emit(&address.to_le_bytes())
            .emit(&value.to_le_bytes())
    }

    /// Writes a byte to an address, in protected mode.
    pub fn store_byte(self, address: u32, value: u8) -> Self {
        // mov byte [address], value
        self.emit(&[0xc6, 0x05])
            .emit(&address.to_le_bytes())
            .emit(&[value])
    }

    /// Waits until the 16 bits at an address have this value, in protected mode.
    pub fn wait_for_half(self, address: u32, value: u16) -> Self {
        // again: cmp word [address], value; jne again
        self.emit(&[0x66, 0x81, 0x3d])
            .emit(&address.to_le_bytes())
            .emit(&value.to_le_bytes())
            .emit(&[0x75, 0xf5])
    }

    /// Has so many pages of data, none of them zero, that it does not write; reads all of them.
    pub fn read_data(mut self, pages: u32) -> Self {
        self.data = (0..pages)
            .flat_map(|page| [page | 1; PAGE / 4])
            .flat_map(u32::to_le_bytes)
            .collect();
        // mov esi, data; mov ecx, pages; next: mov al, [esi]; add esi, 0x1000; loop next
        self.emit(&[0xbe])
            .emit(&DATA.to_le_bytes())
            .emit(&[0xb9])
            .emit(&pages.to_le_bytes())
            .emit(&[0x8a, 0x06, 0x81, 0xc6, 0x00, 0x10, 0x00, 0x00, 0xe2, 0xf6])
    }

    /// Waits until the serial port has received a byte, and takes it.
    pub fn wait_for_key(self) -> Self {
        // again: mov dl, 0xfd; in al, dx; and al, 1; jz again; mov dl, 0xf8; in al, dx
        self.emit(&[0xb2, 0xfd, 0xec, 0x24, 0x01, 0x74, 0xf9, 0xb2, 0xf8, 0xec])
    }

    /// Does nothing for ever, at full speed.
    pub fn spin(self) -> Self {
        self.emit(&[0xeb, 0xfe])
    }

    /// Sleeps for ever, with interrupts off.
    pub fn halt(self) -> Self {
        // again: cli; hlt; jmp again
        self.emit(&[0xfa, 0xf4, 0xeb, 0xfc])
    }

    /// Resets the machine through the keyboard controller.
    pub fn reset(self) -> Self {
        // mov al, 0xfe; out 0x64, al
        self.emit(&[0xb0, 0xfe, 0xe6, 0x64]).halt()
    }

    /// Crashes the processor.
    pub fn triple_fault(self) -> Self {
        // sub ecx, ecx; lea of an empty table: mov [ecx+0x8000], ecx twice (limit 0, base 0), lidt [ecx+0x8000]; ud2
        let table = 0x8000_u32.to_le_bytes();
        let next = 0x8004_u32.to_le_bytes();
        let kernel = self
            .emit(&[0x29, 0xc9, 0x89, 0x89])
            .emit(&table)
            .emit(&[0x89, 0x89])
            .emit(&next);
        kernel
            .emit(&[0x89, 0x89])
            .emit(&0x8008_u32.to_le_bytes())
            .emit(&[0x0f, 0x01, 0x99])
            .emit(&table)
            .emit(&[0x0f, 0x0b])
    }

    /// Runs code where there is no memory.
    pub fn run_off(self) -> Self {
        // mov eax, 0xd8000000; jmp eax
        self.emit(&[0xb8])
            .emit(&0xd800_0000_u32.to_le_bytes())
            .emit(&[0xff, 0xe0])
    }

    /// Writes the kernel as an ELF file into a folder.
    pub fn write(&self, scratch: &Scratch) -> Result<PathBuf> {
        scratch.file("kernel", self.elf())
    }

    /// The kernel as an ELF file.
    pub fn elf(&self) -> Vec<u8> {
        let note = self.note();
        let note_offset = 64 + MAX_SEGMENTS * 56;
        let data_offset = (CODE_OFFSET + self.code.len()).next_multiple_of(PAGE);
        let mut segments = vec![program_header([1, 7], CODE_OFFSET, BASE, self.code.len())];
        if !self.data.is_empty() {
            segments.push(program_header([1, 4], data_offset, DATA, self.data.len()));
        }
        if self.pvh {
            segments.push(program_header([4, 4], note_offset, 0, note.len()));
        }
        let mut file = header(u16::try_from(segments.len()).expect("at most three"));
        file.extend(segments.concat());
        file.resize(note_offset, 0);
        file.extend(note);
        file.resize(CODE_OFFSET, 0);
        file.extend(&self.code);
        if !self.data.is_empty() {
            file.resize(data_offset, 0);
            file.extend(&self.data);
        }
        file
    }

    /// The note `XEN_ELFNOTE_PHYS32_ENTRY`.
    fn note(&self) -> Vec<u8> {
        let words = [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), BASE];
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn emit(mut self, bytes: &[u8]) -> Self {
        self.code.extend_from_slice(bytes);
        self
    }
}

/// The header of a 64-bit x86 executable whose program headers follow at once.
fn header(segments: u16) -> Vec<u8> {
    let mut header = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    header.extend([2u16, 62].iter().flat_map(|half| half.to_le_bytes()));
    header.extend(1u32.to_le_bytes());
    header.extend(
        [u64::from(BASE), 64, 0]
            .iter()
            .flat_map(|word| word.to_le_bytes()),
    );
    header.extend(0u32.to_le_bytes());
    header.extend(
        [64, 56, segments, 0, 0, 0]
            .iter()
            .flat_map(|half: &u16| half.to_le_bytes()),
    );
    header
}

fn program_header(kind_and_flags: [u32; 2], offset: usize, address: u32, len: usize) -> Vec<u8> {
    let mut header = kind_and_flags
        .iter()
        .flat_map(|half| half.to_le_bytes())
        .collect::<Vec<_>>();
    let (offset, address, len) = (offset as u64, u64::from(address), len as u64);
    header.extend(
        [offset, address, address, len, len, 0x1000]
            .iter()
            .flat_map(|word| word.to_le_bytes()),
    );
    header
}
