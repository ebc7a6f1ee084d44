//! Threads that devices start for calls that would keep an io loop waiting.

use std::io;
use std::sync::OnceLock;
use std::thread::{Builder, JoinHandle};

/// What such a thread does first.
type Beginning = Box<dyn Fn() + Send + Sync>;

static BEGINNING: OnceLock<Beginning> = OnceLock::new();

/// Lets every thread that a device starts from now on begin with this: the process gives up there what the thread does
/// not need. The first call counts.
pub fn begin_with(beginning: impl Fn() + Send + Sync + 'static) {
    // A process has one set of filters.
    let _ = BEGINNING.set(Box::new(beginning));
}

/// Starts a thread with a stack of so many bytes.
pub(crate) fn spawn(
    name: &str,
    stack_size: usize,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    Builder::new().name(name.into()).stack_size(stack_size).spawn(|| {
        if let Some(begin) = BEGINNING.get() {
            begin();
        }
        work();
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn a_thread_begins_with_what_it_was_told_first() {
        static STEPS: AtomicU32 = AtomicU32::new(0);
        thread_local! {
            static BEGUN: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
        }
        begin_with(|| BEGUN.set(true));
        begin_with(|| BEGUN.set(false));
        let work = || assert_eq!((BEGUN.get(), STEPS.fetch_add(1, Ordering::Relaxed)), (true, 0));
        spawn("test", 64 << 10, work).unwrap().join().unwrap();
        assert_eq!(STEPS.load(Ordering::Relaxed), 1);
    }
}
