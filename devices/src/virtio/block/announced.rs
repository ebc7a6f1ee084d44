//! [`Announcements`]: the ranges of a drive on which the kernel works by itself, by io_uring.
//!
//! Nobody waits for the end of such a request, which it may be up to the waiting thread to notice. Who does something that
//! gets on badly with it finds out here, and has another way.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Requests of all queues of a drive that are in the kernel. Clones are of the same drive.
#[derive(Debug, Clone, Default)]
pub(super) struct Announcements(Arc<Mutex<Requests>>);

#[derive(Debug, Default)]
struct Requests {
    open: BTreeMap<u64, Open>,
    next: u64,
    /// What somebody else is working on meanwhile.
    busy: Option<Range<u64>>,
}

#[derive(Debug)]
struct Open {
    range: Range<u64>,
    /// Whether somebody else worked on a part of it meanwhile.
    met: bool,
}

impl Announcements {
    /// To be held while the kernel works on a range. Never waits.
    pub(super) fn announce(&self, range: Range<u64>) -> Announced {
        let mut requests = self.requests();
        let met = requests.busy.as_ref().is_some_and(|busy| meet(busy, &range));
        let number = requests.next;
        requests.next += 1;
        requests.open.insert(number, Open { range, met });
        Announced {
            requests: self.clone(),
            number,
        }
    }

    /// The parts of a range on which the kernel does not work, in order.
    pub(super) fn rest(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let requests = self.requests();
        let open = requests.open.values().map(|open| &open.range);
        let mut open: Vec<_> = open.filter(|open| meet(open, &range)).cloned().collect();
        drop(requests);
        open.sort_unstable_by_key(|open| open.start);
        let (mut rest, mut at) = (Vec::new(), range.start);
        for open in open {
            if at < open.start {
                rest.push(at..open.start);
            }
            at = at.max(open.end);
        }
        if at < range.end {
            rest.push(at..range.end);
        }
        rest
    }

    /// Tells all requests on a part of a range, and those that come before [`Self::end`], that somebody else works on it.
    pub(super) fn begin(&self, range: Range<u64>) {
        let mut requests = self.requests();
        for open in requests.open.values_mut() {
            open.met |= meet(&open.range, &range);
        }
        requests.busy = Some(range);
    }

    /// What was begun is over.
    pub(super) fn end(&self) {
        self.requests().busy = None;
    }

    fn requests(&self) -> MutexGuard<'_, Requests> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Held for a request while it is in the kernel.
pub(super) struct Announced {
    requests: Announcements,
    number: u64,
}

impl Announced {
    /// Whether somebody else has worked on a part of the range.
    pub(super) fn has_met(&self) -> bool {
        self.requests.requests().open[&self.number].met
    }
}

impl Drop for Announced {
    fn drop(&mut self) {
        self.requests.requests().open.remove(&self.number);
    }
}

fn meet(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}
