//! Requests (virtio 1.2 §5.2.6): taken apart and checked, with no I/O.

use std::ops::Range;

use super::SECTOR;
use crate::virtio::{Buffers, Chain};

/// Request types.
const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;

/// Bytes in a segment of a discard or write-zeroes request: sector, count of sectors, flags.
const SEGMENT: usize = 16;
/// The flag by which a driver lets the device deallocate what it makes zero.
const FLAG_UNMAP: u32 = 1;
/// The most sectors that a discard names.
pub(super) const MAX_DISCARD_SECTORS: u32 = (1 << 30) / 512;
/// The most sectors that a write-zeroes request names. Few, as some file systems must be sent the zeros, and that
/// holds up the loop.
pub(super) const MAX_WRITE_ZEROES_SECTORS: u32 = (16 << 20) / 512;

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
    /// Give back the space of these bytes of the disk.
    Discard { offset: u64, len: u64 },
    /// Make these bytes of the disk zero.
    WriteZeroes { offset: u64, len: u64, may_unmap: bool },
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
                offset: limits.offset(sector, bytes(&chain.writable))?,
            }),
            TYPE_OUT if limits.read_only => Err(Status::IoError),
            TYPE_OUT => {
                chain.readable.advance(HEADER);
                let offset = limits.offset(sector, bytes(&chain.readable))?;
                Ok(Self::Write { offset })
            }
            TYPE_FLUSH if limits.flush => Ok(Self::Flush),
            TYPE_GET_ID if chain.writable.len() < SERIAL => Err(Status::IoError),
            TYPE_GET_ID => Ok(Self::GetId),
            TYPE_DISCARD if !limits.read_only => Self::parse_discard(chain, limits),
            TYPE_WRITE_ZEROES if !limits.read_only => Self::parse_write_zeroes(chain, limits),
            _ => Err(Status::Unsupported),
        }
    }

    fn parse_discard(chain: &Chain<'_>, limits: Limits) -> Result<Self, Status> {
        let segment = Segment::read(chain)?;
        if segment.flags != 0 {
            return Err(Status::Unsupported);
        }
        let (offset, len) = segment.place(limits, MAX_DISCARD_SECTORS)?;
        Ok(Self::Discard { offset, len })
    }

    fn parse_write_zeroes(chain: &Chain<'_>, limits: Limits) -> Result<Self, Status> {
        let segment = Segment::read(chain)?;
        if segment.flags & !FLAG_UNMAP != 0 {
            return Err(Status::Unsupported);
        }
        let (offset, len) = segment.place(limits, MAX_WRITE_ZEROES_SECTORS)?;
        let may_unmap = segment.flags & FLAG_UNMAP != 0;
        Ok(Self::WriteZeroes {
            offset,
            len,
            may_unmap,
        })
    }

    /// Which bytes of the disk it reads or writes, and where the guest has them; none when it moves no data.
    pub(super) fn data<'c, 'm>(self, chain: &'c Chain<'m>) -> Option<(Range<u64>, &'c Buffers<'m>)> {
        let (offset, buffers) = match self {
            Self::Read { offset } => (offset, &chain.writable),
            Self::Write { offset } => (offset, &chain.readable),
            _ => return None,
        };
        let range = offset..offset + bytes(buffers);
        (!range.is_empty()).then_some((range, buffers))
    }

    /// The same for data that are at another place.
    pub(super) fn at(self, offset: u64) -> Self {
        match self {
            Self::Read { .. } => Self::Read { offset },
            Self::Write { .. } => Self::Write { offset },
            other => other,
        }
    }

    /// Whether it changes what is on the disk.
    pub(super) fn changes_disk(self) -> bool {
        match self {
            Self::Write { .. } | Self::Discard { .. } | Self::WriteZeroes { .. } => true,
            Self::Read { .. } | Self::Flush | Self::GetId => false,
        }
    }

    /// How many bytes of the disk it reads or writes, as a limit counts them. Zeros count: where the host cannot make them
    /// in place it writes them.
    pub(super) fn bytes(self, chain: &Chain<'_>) -> usize {
        match self {
            Self::Read { .. } => chain.writable.len(),
            Self::Write { .. } => chain.readable.len(),
            Self::WriteZeroes { len, .. } => {
                usize::try_from(len).expect("a request is checked to name few sectors")
            }
            Self::Flush | Self::GetId | Self::Discard { .. } => 0,
        }
    }
}

/// What a discard or write-zeroes request names (`struct virtio_blk_discard_write_zeroes`). The device takes one in a
/// request: a driver with more to say sends more requests, and each of them is short.
struct Segment {
    sector: u64,
    sectors: u32,
    flags: u32,
}

impl Segment {
    fn read(chain: &Chain<'_>) -> Result<Self, Status> {
        let mut bytes = [0; SEGMENT];
        if chain.readable.len() != HEADER + SEGMENT || chain.readable.read(HEADER, &mut bytes) < SEGMENT {
            return Err(Status::IoError);
        }
        let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = bytes;
        Ok(Self {
            sector: u64::from_le_bytes(sector),
            sectors: u32::from_le_bytes([n0, n1, n2, n3]),
            flags: u32::from_le_bytes([f0, f1, f2, f3]),
        })
    }

    /// Where on the disk it begins and how many bytes it has, when these are few enough and all on the disk.
    fn place(&self, limits: Limits, most: u32) -> Result<(u64, u64), Status> {
        if self.sectors > most {
            return Err(Status::IoError);
        }
        let len = u64::from(self.sectors) * SECTOR;
        Ok((limits.offset(self.sector, len)?, len))
    }
}

impl Limits {
    /// Where on the disk `len` bytes at `sector` begin, when they are whole sectors and all on it.
    fn offset(self, sector: u64, len: u64) -> Result<u64, Status> {
        let end = sector.checked_add(len / SECTOR);
        if !len.is_multiple_of(SECTOR) || end.is_none_or(|end| end > self.sectors) {
            return Err(Status::IoError);
        }
        // The disk's size in bytes came from a file, so it does not overflow.
        sector.checked_mul(SECTOR).ok_or(Status::IoError)
    }
}

fn bytes(buffers: &Buffers<'_>) -> u64 {
    u64::try_from(buffers.len()).expect("a usize fits")
}
