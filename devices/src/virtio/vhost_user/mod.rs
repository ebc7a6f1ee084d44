//! Disks that another process serves (vhost-user): it has the guest's memory and works on the queues by itself. Mayfly
//! sets it up, shows its configuration space, and passes its interrupts on.
//!
//! ```text
//! guest ──notification──► kick eventfd ─────────────► backend
//! guest ◄──interrupt────── io loop ◄── call eventfd ◄─┘
//! ```
//!
//! Interrupts go by the io loop, where whatever the driver has set up for them holds: masked vectors, the pin, MMIO.
//!
//! A backend may die and come back. While it is away its socket is tried again and again, and requests wait; after
//! [`GRACE`] they get I/O errors, until it is back. What it was working on when it died is done again by the next one,
//! which has to be told where to begin: by memory shared between backends when they have that, else by the rings.

mod backend;
mod block;
mod connection;
mod requests;
#[cfg(test)]
mod tests;

use std::io;
use std::time::Duration;

use serde::Serialize;

pub use block::VhostUserBlock;

/// How long requests wait for a backend that has gone.
pub const GRACE: Duration = Duration::from_secs(5);
/// How long a backend's socket is left alone after an attempt, at least.
const RETRY: Duration = Duration::from_millis(200);
/// A loop spends no more than one part in so many of its time on attempts that come to nothing.
const PATIENT: u32 = 10;

/// Counters since creation, named as Firecracker names them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Metrics {
    /// Attempts to start the queues that failed.
    pub activate_fails: u64,
    /// Failures to read the configuration space.
    pub cfg_fails: u64,
    /// How long the backend took at the last connection to agree on the protocol, in µs.
    pub init_time_us: u64,
    /// How long the backend took to start the queues last, in µs.
    pub activate_time_us: u64,
    /// How long the last look at a changed configuration space took, in µs.
    pub config_change_time_us: u64,
}

/// Why a drive with a backend could not be made.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Nobody listens.
    #[error(
        "cannot connect to the vhost-user backend at '{path}': start it first, and let this user reach its socket"
    )]
    Connect {
        /// The socket.
        path: String,
        /// Why not.
        source: io::Error,
    },
    /// The backend is no vhost-user block backend, or not such a one.
    #[error("the vhost-user backend at '{path}' cannot serve this drive")]
    Unsuitable {
        /// The socket.
        path: String,
        /// Why not.
        source: io::Error,
    },
    /// The host has no descriptor left.
    #[error("cannot make the descriptors of a vhost-user drive")]
    Host {
        /// Why not.
        source: io::Error,
    },
}
