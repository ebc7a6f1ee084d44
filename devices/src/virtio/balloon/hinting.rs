//! The commands of free page hinting (virtio 1.2 §5.5.6.5).
//!
//! A run has an id, which the configuration space shows. The driver answers with that id, then with its free pages, then
//! with "stop". It keeps those pages from its system until the configuration space shows "done".

use serde::{Deserialize, Serialize};

/// Nothing is asked; from the driver: these were all.
const STOP: u32 = 0;
/// The pages that were told of can be used again.
const DONE: u32 = 1;
/// Ids of runs begin here.
const FIRST_RUN: u32 = 2;

/// Where host and guest are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Hinting {
    /// What the configuration space shows.
    host_cmd: u32,
    /// What the driver said last.
    guest_cmd: Option<u32>,
    acknowledge_on_stop: bool,
    /// The id of the last run.
    last_run: u32,
}

/// What users see of it. The order of the fields is part of the wire format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HintingStatus {
    host_cmd: u32,
    guest_cmd: Option<u32>,
}

impl Hinting {
    /// What the configuration space is to show.
    pub(super) fn host_cmd(&self) -> u32 {
        self.host_cmd
    }

    pub(super) fn status(&self) -> HintingStatus {
        HintingStatus {
            host_cmd: self.host_cmd,
            guest_cmd: self.guest_cmd,
        }
    }

    /// Begins a run, in place of one that may not have ended.
    pub(super) fn start(&mut self, acknowledge_on_stop: bool) {
        self.last_run = self.last_run.wrapping_add(1).max(FIRST_RUN);
        self.host_cmd = self.last_run;
        self.acknowledge_on_stop = acknowledge_on_stop;
    }

    /// Ends the run.
    pub(super) fn stop(&mut self) {
        self.host_cmd = DONE;
    }

    /// Takes what the driver says; true when the configuration space is to show something else then.
    pub(super) fn follow(&mut self, guest_cmd: u32) -> bool {
        let ended = guest_cmd == STOP && self.is_answered();
        self.guest_cmd = Some(guest_cmd);
        if ended && self.acknowledge_on_stop {
            self.stop();
        }
        ended && self.acknowledge_on_stop
    }

    /// Whether the pages that come now are those of the run.
    pub(super) fn is_answered(&self) -> bool {
        self.host_cmd >= FIRST_RUN && self.guest_cmd == Some(self.host_cmd)
    }

    /// Forgets the driver. Ids go on, so that a late answer is never taken for one of a new run.
    pub(super) fn reset(&mut self) {
        *self = Self {
            last_run: self.last_run,
            ..Self::default()
        };
    }
}
