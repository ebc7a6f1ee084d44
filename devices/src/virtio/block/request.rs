//! Requests (virtio 1.2 §5.2.6): taken apart and checked, with no I/O.

use super::SECTOR;
use crate::virtio::Chain;

/// Request types.
const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;

/// Bytes in a request's header: type, reserved, sector.
const HEADER: usize = 16;
/// Bytes in a serial number.
pub(super) const SERIAL: usize = 20;

/// The last byte of every request, written by the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    /// Done.
    Ok = 0,
    /// Failed, or not valid.
    IoError = 1,
    /// Not known.
    Unsupported = 2,
}

/// What the disk allows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Its size in sectors.
    pub(super) sectors: u64,
    /// True when it must not be written.
    pub(super) read_only: bool,
    /// True when flushes are offered.
    pub(super) flush: bool,
}

/// A valid request. Its data are all that is left on its side of the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// Fill the writable buffers from this byte of the disk on.
    Read { offset: u64 },
    /// Write the readable buffers from this byte of the disk on.
    Write { offset: u64 },
    /// Make all writes durable.
    Flush,
    /// Put the serial number into the writable buffers.
    GetId,
}

impl Request {
    /// Reads the header of `chain`, from which the status byte is gone already, and checks the request against
    /// `limits`. For a write it takes the header away. An error is the status to answer with.
    pub(super) fn parse(chain: &mut Chain<'_>, limits: Limits) -> Result<Self, Status> {
        let mut header = [0; HEADER];
        if chain.readable.read(0, &mut header) < HEADER {
            return Err(Status::IoError);
        }
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            TYPE_IN => Ok(Self::Read {
                offset: limits.offset(sector, chain.writable.len())?,
            }),
            TYPE_OUT if limits.read_only => Err(Status::IoError),
            TYPE_OUT => {
                chain.readable.advance(HEADER);
                let offset = limits.offset(sector, chain.readable.len())?;
                Ok(Self::Write { offset })
            }
            TYPE_FLUSH if limits.flush => Ok(Self::Flush),
            TYPE_GET_ID if chain.writable.len() < SERIAL => Err(Status::IoError),
            TYPE_GET_ID => Ok(Self::GetId),
            _ => Err(Status::Unsupported),
        }
    }

    /// How many bytes it moves from or to the disk.
    pub(super) fn bytes(self, chain: &Chain<'_>) -> usize {
        match self {
            Self::Read { .. } => chain.writable.len(),
            Self::Write { .. } => chain.readable.len(),
            Self::Flush | Self::GetId => 0,
        }
    }
}

impl Limits {
    /// Where on the disk `len` bytes at `sector` begin, when they are whole sectors and all on it.
    fn offset(self, sector: u64, len: usize) -> Result<u64, Status> {
        let len = u64::try_from(len).expect("a usize fits");
        let end = sector.checked_add(len / SECTOR);
        if len % SECTOR != 0 || end.is_none_or(|end| end > self.sectors) {
            return Err(Status::IoError);
        }
        // The disk's size in bytes came from a file, so it does not overflow.
        sector.checked_mul(SECTOR).ok_or(Status::IoError)
    }
}
