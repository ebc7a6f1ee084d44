//! The end of a run on an image whose tables this process holds back: what the guest is told has happened must then not
//! depend on this process any more, unless the driver has flushes for that.

use std::io;

use vm_memory::VolatileSlice;

use super::Backend;
use super::device::Block;
use super::request::{Request, Status};

/// The status bytes of the requests of a run that have changed the disk; kept only for a backend that needs it.
pub(super) struct Changes<'m>(Option<Vec<VolatileSlice<'m>>>);

impl<'m> Changes<'m> {
    /// None so far.
    pub(super) fn of_run(backend: &dyn Backend) -> Self {
        Self(backend.settles_runs().then(Vec::new))
    }

    /// Takes note of a request that was carried out.
    pub(super) fn note(
        &mut self,
        request: Request,
        status_byte: VolatileSlice<'m>,
        result: &io::Result<usize>,
    ) {
        if let Some(changes) = &mut self.0
            && result.is_ok()
            && request.changes_disk()
        {
            changes.push(status_byte);
        }
    }
}

impl Block {
    /// Brings what a run did to the host. If that fails, the requests that have changed the disk have failed.
    pub(super) fn settle_run(&mut self, changes: &Changes<'_>) {
        let Some(changes) = &changes.0 else { return };
        if let Err(error) = self.backend.settle() {
            self.settle_failed(&error);
            self.metrics.execute_fails += u64::try_from(changes.len()).expect("a usize fits");
            for status_byte in changes {
                status_byte.copy_from(&[Status::IoError as u8]);
            }
        }
    }

    /// The backend keeps what the host did not take.
    pub(super) fn settle_failed(&self, error: &io::Error) {
        let serial = self.serial_text();
        log::error!("drive '{serial}': cannot write the tables of its image: {error}");
    }
}
