//! Rings that somebody else has served and does no more: which requests it has left unanswered, and how to go on.

use std::sync::atomic::Ordering;

use super::{Chain, Queue, QueueError, Ring, load_u16, load_u32};

/// What is left of a ring.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Left {
    /// The heads of the chains that are available and not used.
    pub(crate) heads: Vec<u16>,
    /// They are the last ones that were made available: whoever served the ring has answered in order.
    pub(crate) in_order: bool,
}

impl Queue {
    /// Goes on from these indexes of the available and the used ring.
    pub fn go_on_from(&mut self, available: u16, used: u16) {
        self.next_avail = available;
        self.next_used = used;
        self.signalled = used;
    }

    /// The index of the available ring from which the next chain is taken.
    pub fn next_available(&self) -> u16 {
        self.next_avail
    }
}

impl<'m> Ring<'_, 'm> {
    /// The indexes up to which the driver has made chains available and the device has used them.
    pub fn indexes(&self) -> (u16, u16) {
        let available = load_u16(&self.avail, 2, Ordering::Acquire);
        (available, load_u16(&self.used, 2, Ordering::Acquire))
    }

    /// The chains that wait for an answer. None when the rings cannot tell: they have the last chains only, one for each
    /// entry, so a chain that waits for longer than all others together have taken is not among them.
    pub(crate) fn left(&self) -> Option<Left> {
        let (available, used) = self.indexes();
        let waiting = available.wrapping_sub(used);
        let size = self.size();
        if waiting > size {
            return None;
        }
        // How often each head was made available, less how often it was used, since the oldest entry that is there.
        let mut balance = vec![0i32; usize::from(size)];
        let oldest = available.wrapping_sub(size);
        for step in 0..size {
            let at = oldest.wrapping_add(step);
            *balance.get_mut(usize::from(self.available_head(at)))? += 1;
            if step < size - waiting {
                *balance.get_mut(usize::from(self.used_head(at)))? -= 1;
            }
        }
        let last: Vec<u16> = (0..waiting)
            .map(|step| self.available_head(used.wrapping_add(step)))
            .collect();
        let heads = (0..size).filter(|head| balance[usize::from(*head)] == 1);
        let heads: Vec<u16> = heads.collect();
        let clear = balance.iter().all(|count| matches!(count, 0 | 1)) && heads.len() == last.len();
        let in_order = last.iter().all(|head| heads.contains(head));
        clear.then_some(Left { heads, in_order })
    }

    /// Looks the chain with this head up again.
    pub fn look_up(&mut self, head: u16, chain: &mut Chain<'m>) -> Result<(), QueueError> {
        chain.head = head;
        chain.readable.clear();
        chain.writable.clear();
        self.gather(chain)
    }

    fn available_head(&self, index: u16) -> u16 {
        let slot = usize::from(index & (self.size() - 1));
        load_u16(&self.avail, 4 + 2 * slot, Ordering::Relaxed)
    }

    /// Heads fit into 16 bits; what does not is none.
    fn used_head(&self, index: u16) -> u16 {
        let slot = usize::from(index & (self.size() - 1));
        u16::try_from(load_u32(&self.used, 4 + 8 * slot)).unwrap_or(u16::MAX)
    }
}
