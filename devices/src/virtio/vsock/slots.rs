//! [`Slots`]: a bounded table whose indexes stay the same while an entry lives.

/// A table of at most `limit` entries.
#[derive(Debug)]
pub(super) struct Slots<T> {
    entries: Vec<Option<T>>,
    free: Vec<u32>,
    limit: u32,
}

impl<T> Slots<T> {
    pub(super) fn new(limit: u32) -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
            limit,
        }
    }

    /// Adds an entry; gives it back when the table is full.
    pub(super) fn insert(&mut self, entry: T) -> Result<u32, T> {
        if let Some(slot) = self.free.pop() {
            self.entries[slot as usize] = Some(entry);
            return Ok(slot);
        }
        match u32::try_from(self.entries.len()) {
            Ok(slot) if slot < self.limit => {
                self.entries.push(Some(entry));
                Ok(slot)
            }
            _ => Err(entry),
        }
    }

    pub(super) fn get_mut(&mut self, slot: u32) -> Option<&mut T> {
        self.entries.get_mut(slot as usize)?.as_mut()
    }

    /// Makes another entry of one, in the same place.
    pub(super) fn change(&mut self, slot: u32, change: impl FnOnce(T) -> T) {
        if let Some(place) = self.entries.get_mut(slot as usize) {
            *place = place.take().map(change);
        }
    }

    pub(super) fn remove(&mut self, slot: u32) -> Option<T> {
        let entry = self.entries.get_mut(slot as usize)?.take();
        if entry.is_some() {
            self.free.push(slot);
        }
        entry
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fills_up_and_uses_places_again() {
        let mut slots = Slots::new(2);
        assert_eq!((slots.insert('a'), slots.insert('b')), (Ok(0), Ok(1)));
        assert_eq!(slots.insert('c'), Err('c'));
        assert_eq!(
            (slots.remove(0), slots.remove(0), slots.remove(7)),
            (Some('a'), None, None)
        );
        assert_eq!(slots.get_mut(0), None);
        assert_eq!(slots.insert('d'), Ok(0));
        slots.change(0, |entry| entry.to_ascii_uppercase());
        assert_eq!(slots.get_mut(0), Some(&mut 'D'));
    }
}
