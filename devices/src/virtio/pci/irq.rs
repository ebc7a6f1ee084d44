//! [`PciIrq`]: how a virtio PCI function interrupts. Io loops raise; the transport programs the mapping.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::interrupt_line::LevelLine;
use crate::pci::{Intx, MsixVectors};
use crate::virtio::{Irq, StateError, Vector};

/// The mapping of an event without a vector (virtio 1.2 §4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;

/// ISR status bits (virtio 1.2 §4.1.4.5).
mod isr {
    pub(super) const QUEUE: u8 = 1;
    pub(super) const CONFIG: u8 = 2;
}

/// The saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    config_vector: u16,
    queue_vectors: Vec<u16>,
    isr: u8,
}

/// The interrupts of one function.
pub(super) struct PciIrq {
    pub(super) vectors: Arc<MsixVectors>,
    pub(super) intx: Intx,
    config_vector: AtomicU16,
    queue_vectors: Box<[AtomicU16]>,
    vector_count: u16,
    /// Interrupts raised; loose order, as it is only counted.
    pub(super) triggers: AtomicU64,
}

impl Irq for PciIrq {
    fn raise(&self, vector: Vector) {
        self.triggers.fetch_add(1, Ordering::Relaxed);
        let (mapping, bit) = match vector {
            Vector::Config => (Some(&self.config_vector), isr::CONFIG),
            Vector::Queue(queue) => (self.queue_vectors.get(usize::from(queue)), isr::QUEUE),
        };
        let number = mapping.map_or(NO_VECTOR, |mapping| mapping.load(Ordering::Acquire));
        // With MSI-X the status shows config changes only (virtio 1.2 §4.1.4.5.1).
        if bit == isr::QUEUE && self.intx.msix() && self.raise_msix(number) {
            return;
        }
        if self.intx.raise(bit) {
            self.raise_msix(number);
        }
    }
}

impl PciIrq {
    /// The interrupts of a function with `queues` queues: a vector for each and one for the configuration.
    pub(super) fn new(queues: u16, line: Arc<dyn LevelLine>) -> io::Result<Self> {
        let vector_count = queues + 1;
        Ok(Self {
            vectors: Arc::new(MsixVectors::new(vector_count)?),
            intx: Intx::new(line),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            vector_count,
            triggers: AtomicU64::new(0),
        })
    }

    /// The vector of config changes.
    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Acquire)
    }

    /// Maps config changes; a vector that does not exist maps to none.
    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.valid(vector), Ordering::Release);
    }

    /// The vector of a queue.
    pub(super) fn queue_vector(&self, queue: u16) -> u16 {
        self.queue_vectors
            .get(usize::from(queue))
            .map_or(NO_VECTOR, |mapping| mapping.load(Ordering::Acquire))
    }

    /// Maps a queue; a vector that does not exist maps to none.
    pub(super) fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(mapping) = self.queue_vectors.get(usize::from(queue)) {
            mapping.store(self.valid(vector), Ordering::Release);
        }
    }

    /// The driver reset the device: no mapping, nothing pending. Modes and masks are PCI's and stay.
    pub(super) fn reset(&self) {
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for mapping in &self.queue_vectors {
            mapping.store(NO_VECTOR, Ordering::Release);
        }
        self.vectors.take_pending();
        self.intx.take_isr();
    }

    /// MSI-X is off now: what it held back goes to the pin.
    pub(super) fn leave_msix(&self) {
        self.intx.set_msix(false);
        if self.vectors.take_pending() {
            self.intx.raise(isr::QUEUE);
        }
    }

    pub(super) fn save(&self) -> State {
        State {
            config_vector: self.config_vector(),
            queue_vectors: self
                .queue_vectors
                .iter()
                .map(|mapping| mapping.load(Ordering::Acquire))
                .collect(),
            isr: self.intx.isr(),
        }
    }

    /// Takes a saved state; an ISR bit asserts the pin, so the modes are loaded before.
    pub(super) fn load(&self, state: &State) -> Result<(), StateError> {
        let valid = |vector: &u16| *vector == self.valid(*vector);
        if state.queue_vectors.len() != self.queue_vectors.len()
            || !state
                .queue_vectors
                .iter()
                .chain([&state.config_vector])
                .all(valid)
            || state.isr & !(isr::QUEUE | isr::CONFIG) != 0
        {
            return Err(StateError::Inconsistent {
                kind: "virtio-pci interrupts",
                what: "they are not those of this device".into(),
            });
        }
        self.set_config_vector(state.config_vector);
        for (queue, &vector) in (0..).zip(&state.queue_vectors) {
            self.set_queue_vector(queue, vector);
        }
        self.intx.raise(state.isr);
        Ok(())
    }

    fn valid(&self, vector: u16) -> u16 {
        if vector < self.vector_count {
            vector
        } else {
            NO_VECTOR
        }
    }

    /// Raises a vector. False when it is held back and MSI-X was turned off meanwhile, so that nobody would
    /// deliver it.
    fn raise_msix(&self, vector: u16) -> bool {
        self.vectors.raise(vector) || self.intx.msix()
    }
}
