//! What the user says about the balloon: [`Config`] for a new one, [`Patch`] for a live one.

use serde::{Deserialize, Serialize};

use super::{Balloon, OpenError, feature};

/// The balloon: API body, section of the config file, answer to `GET` and config in a snapshot.
///
/// The order of the fields is part of the wire format.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "struct BalloonDeviceConfig")]
pub struct Config {
    /// How much memory the guest is to hand over, in MiB.
    pub amount_mib: u32,
    /// Whether the guest takes memory back rather than ending processes for lack of it.
    pub deflate_on_oom: bool,
    /// Seconds from one set of statistics to the next. Zero is never, and cannot be changed later.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    /// Whether the guest can be asked which pages are free.
    #[serde(default)]
    pub free_page_hinting: bool,
    /// Whether the guest tells by itself which pages are free.
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// A change of a live balloon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Patch {
    /// Another target.
    Target(TargetPatch),
    /// Another interval.
    Statistics(StatisticsPatch),
    /// Ask which pages are free.
    StartHinting(StartHinting),
    /// Ask no more, and let the guest use those pages.
    StopHinting,
}

/// The body of `PATCH /balloon`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "struct BalloonUpdateConfig")]
pub struct TargetPatch {
    /// As in [`Config`].
    pub amount_mib: u32,
}

/// The body of `PATCH /balloon/statistics`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "struct BalloonUpdateStatsConfig")]
pub struct StatisticsPatch {
    /// As in [`Config`]; not zero.
    pub stats_polling_interval_s: u16,
}

/// The body of `PATCH /balloon/hinting/start`; other fields are ignored, as clients of the API expect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(expecting = "struct StartHintingCmd")]
pub struct StartHinting {
    /// Whether the guest may use the pages as soon as it has told of all. If not, it keeps them until the stop.
    #[serde(default = "acknowledge_by_default")]
    pub acknowledge_on_stop: bool,
}

fn acknowledge_by_default() -> bool {
    true
}

impl Default for StartHinting {
    fn default() -> Self {
        Self {
            acknowledge_on_stop: acknowledge_by_default(),
        }
    }
}

/// Why a change of a live balloon is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PatchError {
    /// Nobody would follow it.
    #[error("Device not activated yet. Try again when the guest has loaded its balloon driver")]
    NotActive,
    /// The guest was told at start whether there are statistics.
    #[error(
        "Statistics cannot be enabled/disabled after activation. Set stats_polling_interval_s before the start, and \
         change it to 1 or more"
    )]
    StatisticsStateChange,
    /// The guest was told at start that it will not be asked.
    #[error("Attempting to use hinting when not enabled. Set free_page_hinting before the start")]
    HintingDisabled,
}

impl Config {
    /// Takes in what a patch changes.
    pub fn patch(&mut self, patch: &Patch) {
        match patch {
            Patch::Target(target) => self.amount_mib = target.amount_mib,
            Patch::Statistics(statistics) => {
                self.stats_polling_interval_s = statistics.stats_polling_interval_s;
            }
            Patch::StartHinting(_) | Patch::StopHinting => {}
        }
    }

    /// Makes the device.
    pub fn build(&self) -> Result<Balloon, OpenError> {
        Balloon::new(self)
    }

    /// The features beyond the common ones.
    pub(super) fn features(&self) -> u64 {
        let wanted = [
            (self.stats_polling_interval_s > 0, feature::STATS_VQ),
            (self.deflate_on_oom, feature::DEFLATE_ON_OOM),
            (self.free_page_hinting, feature::FREE_PAGE_HINT),
            (self.free_page_reporting, feature::REPORTING),
        ];
        let chosen = wanted.iter().filter(|(chosen, _)| *chosen);
        chosen.map(|(_, bit)| bit).sum()
    }
}
