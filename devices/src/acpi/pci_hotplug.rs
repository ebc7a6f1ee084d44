//! The PCI hotplug registers: how host and guest tell each other that slots are filled and emptied.
//!
//! | port | register | access |
//! |---|---|---|
//! | 0..4 | slots to look at: a device came | reading clears what was read |
//! | 4..8 | slots that the guest is asked to let go of, or whose device is gone | reading clears what was read |
//! | 8..12 | slots that the guest has let go of | write ones |
//!
//! Each register has a bit per slot. The control thread sets bits and then raises
//! [`Event::PciHotplug`](super::ged::Event::PciHotplug), on which the guest's `_EVT` method reads the first two
//! registers and notifies the slots; its `_EJ0` methods write the third. The bus calls the registers on vCPU threads.

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::legacy::{InvalidState, read_bytes, write_bytes};
use crate::pci::root::SLOTS;

/// Size of the register window, in ports.
pub const PORTS: u64 = 12;
/// Offset of the register of slots to look at.
pub const CHECK: u16 = 0;
/// Offset of the register of slots to be let go of.
pub const REQUEST: u16 = 4;
/// Offset of the register of slots that were let go of.
pub const EJECT: u16 = 8;

/// What a snapshot keeps.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    check: u32,
    request: u32,
    /// Let go of by the guest, and not yet taken note of.
    ejected: u32,
}

/// The registers.
pub struct PciHotplug {
    state: State,
    /// Written when the guest has let go of a slot.
    ejection: EventFd,
}

impl PciHotplug {
    /// Registers without news.
    pub fn new(ejection: EventFd) -> Self {
        Self {
            state: State::default(),
            ejection,
        }
    }

    /// Has the guest look at `slot`.
    pub fn check(&mut self, slot: u8) {
        self.state.check |= bit(slot);
    }

    /// Asks the guest to let go of `slot`.
    pub fn request(&mut self, slot: u8) {
        self.state.request |= bit(slot);
    }

    /// Takes the question for `slot` back, should the guest not have read it yet.
    pub fn withdraw(&mut self, slot: u8) {
        self.state.request &= !bit(slot);
    }

    /// The slots that the guest has let go of since the last call.
    pub fn take_ejected(&mut self) -> impl Iterator<Item = u8> + use<> {
        // Nothing to read when a restored guest had ejected before.
        let _ = self.ejection.read();
        let ejected = std::mem::take(&mut self.state.ejected);
        (0..SLOTS).filter(move |slot| ejected & bit(*slot) != 0)
    }

    /// The state for a snapshot.
    pub fn save(&self) -> State {
        self.state.clone()
    }

    /// Takes over a saved state. What was pending is told of by the event device, which keeps its own.
    ///
    /// # Errors
    /// Fails, and changes nothing, when `state` names the host bridge's slot.
    pub fn load(&mut self, state: State) -> Result<(), InvalidState> {
        let all = state.check | state.request | state.ejected;
        InvalidState::unless(all & bit(0) == 0, "PCI hotplug", "slots", all)?;
        self.state = state;
        if self.state.ejected != 0 {
            // Only a full counter refuses, and this one is empty.
            let _ = self.ejection.write(1);
        }
        Ok(())
    }
}

fn bit(slot: u8) -> u32 {
    1u32.checked_shl(slot.into()).unwrap_or(0)
}

/// Takes one byte lane of a register that reading clears.
fn take(register: &mut u32, lane: u64) -> u8 {
    let mut lanes = register.to_le_bytes();
    let lane = usize::try_from(lane).ok().and_then(|lane| lanes.get_mut(lane));
    let taken = lane.map(std::mem::take).unwrap_or_default();
    *register = u32::from_le_bytes(lanes);
    taken
}

