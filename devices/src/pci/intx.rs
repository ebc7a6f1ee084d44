//! [`Intx`]: the interrupt status of a virtio function and its level-triggered INTx pin, for guests without MSI-X.
//!
//! Io loops raise, vCPU threads read the status and change the mode, and nobody takes a lock: everything that the
//! pin's level depends on is one atomic word.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::interrupt_line::LevelLine;

/// The ISR status bits are the low byte.
const ISR: u32 = 0xff;
/// The command register's INTx disable bit is set.
const DISABLED: u32 = 1 << 8;
/// MSI-X is enabled, so the pin is out of use (PCI 3.0 §6.8.3.3).
const MSIX: u32 = 1 << 9;

/// Interrupt status and pin.
pub struct Intx {
    state: AtomicU32,
    line: Arc<dyn LevelLine>,
}

impl Intx {
    /// Nothing pending, and the wire not asserted.
    pub fn new(line: Arc<dyn LevelLine>) -> Self {
        Self {
            state: AtomicU32::new(0),
            line,
        }
    }

    /// Sets `bits` in the ISR status and asserts the pin when it may. True when MSI-X is enabled, so that the
    /// interrupt has to go there.
    pub fn raise(&self, bits: u8) -> bool {
        let bits = u32::from(bits);
        self.change(|state| state | bits) & MSIX != 0
    }

    /// Reads the ISR status, which clears it and releases the pin (virtio 1.2 §4.1.4.5).
    pub fn take_isr(&self) -> u8 {
        isr(self.change(|state| state & !ISR))
    }

    /// The ISR status, without clearing it.
    pub fn isr(&self) -> u8 {
        isr(self.state.load(Ordering::SeqCst))
    }

    /// Follows the INTx disable bit of the command register.
    pub fn set_disabled(&self, disabled: bool) {
        self.change(|state| {
            if disabled {
                state | DISABLED
            } else {
                state & !DISABLED
            }
        });
    }

    /// Follows MSI-X enable.
    pub fn set_msix(&self, enabled: bool) {
        self.change(|state| if enabled { state | MSIX } else { state & !MSIX });
    }

    /// Whether MSI-X is enabled.
    pub fn msix(&self) -> bool {
        self.state.load(Ordering::SeqCst) & MSIX != 0
    }

    /// The interrupt bit of the PCI status register (virtio 1.2 §4.1.4.5.1); INTx disable does not hide it.
    pub fn pending(&self) -> bool {
        let state = self.state.load(Ordering::SeqCst);
        state & MSIX == 0 && state & ISR != 0
    }

    /// Changes the state, brings the wire to the new level, and returns the old state.
    fn change(&self, change: impl Fn(u32) -> u32) -> u32 {
        let mut old = self.state.load(Ordering::SeqCst);
        while let Err(found) =
            self.state
                .compare_exchange_weak(old, change(old), Ordering::SeqCst, Ordering::SeqCst)
        {
            old = found;
        }
        if level(old) != level(change(old)) {
            self.settle();
        }
        old
    }

    /// Drives the wire until it shows the present level. Two threads may drive it in any order, but each looks
    /// again after driving, so the last one to drive leaves the level that the state has.
    fn settle(&self) {
        loop {
            let wanted = level(self.state.load(Ordering::SeqCst));
            self.line.set(wanted);
            if level(self.state.load(Ordering::SeqCst)) == wanted {
                return;
            }
        }
    }
}

fn level(state: u32) -> bool {
    state & ISR != 0 && state & (DISABLED | MSIX) == 0
}

fn isr(state: u32) -> u8 {
    u8::try_from(state & ISR).expect("masked to 8 bits")
}

impl Drop for Intx {
    /// A function that is gone asserts nothing: others share the wire.
    fn drop(&mut self) {
        self.line.set(false);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::thread;

    use super::*;

    #[derive(Default)]
    struct Wire(AtomicBool);

    impl LevelLine for Wire {
        fn set(&self, asserted: bool) {
            self.0.store(asserted, Ordering::SeqCst);
        }
    }

    impl Wire {
        fn asserted(&self) -> bool {
            self.0.load(Ordering::SeqCst)
        }
    }

    fn wired() -> (Arc<Wire>, Intx) {
        let wire = Arc::<Wire>::default();
        (Arc::clone(&wire), Intx::new(wire))
    }

    #[test]
    fn releases_the_wire_when_it_goes() {
        let (wire, intx) = wired();
        intx.raise(1);
        assert!(wire.asserted());
        drop(intx);
        assert!(!wire.asserted());
    }

    #[test]
    fn asserts_until_the_status_is_read() {
        let (wire, intx) = wired();
        assert!(!intx.raise(1));
        assert!(!intx.raise(2));
        assert!(wire.asserted() && intx.pending());
        assert_eq!(intx.take_isr(), 3);
        assert!(!wire.asserted() && !intx.pending());
        assert_eq!(intx.take_isr(), 0);
    }

    #[test]
    fn holds_a_disabled_interrupt_back_but_shows_it_pending() {
        let (wire, intx) = wired();
        intx.set_disabled(true);
        intx.raise(1);
        assert!(!wire.asserted() && intx.pending());
        intx.set_disabled(false);
        assert!(wire.asserted());
        intx.set_disabled(true);
        assert!(!wire.asserted());
    }

    #[test]
    fn leaves_the_pin_alone_while_msix_is_enabled() {
        let (wire, intx) = wired();
        intx.raise(1);
        intx.set_msix(true);
        assert!(!wire.asserted() && !intx.pending());
        assert!(intx.raise(2));
        intx.set_msix(false);
        assert!(wire.asserted());
        assert_eq!(intx.take_isr(), 3);
    }

    #[test]
    fn leaves_the_wire_released_after_raises_and_reads_from_two_threads() {
        let (wire, intx) = wired();
        thread::scope(|scope| {
            scope.spawn(|| {
                (0..20_000).for_each(|_| {
                    intx.raise(1);
                })
            });
            scope.spawn(|| {
                (0..20_000).for_each(|_| {
                    intx.take_isr();
                })
            });
        });
        assert_eq!(wire.asserted(), intx.pending());
        intx.take_isr();
        assert!(!wire.asserted());
    }
}
