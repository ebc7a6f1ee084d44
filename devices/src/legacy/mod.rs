//! The PC devices from before PCI that a guest still expects at fixed I/O ports.
//!
//! Each is a [`BusDevice`](crate::bus::BusDevice) of one-byte registers, called on the vCPU thread that made
//! the access, under the device's lock. The control thread takes the same lock for host input, Ctrl-Alt-Del,
//! metrics and snapshots. What a device tells the host goes through eventfds.

pub mod i8042;
pub mod rtc;
pub mod serial;

/// A saved device state that the device itself can never be in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the saved state of the {device} has an impossible {field} ({value}): the snapshot is damaged, take a new one"
)]
pub struct InvalidState {
    /// The device, as a person calls it.
    pub device: &'static str,
    /// The first field found wrong.
    pub field: &'static str,
    /// Its value.
    pub value: String,
}

impl InvalidState {
    /// Fails for `field` of `device` unless `valid`.
    pub(crate) fn unless(
        valid: bool,
        device: &'static str,
        field: &'static str,
        value: impl ToString,
    ) -> Result<(), Self> {
        if valid {
            Ok(())
        } else {
            Err(Self {
                device,
                field,
                value: value.to_string(),
            })
        }
    }
}

/// Serves a read of any width as the ISA bus does for an 8-bit device: port by port, lowest first.
pub(crate) fn read_bytes(offset: u64, data: &mut [u8], mut read: impl FnMut(u64) -> u8) {
    for (byte, port) in data.iter_mut().zip(offset..=u64::MAX) {
        *byte = read(port);
    }
}

/// Serves a write of any width as the ISA bus does for an 8-bit device: port by port, lowest first.
pub(crate) fn write_bytes(offset: u64, data: &[u8], mut write: impl FnMut(u64, u8)) {
    for (byte, port) in data.iter().zip(offset..=u64::MAX) {
        write(port, *byte);
    }
}

#[cfg(test)]
mod tests;
