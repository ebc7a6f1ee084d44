//! [`PciSegment`]: bus 0 with its 32 slots, reached through ECAM ([`Ecam`]) and the legacy ports ([`ConfigPorts`]).
//!
//! vCPU threads read and write configuration space; the control thread attaches and detaches functions. **Lock
//! order**: segment, then function; when a BAR moves the function is released first, so the mapper may take the bus
//! (or the function) while the segment is locked. Whoever holds a lock that the mapper takes must not call the
//! segment.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::config_space::{ConfigSpace, Identity, LEN};
use crate::bus::BusDevice;

/// Slots on the bus; slot 0 is the host bridge.
pub const SLOTS: u8 = 32;
/// Bytes of the ECAM range of one bus (PCI Express 5.0 §7.2.2).
pub const ECAM_LEN: u64 = 1 << 20;
/// First of the legacy configuration ports (PCI 3.0 §3.2.2.3.2).
pub const CONFIG_PORTS: u64 = 0xcf8;
/// How many ports there are.
pub const CONFIG_PORTS_LEN: u64 = 8;

/// The host bridge's identity: the vendor and device id under which other microVM monitors show theirs too, so that
/// guests need no new driver entry.
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x8086,
    device: 0x0d57,
    revision: 0,
    class: (0x06, 0x00),
    subsystem_vendor: 0,
    subsystem: 0,
};

/// Function 0 of a slot. Called under its own lock on vCPU threads and the control thread.
pub trait PciFunction: Send {
    /// Reads a configuration access of `data.len()` bytes.
    fn read_config(&mut self, offset: u16, data: &mut [u8]);
    /// Writes a configuration access.
    fn write_config(&mut self, offset: u16, data: &[u8]);
    /// The address that its BAR decodes; none while decoding is off.
    fn bar(&self) -> Option<u64>;
    /// The first port that its I/O BAR decodes; none while decoding is off, or without such a BAR.
    fn io_bar(&self) -> Option<u16> {
        None
    }
}

/// A function as the segment and its owner share it.
pub type SharedFunction = Arc<Mutex<dyn PciFunction>>;

/// Puts BARs on the bus. Called with the segment locked and the function not locked: it must not call the segment.
pub trait BarMapper: Send + Sync {
    /// The function in `slot` no longer answers at `old` (if any), and from now on at `new` (if any). The guest
    /// chose the address, so it may clash with anything; on failure the function must be mapped nowhere.
    fn moved(&self, slot: u8, old: Option<u64>, new: Option<u64>) -> io::Result<()>;
    /// The same for the function's ports.
    fn moved_io(&self, _slot: u8, _old: Option<u16>, _new: Option<u16>) -> io::Result<()> {
        Ok(())
    }
}

/// Why a function could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    /// There is no such slot, or it is taken.
    #[error("PCI slot {slot} does not exist or is taken; use a free one of 1 to 31")]
    Slot {
        /// What was asked for.
        slot: u8,
    },
    /// Its BAR is already decoded, and cannot be mapped.
    #[error("the function for PCI slot {slot} decodes {address:#x}, which cannot be mapped")]
    Bar {
        /// Where it should go.
        slot: u8,
        /// The BAR's address.
        address: u64,
        /// What the mapper said.
        source: io::Error,
    },
}

struct Slot {
    function: SharedFunction,
    /// Where the mapper has put the BAR.
    mapped: Option<u64>,
    /// Where the mapper has put the I/O BAR.
    mapped_io: Option<u16>,
}

/// The only bus of the only segment.
pub struct PciSegment {
    slots: Mutex<[Option<Slot>; SLOTS as usize]>,
    mapper: Arc<dyn BarMapper>,
}

impl PciSegment {
    /// A bus with nothing but a host bridge.
    pub fn new(mapper: Arc<dyn BarMapper>) -> Self {
        let mut slots = [const { None }; SLOTS as usize];
        slots[0] = Some(Slot {
            function: Arc::new(Mutex::new(HostBridge(ConfigSpace::new(&HOST_BRIDGE)))),
            mapped: None,
            mapped_io: None,
        });
        Self {
            slots: Mutex::new(slots),
            mapper,
        }
    }

