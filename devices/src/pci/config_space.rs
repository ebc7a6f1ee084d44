//! [`ConfigSpace`]: the type 0 configuration space of one PCI function, as bytes with a write mask.
//!
//! A function builds it once and then forwards configuration accesses to it, on the vCPU thread that made them and
//! under the function's own lock. Space behind the first 256 bytes has no capabilities and reads as zero.

use serde::{Deserialize, Serialize};

use crate::virtio::StateError;

/// Bytes of the space that have a register (PCI 3.0 §6.1); the extended space is empty.
const LEGACY_LEN: usize = 256;
/// Bytes of a function's configuration space with ECAM (PCI Express 5.0 §7.2.2).
pub const LEN: u16 = 4096;

/// Command register bits (PCI 3.0 §6.2.2).
pub mod command {
    /// The function answers the ports in its I/O BARs.
    pub const IO: u16 = 1 << 0;
    /// The function answers the addresses in its memory BARs.
    pub const MEMORY: u16 = 1 << 1;
    /// The function may access memory.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// The function may not assert its INTx pin.
    pub const INTX_DISABLE: u16 = 1 << 10;
}

/// Status register bits (PCI 3.0 §6.2.3).
mod status {
    pub(super) const INTERRUPT: u8 = 1 << 3;
    pub(super) const CAPABILITIES: u8 = 1 << 4;
}

/// Register offsets of a type 0 header (PCI 3.0 §6.1).
mod register {
    pub(super) const VENDOR: usize = 0x00;
    pub(super) const DEVICE: usize = 0x02;
    pub(super) const COMMAND: usize = 0x04;
    pub(super) const STATUS: usize = 0x06;
    pub(super) const REVISION: usize = 0x08;
    pub(super) const CLASS: usize = 0x09;
    pub(super) const CACHE_LINE: usize = 0x0c;
    pub(super) const BAR0: usize = 0x10;
    pub(super) const BAR2: usize = 0x18;
    pub(super) const SUBSYSTEM_VENDOR: usize = 0x2c;
    pub(super) const SUBSYSTEM: usize = 0x2e;
    pub(super) const CAPABILITIES: usize = 0x34;
    pub(super) const INTERRUPT_LINE: usize = 0x3c;
    pub(super) const INTERRUPT_PIN: usize = 0x3d;
    /// First byte behind the header.
    pub(super) const HEADER_END: usize = 0x40;
}

/// BAR type bits: memory, 64-bit, not prefetchable (PCI 3.0 §6.2.5.1).
const BAR_MEMORY_64: u64 = 0b0100;
/// BAR type bit: I/O ports.
const BAR_IO: u16 = 1;
/// The smallest BAR: a page, so that no two functions share one.
const MIN_BAR_SIZE: u64 = 4096;

/// What a function says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision id.
    pub revision: u8,
    /// Base class and sub-class; the programming interface is zero.
    pub class: (u8, u8),
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// The saved state: every register byte of the first 256.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    registers: Vec<u8>,
}

/// A configuration space.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    registers: [u8; LEGACY_LEN],
    /// Which bits the guest may change.
    writable: [u8; LEGACY_LEN],
    bar_size: u64,
    io_bar_size: u16,
    /// The byte that links to the next capability to be added.
    link: usize,
    /// Where the next capability goes.
    free: usize,
}

