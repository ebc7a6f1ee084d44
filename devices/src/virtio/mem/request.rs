//! The wire format of requests and responses (virtio 1.2 §5.15.6).

use super::BlockState;
use crate::virtio::{Buffers, Chain};

/// Bytes of a request.
const REQUEST_LEN: usize = 24;
/// Bytes of a response.
const RESPONSE_LEN: usize = 10;

/// A request as the driver wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) kind: Kind,
    /// Guest address of the first block.
    pub(super) address: u64,
    /// How many blocks.
    pub(super) count: u16,
}

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Plug,
    Unplug,
    UnplugAll,
    State,
}

/// What is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Response {
    /// Done.
    Ack,
    /// Done; the blocks are in this state.
    State(BlockState),
    /// Not to be done at all: more memory than requested.
    Nack,
    /// Not to be done now.
    Busy,
    /// Not a request that makes sense.
    Error,
}

impl Request {
    /// Reads a request; none when it is too short or of no known kind.
    pub(super) fn read(from: &Buffers<'_>) -> Option<Self> {
        let mut bytes = [0; REQUEST_LEN];
        if from.read(0, &mut bytes) != REQUEST_LEN {
            return None;
        }
        let [k0, k1, _, _, _, _, _, _, address @ .., c0, c1, _, _, _, _, _, _] = bytes;
        Some(Self {
            kind: match u16::from_le_bytes([k0, k1]) {
                0 => Kind::Plug,
                1 => Kind::Unplug,
                2 => Kind::UnplugAll,
                3 => Kind::State,
                _ => return None,
            },
            address: u64::from_le_bytes(address),
            count: u16::from_le_bytes([c0, c1]),
        })
    }
}

impl Response {
    /// Writes a response where the driver has room for it; returns how many bytes.
    pub(super) fn write(self, to: &Chain<'_>) -> u32 {
        let kind: u16 = match self {
            Self::Ack | Self::State(_) => 0,
            Self::Nack => 1,
            Self::Busy => 2,
            Self::Error => 3,
        };
        let state: u16 = match self {
            Self::State(BlockState::Unplugged) => 1,
            Self::State(BlockState::Mixed) => 2,
            _ => 0,
        };
        let mut bytes = [0; RESPONSE_LEN];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&state.to_le_bytes());
        u32::try_from(to.writable.write(0, &bytes)).expect("ten bytes at most")
    }

    /// Whether what was asked was done.
    pub(super) fn is_done(self) -> bool {
        matches!(self, Self::Ack | Self::State(_))
    }
}
