//! [`Blocks`]: which blocks of the region are plugged. Plain arithmetic, without memory.

use std::collections::BTreeMap;
use std::ops::Range;

/// Whether blocks are plugged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockState {
    /// All of them.
    Plugged,
    /// None of them.
    Unplugged,
    /// Some of them.
    Mixed,
}

/// A set of blocks, by their index in the region. It takes memory only for slots with a plugged block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Blocks {
    blocks_per_slot: u32,
    slots: BTreeMap<u32, Slot>,
    plugged: u64,
}

/// The blocks of one slot.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Slot {
    bits: Vec<u64>,
    plugged: u32,
}

/// The blocks of a range that lie in one slot, by their index in the slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) slot: u32,
    pub(super) blocks: Range<u32>,
}

impl Blocks {
    /// No block is plugged.
    pub(super) fn new(blocks_per_slot: u32) -> Self {
        Self {
            blocks_per_slot,
            slots: BTreeMap::new(),
            plugged: 0,
        }
    }

    /// How many blocks are plugged.
    pub(super) fn plugged(&self) -> u64 {
        self.plugged
    }

    /// The slots with a plugged block.
    pub(super) fn slots(&self) -> impl Iterator<Item = u32> {
        self.slots.keys().copied()
    }

    /// Whether a block of the slot is plugged.
    pub(super) fn has_slot(&self, slot: u32) -> bool {
        self.slots.contains_key(&slot)
    }

    /// Whether no other block of the part's slot is plugged.
    pub(super) fn is_last(&self, part: &Part) -> bool {
        let plugged = self.slots.get(&part.slot).map_or(0, |slot| slot.plugged);
        plugged == part.blocks.end - part.blocks.start
    }

    /// A range, slot by slot.
    pub(super) fn parts(&self, range: Range<u64>) -> impl Iterator<Item = Part> + use<> {
        let per_slot = u64::from(self.blocks_per_slot);
        let (first, end) = (range.start / per_slot, range.end.div_ceil(per_slot));
        (first..end).map(move |slot| {
            let start = slot * per_slot;
            let inside = |block: u64| {
                let block = block.clamp(start, start + per_slot) - start;
                u32::try_from(block).expect("at most the blocks of a slot, which are a u32")
            };
            Part {
                slot: u32::try_from(slot).expect("sizes are a u32 of MiB, and slots have more than one"),
                blocks: inside(range.start)..inside(range.end),
            }
        })
    }

    /// The state of a range that is not empty.
    pub(super) fn state(&self, range: Range<u64>) -> BlockState {
        let total = range.end - range.start;
        let plugged: u64 = self.parts(range).map(|part| self.count(&part)).sum();
        match plugged {
            0 => BlockState::Unplugged,
            plugged if plugged == total => BlockState::Plugged,
            _ => BlockState::Mixed,
        }
    }

    fn count(&self, part: &Part) -> u64 {
        let Some(slot) = self.slots.get(&part.slot) else {
            return 0;
        };
        let words = words(&part.blocks);
        words
            .map(|(word, mask)| u64::from((slot.bits[word] & mask).count_ones()))
            .sum()
    }

    /// Plugs a range of which nothing is plugged.
    pub(super) fn plug(&mut self, range: Range<u64>) {
        for part in self.parts(range) {
            let len = usize::try_from(self.blocks_per_slot.div_ceil(u64::BITS)).expect("a u32 fits");
            let slot = self.slots.entry(part.slot).or_insert_with(|| Slot {
                bits: vec![0; len],
                plugged: 0,
            });
            for (word, mask) in words(&part.blocks) {
                slot.bits[word] |= mask;
            }
            let count = part.blocks.end - part.blocks.start;
            slot.plugged += count;
            self.plugged += u64::from(count);
        }
    }

    /// Unplugs a range that is plugged.
    pub(super) fn unplug(&mut self, range: Range<u64>) {
        for part in self.parts(range) {
            let Some(slot) = self.slots.get_mut(&part.slot) else {
                continue;
            };
            for (word, mask) in words(&part.blocks) {
                slot.bits[word] &= !mask;
            }
            let count = part.blocks.end - part.blocks.start;
            slot.plugged -= count;
            self.plugged -= u64::from(count);
            if slot.plugged == 0 {
                self.slots.remove(&part.slot);
            }
        }
    }

    /// Unplugs everything.
    pub(super) fn clear(&mut self) {
        self.slots.clear();
        self.plugged = 0;
    }

    /// The plugged blocks as runs: first block, and how many.
    pub(super) fn runs(&self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for (slot, Slot { bits, .. }) in &self.slots {
            let start = u64::from(*slot) * u64::from(self.blocks_per_slot);
            let is_plugged = |block: &u32| bits[*block as usize / 64] >> (block % 64) & 1 == 1;
            for block in (0..self.blocks_per_slot).filter(is_plugged) {
                let block = start + u64::from(block);
                match runs.last_mut() {
                    Some((first, count)) if *first + *count == block => *count += 1,
                    _ => runs.push((block, 1)),
                }
            }
        }
        runs
    }
}

/// The words of a bitmap that a range touches, each with a mask of its bits in the range.
fn words(range: &Range<u32>) -> impl Iterator<Item = (usize, u64)> + use<> {
    let Range { start, end } = *range;
    (start / 64..end.div_ceil(64)).map(move |word| {
        let from = start.saturating_sub(word * 64);
        let to = (end - word * 64).min(64);
        let below = |bit: u32| if bit == 64 { u64::MAX } else { (1 << bit) - 1 };
        (word as usize, below(to) & !below(from))
    })
}
