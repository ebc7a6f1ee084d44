//! Numbers that look random and are the same every time.

/// An endless run of numbers (xorshift64*).
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// The run that a seed stands for.
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// The next number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % end
    }

    /// The next number below `end`, to index with.
    pub fn index(&mut self, end: usize) -> usize {
        usize::try_from(self.below(end as u64)).unwrap()
    }
}