impl ConfigSpace {
    /// A space with nothing but its identity.
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            registers: [0; LEGACY_LEN],
            writable: [0; LEGACY_LEN],
            bar_size: 0,
            io_bar_size: 0,
            link: register::CAPABILITIES,
            free: register::HEADER_END,
        };
        space.put(register::VENDOR, &identity.vendor.to_le_bytes());
        space.put(register::DEVICE, &identity.device.to_le_bytes());
        space.put(register::REVISION, &[identity.revision]);
        let (base, sub) = identity.class;
        space.put(register::CLASS, &[0, sub, base]);
        space.put(
            register::SUBSYSTEM_VENDOR,
            &identity.subsystem_vendor.to_le_bytes(),
        );
        space.put(register::SUBSYSTEM, &identity.subsystem.to_le_bytes());
        // It has no effect here, but operating systems expect to be able to set it.
        space.writable[register::CACHE_LINE] = 0xff;
        space
    }

    /// Adds the one memory BAR: 64 bits in BAR 0 and 1, `size` bytes at `address`. Decoding is off.
    ///
    /// # Panics
    /// When `size` is not a power of two of at least 4 KiB, or `address` is not aligned to it.
    pub fn add_bar(&mut self, size: u64, address: u64) {
        assert!(
            size.is_power_of_two() && size >= MIN_BAR_SIZE,
            "invalid BAR size {size:#x}"
        );
        assert!(address.is_multiple_of(size), "misaligned BAR at {address:#x}");
        self.bar_size = size;
        self.put(register::BAR0, &(address | BAR_MEMORY_64).to_le_bytes());
        self.allow(register::BAR0, &(!(size - 1)).to_le_bytes());
        self.allow(
            register::COMMAND,
            &(command::MEMORY | command::BUS_MASTER).to_le_bytes(),
        );
    }

    /// Adds the one I/O BAR: `size` ports in BAR 2 at `address`. Decoding is off.
    ///
    /// # Panics
    /// When `size` is not a power of two of at least 4, or `address` is not aligned to it.
    pub fn add_io_bar(&mut self, size: u16, address: u16) {
        assert!(
            size.is_power_of_two() && size >= 4,
            "invalid I/O BAR size {size:#x}"
        );
        assert!(address.is_multiple_of(size), "misaligned I/O BAR at {address:#x}");
        self.io_bar_size = size;
        self.put(register::BAR2, &(address | BAR_IO).to_le_bytes());
        self.allow(register::BAR2, &(!(size - 1)).to_le_bytes());
        self.allow(register::COMMAND, &command::IO.to_le_bytes());
    }

    /// Wires the function's INTA pin; `line` is what firmware would have written for the operating system to read.
    pub fn add_interrupt_pin(&mut self, line: u8) {
        self.put(register::INTERRUPT_LINE, &[line]);
        self.put(register::INTERRUPT_PIN, &[1]);
        self.allow(register::INTERRUPT_LINE, &[0xff]);
        self.allow(register::COMMAND, &command::INTX_DISABLE.to_le_bytes());
    }

    /// Appends a capability of kind `id`; `body` follows the two header bytes, and `writable` masks it from its
    /// start on. Returns the capability's offset, a multiple of four.
    ///
    /// # Panics
    /// When the space is full: the set of capabilities is fixed when a function is written.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        let at = self.free;
        let end = at + 2 + body.len();
        assert!(
            end <= LEGACY_LEN,
            "no room for a capability of {} bytes",
            2 + body.len()
        );
        let offset = u8::try_from(at).expect("below 256, as its end was checked");
        self.put(self.link, &[offset]);
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        self.registers[register::STATUS] |= status::CAPABILITIES;
        (self.link, self.free) = (at + 1, end.next_multiple_of(4));
        u16::from(offset)
    }

    /// Reads a register access. Accesses that are not of 1, 2 or 4 bytes, or reach behind the space, give all ones.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        if !accessible(offset, data.len()) {
            return data.fill(0xff);
        }
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.registers.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes a register access: only writable bits change.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        if !accessible(offset, data.len()) {
            return;
        }
        for (at, byte) in (usize::from(offset)..LEGACY_LEN).zip(data) {
            let mask = self.writable[at];
            self.registers[at] = self.registers[at] & !mask | byte & mask;
        }
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        self.u16(register::COMMAND)
    }

    /// The address that the BAR decodes; none while memory decoding is off.
    pub fn bar(&self) -> Option<u64> {
        let decoding = self.command() & command::MEMORY != 0;
        let bytes = self.array::<8>(register::BAR0);
        (decoding && self.bar_size != 0).then(|| u64::from_le_bytes(bytes) & !(self.bar_size - 1))
    }

    /// The first port that the I/O BAR decodes; none while I/O decoding is off.
    pub fn io_bar(&self) -> Option<u16> {
        let decoding = self.command() & command::IO != 0;
        (decoding && self.io_bar_size != 0).then(|| self.u16(register::BAR2) & !(self.io_bar_size - 1))
    }

    /// Sets the status bit that tells of a pending INTx interrupt.
    pub fn set_interrupt_status(&mut self, pending: bool) {
        let status = &mut self.registers[register::STATUS];
        *status = *status & !status::INTERRUPT | if pending { status::INTERRUPT } else { 0 };
    }

    /// The 16-bit register at `offset`, which is one of this function's own capabilities.
    pub fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.array(offset))
    }

    /// The 32-bit register at `offset`, which is one of this function's own capabilities.
    pub fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.array(offset))
    }

    /// What a snapshot keeps.
    pub fn save(&self) -> State {
        State {
            registers: self.registers.to_vec(),
        }
    }

    /// Takes a saved state. What the guest cannot write must be as it is here: the guest has seen it.
    pub fn load(&mut self, state: &State) -> Result<(), StateError> {
        let inconsistent = |what: String| StateError::Inconsistent {
            kind: "pci configuration space",
            what,
        };
        let saved = <[u8; LEGACY_LEN]>::try_from(&state.registers[..])
            .map_err(|_| inconsistent(format!("it has {} bytes, not 256", state.registers.len())))?;
        let volatile = |at| {
            if at == register::STATUS {
                status::INTERRUPT
            } else {
                0
            }
        };
        let differs =
            |&at: &usize| (saved[at] ^ self.registers[at]) & !(self.writable[at] | volatile(at)) != 0;
        if let Some(at) = (0..LEGACY_LEN).find(differs) {
            return Err(inconsistent(format!(
                "the fixed register at {at:#x} has another value"
            )));
        }
        self.registers = saved;
        Ok(())
    }

    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.registers[at..at + N]);
        bytes
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.registers[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        for (writable, mask) in self.writable[at..].iter_mut().zip(mask) {
            *writable |= mask;
        }
    }
}

