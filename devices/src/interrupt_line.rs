//! Wires to the machine's interrupt controllers. Calls come from any thread; they do not block and take no lock that a
//! caller of a device could hold.

/// A level-triggered line.
pub trait LevelLine: Send + Sync {
    /// Drives the wire.
    fn set(&self, asserted: bool);
}

/// An edge-triggered line.
pub trait EdgeLine: Send + Sync {
    /// Raises the line and lowers it; a call that overlaps another has an edge of its own.
    fn pulse(&self);
}