impl BusDevice for PciHotplug {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let state = &mut self.state;
        read_bytes(offset, data, |port| match port {
            0..4 => take(&mut state.check, port),
            4..8 => take(&mut state.request, port - 4),
            _ => 0,
        });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let before = self.state.ejected;
        write_bytes(offset, data, |port, value| {
            if let 8..12 = port {
                self.state.ejected |= u32::from(value) << ((port - 8) * 8);
            }
        });
        // The host bridge stays.
        self.state.ejected &= !bit(0);
        if self.state.ejected != before {
            // Only a full counter refuses, and then the control thread is awake already.
            let _ = self.ejection.write(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    fn hotplug() -> (PciHotplug, EventFd) {
        let ejection = EventFd::new(EFD_NONBLOCK).unwrap();
        (PciHotplug::new(ejection.try_clone().unwrap()), ejection)
    }

    fn read(device: &mut PciHotplug, register: u16) -> u32 {
        let mut data = [0; 4];
        device.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn eject(device: &mut PciHotplug, slots: u32) {
        device.write(EJECT.into(), &slots.to_le_bytes());
    }

    fn ejected(device: &mut PciHotplug) -> Vec<u8> {
        device.take_ejected().collect()
    }

    #[test]
    fn news_are_read_once() {
        let (mut device, _) = hotplug();
        device.check(3);
        device.check(31);
        device.request(4);
        assert_eq!(read(&mut device, CHECK), 1 << 3 | 1 << 31);
        assert_eq!(read(&mut device, REQUEST), 1 << 4);
        assert_eq!((read(&mut device, CHECK), read(&mut device, REQUEST)), (0, 0));
    }

    #[test]
    fn reading_a_byte_leaves_the_other_slots_pending() {
        let (mut device, _) = hotplug();
        device.check(3);
        device.check(9);
        let mut byte = [0];
        device.read(1, &mut byte);
        assert_eq!(byte, [2]);
        assert_eq!(read(&mut device, CHECK), 1 << 3);
    }

    #[test]
    fn a_question_can_be_withdrawn_until_it_is_read() {
        let (mut device, _) = hotplug();
        device.request(4);
        device.request(5);
        device.withdraw(4);
        assert_eq!(read(&mut device, REQUEST), 1 << 5);
    }

    #[test]
    fn ejections_wake_the_control_thread_once_and_are_taken_once() {
        let (mut device, ejection) = hotplug();
        eject(&mut device, 1 << 4 | 1 << 30);
        eject(&mut device, 1 << 4);
        assert_eq!(ejection.read().unwrap(), 1);
        assert_eq!(ejected(&mut device), [4, 30]);
        assert!(ejected(&mut device).is_empty());
    }

    #[test]
    fn the_host_bridge_cannot_be_ejected() {
        let (mut device, ejection) = hotplug();
        eject(&mut device, 1);
        assert!(ejection.read().is_err());
        assert!(ejected(&mut device).is_empty());
    }

    #[test]
    fn writes_to_the_other_registers_and_past_the_end_change_nothing() {
        let (mut device, _) = hotplug();
        for port in [0, 4, 12, 100] {
            device.write(port, &u32::MAX.to_le_bytes());
        }
        assert_eq!(device.save(), State::default());
        let mut data = [1; 8];
        device.read(8, &mut data);
        assert_eq!(data, [0; 8]);
    }

    #[test]
    fn a_restored_guest_s_ejection_is_told_of() {
        let (mut old, _) = hotplug();
        old.check(2);
        eject(&mut old, 1 << 7);
        let (mut new, ejection) = hotplug();
        new.load(old.save()).unwrap();
        assert_eq!(ejection.read().unwrap(), 1);
        assert_eq!(ejected(&mut new), [7]);
        assert_eq!(read(&mut new, CHECK), 1 << 2);
    }

    #[test]
    fn a_state_with_the_host_bridge_is_refused() {
        let (mut device, _) = hotplug();
        let state = State {
            request: 1,
            ..State::default()
        };
        assert!(device.load(state).is_err());
        assert_eq!(device.save(), State::default());
    }
}
