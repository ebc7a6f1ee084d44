//! Accesses to the registers of a transport, as vCPUs make them.

use arbitrary::Arbitrary;

/// One access of a vCPU.
#[derive(Arbitrary, Debug, Clone, Copy)]
pub struct Access {
    /// From the start of the range; the target reduces it to the range's length.
    pub offset: u16,
    width: Width,
    /// What is written; none for a read.
    write: Option<u64>,
}

/// How many bytes an access has. KVM hands over 1 to 8.
#[derive(Arbitrary, Debug, Clone, Copy)]
enum Width {
    One,
    Two,
    Four,
    Eight,
    Any(u8),
}

impl Access {
    /// Makes the access with the functions given for a read and a write.
    pub fn run(&self, read: impl FnOnce(&mut [u8]), write: impl FnOnce(&[u8])) {
        let width = match self.width {
            Width::One => 1,
            Width::Two => 2,
            Width::Four => 4,
            Width::Eight => 8,
            Width::Any(width) => usize::from(width % 8) + 1,
        };
        match self.write {
            Some(value) => write(&value.to_le_bytes()[..width]),
            None => read(&mut [0xff; 8][..width]),
        }
    }
}
