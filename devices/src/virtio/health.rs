//! [`Health`]: whether a device has met an error that only its driver can clear, by a reset (virtio 1.2 §2.1.2).
//!
//! The slot and the lane of a device share it: the lane finds most errors, the slot shows them in the status.

use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{DeviceKind, Irq, Vector};

/// Tells whoever operates the machine why a device is broken. Called on the io thread or a vCPU thread, once until
/// the driver's reset; it must not block.
pub type Report = Box<dyn Fn(&str) + Send + Sync>;

/// The health of one device.
#[derive(Default)]
pub struct Health {
    broken: AtomicBool,
    report: OnceLock<Report>,
}

impl Health {
    /// Reports errors from now on; only the first call has an effect.
    pub(super) fn report_to(&self, report: Report) {
        // One platform owns the device.
        let _ = self.report.set(report);
    }

    /// Whether the device needs a reset.
    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// The state after a reset or a restore.
    pub(super) fn set_broken(&self, broken: bool) {
        self.broken.store(broken, Ordering::Release);
    }

    /// Marks the device, tells its driver, the log and the operator.
    pub(super) fn fail(&self, kind: DeviceKind, error: &dyn std::error::Error, irq: &dyn Irq) {
        let reason = Reason(error).to_string();
        log::warn!("{kind:?} device needs a reset by its driver: {reason}");
        self.set_broken(true);
        irq.raise(Vector::Config);
        if let Some(report) = self.report.get() {
            report(&reason);
        }
    }
}

/// An error with its cause.
struct Reason<'a>(&'a dyn std::error::Error);

impl fmt::Display for Reason<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        self.0.source().map_or(Ok(()), |cause| write!(f, ": {cause}"))
    }
}