    /// The lowest slot with no function.
    pub fn free_slot(&self) -> Option<u8> {
        let slots = self.lock();
        (0..SLOTS).find(|&slot| slots[usize::from(slot)].is_none())
    }

    /// Plugs `function` into `slot`, and maps its BAR when it is decoded already (after a restore).
    pub fn attach(&self, slot: u8, function: SharedFunction) -> Result<(), PciError> {
        let mut slots = self.lock();
        let place = slots.get_mut(usize::from(slot)).filter(|place| place.is_none());
        let place = place.ok_or(PciError::Slot { slot })?;
        let mapped = bar(&function);
        if let Some(address) = mapped {
            let mapping = self.mapper.moved(slot, None, mapped);
            mapping.map_err(|source| PciError::Bar {
                slot,
                address,
                source,
            })?;
        }
        let mut plugged = Slot {
            function,
            mapped,
            mapped_io: None,
        };
        let io = lock(&plugged.function).io_bar();
        follow(slot, &mut plugged.mapped_io, (None, io), |old, new| {
            self.mapper.moved_io(slot, old, new)
        });
        *place = Some(plugged);
        Ok(())
    }

    /// Unplugs and unmaps the function in `slot`; none when there is no function, or it is the host bridge.
    pub fn detach(&self, slot: u8) -> Option<SharedFunction> {
        let mut slots = self.lock();
        let place = slots.get_mut(usize::from(slot)).filter(|_| slot != 0)?;
        let Slot {
            function,
            mapped,
            mut mapped_io,
        } = place.take()?;
        let io = mapped_io;
        follow(slot, &mut mapped_io, (io, None), |old, new| {
            self.mapper.moved_io(slot, old, new)
        });
        if mapped.is_some()
            && let Err(error) = self.mapper.moved(slot, mapped, None)
        {
            log::warn!("the BAR of PCI slot {slot} cannot be unmapped: {error}");
        }
        Some(function)
    }

    /// Reads configuration space; absent functions give all ones.
    fn read(&self, at: Address, data: &mut [u8]) {
        data.fill(0xff);
        // The table is not needed while the function works.
        let function = match &self.lock()[usize::from(at.slot)] {
            Some(slot) if at.function == 0 => Arc::clone(&slot.function),
            _ => return,
        };
        lock(&function).read_config(at.register, data);
    }

    /// Writes configuration space, and has the BAR mapped anew when that moved it.
    fn write(&self, at: Address, data: &[u8]) {
        // Held to the end, so that two moves of one BAR reach the mapper in order.
        let mut slots = self.lock();
        let Some(slot) = slots[usize::from(at.slot)].as_mut().filter(|_| at.function == 0) else {
            return;
        };
        let (memory, io) = {
            let mut function = lock(&slot.function);
            let before = (function.bar(), function.io_bar());
            function.write_config(at.register, data);
            ((before.0, function.bar()), (before.1, function.io_bar()))
        };
        follow(at.slot, &mut slot.mapped, memory, |old, new| {
            self.mapper.moved(at.slot, old, new)
        });
        follow(at.slot, &mut slot.mapped_io, io, |old, new| {
            self.mapper.moved_io(at.slot, old, new)
        });
    }