fn accessible(offset: u16, len: usize) -> bool {
    matches!(len, 1 | 2 | 4) && usize::from(offset) + len <= usize::from(LEN)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BAR_SIZE: u64 = 0x8000;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(&Identity {
            vendor: 0x1af4,
            device: 0x1044,
            revision: 1,
            class: (0xff, 0),
            subsystem_vendor: 0x1af4,
            subsystem: 0x40,
        });
        space.add_bar(BAR_SIZE, 0x40_0000_0000);
        space.add_interrupt_pin(11);
        space
    }

    fn read<const N: usize>(space: &ConfigSpace, offset: u16) -> [u8; N] {
        let mut data = [0; N];
        space.read(offset, &mut data);
        data
    }

    #[test]
    fn shows_its_identity_and_ignores_writes_to_it() {
        let mut space = space();
        space.write(0, &[0xff; 4]);
        space.write(8, &[0xff; 4]);
        assert_eq!(read(&space, 0), [0xf4, 0x1a, 0x44, 0x10]);
        assert_eq!(read(&space, 8), [1, 0, 0, 0xff]);
        assert_eq!(read(&space, 0x2c), [0xf4, 0x1a, 0x40, 0]);
        assert_eq!(read(&space, 0x3c), [11, 1]);
    }

    #[test]
    fn tells_the_size_of_its_bar_when_all_ones_are_written() {
        let mut space = space();
        space.write(0x10, &[0xff; 4]);
        space.write(0x14, &[0xff; 4]);
        assert_eq!(u32::from_le_bytes(read(&space, 0x10)), 0xffff_8004);
        assert_eq!(u32::from_le_bytes(read(&space, 0x14)), 0xffff_ffff);
        space.write(0x18, &[0xff; 4]);
        assert_eq!(read(&space, 0x18), [0; 4]);
    }

    #[test]
    fn decodes_its_bar_only_with_the_memory_bit() {
        let mut space = space();
        assert_eq!(space.bar(), None);
        space.write(4, &command::MEMORY.to_le_bytes());
        assert_eq!(space.bar(), Some(0x40_0000_0000));
        space.write(0x10, &0xc000_1234u32.to_le_bytes());
        assert_eq!(space.bar(), Some(0x40_c000_0000));
    }

    #[test]
    fn decodes_and_sizes_its_io_bar() {
        let mut space = space();
        space.add_io_bar(16, 0x1080);
        assert_eq!(space.io_bar(), None);
        space.write(0x04, &[1]);
        assert_eq!(space.io_bar(), Some(0x1080));
        space.write(0x18, &[0xff; 4]);
        assert_eq!(read::<4>(&space, 0x18), [0xf1, 0xff, 0, 0]);
        space.write(0x18, &0x2040u32.to_le_bytes());
        assert_eq!(space.io_bar(), Some(0x2040));
    }

    #[test]
    fn keeps_only_the_command_bits_that_it_implements() {
        let mut space = space();
        space.write(4, &[0xff; 4]);
        assert_eq!(read(&space, 4), [0x06, 0x04, 0, 0]);
    }

    #[test]
    fn chains_its_capabilities() {
        let mut space = space();
        let first = space.add_capability(0x09, &[1, 2, 3], &[]);
        let second = space.add_capability(0x11, &[4, 5], &[0xf0]);
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(read(&space, 0x34), [0x40]);
        assert_eq!(read(&space, 0x40), [0x09, 0x48, 1, 2]);
        space.write(0x48, &[0xff; 4]);
        assert_eq!(read(&space, 0x48), [0x11, 0, 0xf4, 5]);
        assert_eq!(read(&space, 6), [0x10]);
    }

    #[test]
    fn answers_only_accesses_of_one_two_and_four_bytes() {
        let mut space = space();
        assert_eq!(read(&space, 0), [0xff; 8]);
        assert_eq!(read(&space, 0), [0xff; 3]);
        assert_eq!(read(&space, 4094), [0xff; 4]);
        assert_eq!(read(&space, 0x100), [0; 4]);
        space.write(4, &[0xff; 8]);
        space.write(255, &[0xff; 2]);
        assert_eq!(space.command(), 0);
    }

    #[test]
    fn shows_a_pending_interrupt() {
        let mut space = space();
        space.set_interrupt_status(true);
        assert_eq!(read(&space, 6), [0x08]);
        space.set_interrupt_status(false);
        assert_eq!(read(&space, 6), [0]);
    }

    #[test]
    fn loads_what_it_saved() {
        let mut old = space();
        old.write(4, &[6]);
        old.write(0x14, &[0x41, 0, 0, 0]);
        old.set_interrupt_status(true);
        let mut new = space();
        new.load(&old.save()).unwrap();
        assert_eq!(new.bar(), Some(0x41_0000_0000));
    }

    #[test]
    fn refuses_a_state_of_another_function_or_length() {
        let mut space = space();
        let mut state = space.save();
        state.registers[2] ^= 1;
        assert!(matches!(space.load(&state), Err(StateError::Inconsistent { .. })));
        state.registers.truncate(64);
        assert!(matches!(space.load(&state), Err(StateError::Inconsistent { .. })));
    }
}