    fn lock(&self) -> MutexGuard<'_, [Option<Slot>; SLOTS as usize]> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Has a BAR mapped anew when what it decodes has changed from `before` to `after`.
fn follow<T: Copy + PartialEq + std::fmt::LowerHex>(
    slot: u8,
    mapped: &mut Option<T>,
    (before, after): (Option<T>, Option<T>),
    moved: impl FnOnce(Option<T>, Option<T>) -> io::Result<()>,
) {
    if before == after || (mapped.is_none() && after.is_none()) {
        return;
    }
    match moved(mapped.take(), after) {
        Ok(()) => *mapped = after,
        Err(error) => {
            let place = after.map_or_else(|| "nowhere".into(), |address| format!("{address:#x}"));
            log::warn!(
                "the guest moved a BAR of PCI slot {slot} to {place}, which cannot be mapped: {error}"
            );
        }
    }
}

fn lock(function: &SharedFunction) -> MutexGuard<'_, dyn PciFunction + 'static> {
    function.lock().unwrap_or_else(PoisonError::into_inner)
}

fn bar(function: &SharedFunction) -> Option<u64> {
    lock(function).bar()
}

struct HostBridge(ConfigSpace);

impl PciFunction for HostBridge {
    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        self.0.read(offset, data);
    }
    fn write_config(&mut self, _: u16, _: &[u8]) {}
    fn bar(&self) -> Option<u64> {
        None
    }
}

/// A register on bus 0.
#[derive(Clone, Copy)]
struct Address {
    slot: u8,
    function: u8,
    register: u16,
}

/// The memory-mapped way to configuration space: [`ECAM_LEN`] bytes on the MMIO bus.
pub struct Ecam(Arc<PciSegment>);

impl Ecam {
    /// The ECAM of `segment`.
    pub fn new(segment: Arc<PciSegment>) -> Self {
        Self(segment)
    }

    fn decode(offset: u64) -> Option<Address> {
        let field = |shift: u32, mask: u64| offset >> shift & mask;
        (offset < ECAM_LEN).then_some(())?;
        Some(Address {
            slot: u8::try_from(field(15, 0x1f)).ok()?,
            function: u8::try_from(field(12, 7)).ok()?,
            register: u16::try_from(field(0, u64::from(LEN) - 1)).ok()?,
        })
    }
}

impl BusDevice for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(at) = Self::decode(offset) {
            self.0.read(at, data);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(at) = Self::decode(offset) {
            self.0.write(at, data);
        }
    }
}

/// The port way to configuration space ("mechanism #1"): [`CONFIG_PORTS_LEN`] ports from [`CONFIG_PORTS`].
pub struct ConfigPorts {
    segment: Arc<PciSegment>,
    address: u32,
}

impl ConfigPorts {
    /// The address register's bits that stay as written; the others read as zero.
    const ADDRESS_MASK: u32 = 0x8fff_fffc;

    /// The ports of `segment`.
    pub fn new(segment: Arc<PciSegment>) -> Self {
        Self { segment, address: 0 }
    }

    /// The address register, to be saved: a snapshot may fall between a guest's two accesses.
    pub fn address(&self) -> u32 {
        self.address
    }

    /// Writes the address register.
    pub fn set_address(&mut self, address: u32) {
        self.address = address & Self::ADDRESS_MASK;
    }

    /// The register behind the data port at `offset`, for an access of `len` bytes within its four ports.
    fn decode(&self, offset: u64, len: usize) -> Option<Address> {
        let byte = u8::try_from(offset.checked_sub(4)?).ok()?;
        let [low, function, bus, high] = self.address.to_le_bytes();
        if usize::from(byte) + len > 4 || bus != 0 || high & 0x80 == 0 {
            return None;
        }
        Some(Address {
            slot: function >> 3,
            function: function & 7,
            // Guests on AMD processors reach the extended space through bits 24 to 27.
            register: u16::from(high & 0xf) << 8 | u16::from(low + byte),
        })
    }
}

impl BusDevice for ConfigPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // Only a whole access meets the address register (PCI 3.0 §3.2.2.3.2).
        if offset == 0 && data.len() == 4 {
            return data.copy_from_slice(&self.address.to_le_bytes());
        }
        match self.decode(offset, data.len()) {
            Some(at) => self.segment.read(at, data),
            None => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (0, &[a, b, c, d]) = (offset, data) {
            return self.set_address(u32::from_le_bytes([a, b, c, d]));
        }
        if let Some(at) = self.decode(offset, data.len()) {
            self.segment.write(at, data);
        }
    }
}

#[cfg(test)]
mod tests;
