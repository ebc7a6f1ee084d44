//! What the API shows of the balloon, and refuses of its changes.

use devices::virtio::DeviceKind;
use devices::virtio::balloon::{Config, HintingStatus, Patch, StatisticsStatus};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{ControlError, Controller, State, reply};
use crate::api::{BalloonView, Reply};
use crate::config::VmConfig;
use crate::vm::Vm;

/// How the API begins refusals: of a `GET` before start and after it, and of a `PATCH`.
const CONFIG: &str = "Balloon config error";
const INTERNAL: &str = "Internal VMM error";
const UPDATE: &str = "Balloon update error";

const NONE_YET: &str = "No balloon device found. Add one with PUT /balloon";
const NONE: &str =
    "Failed perform action on device: Device not found. Add a balloon with PUT /balloon before the start";
const NO_STATISTICS: &str =
    "Balloon: Statistics are not enabled. Set stats_polling_interval_s with PUT /balloon before the start";
const NO_HINTING: &str =
    "Balloon: Hinting is not enabled. Set free_page_hinting with PUT /balloon before the start";

impl Controller {
    /// Shows the balloon.
    pub(super) fn get_balloon(&self, view: BalloonView) -> Result<Reply, ControlError> {
        match (&self.state, view) {
            (State::Configuring(config), BalloonView::Config) => Ok(reply(find(config, CONFIG, NONE_YET)?)),
            (State::Configuring(_), _) => Err(ControlError::BeforeStart),
            (State::Running(vm), BalloonView::Config) => Ok(reply(find(vm.config(), INTERNAL, NONE)?)),
            (State::Running(vm), BalloonView::Statistics) => {
                status::<StatisticsStatus>(vm, "statistics", NO_STATISTICS)
            }
            (State::Running(vm), BalloonView::Hinting) => status::<HintingStatus>(vm, "hinting", NO_HINTING),
        }
    }
}

/// Refuses a change for which there is no balloon, or too little memory.
pub(super) fn check_patch(vm: &Vm, patch: &Value) -> Result<(), ControlError> {
    find(vm.config(), UPDATE, NONE)?;
    let limit_mib = vm.config().machine_config.mem_size_mib;
    match serde_json::from_value(patch.clone()) {
        Ok(Patch::Target(target)) if u64::from(target.amount_mib) > limit_mib as u64 => {
            let what = format!("Balloon: Requested memory should be less than {limit_mib}MiB");
            Err(refusal(UPDATE, &what))
        }
        _ => Ok(()),
    }
}

fn find<'a>(config: &'a VmConfig, prefix: &'static str, none: &str) -> Result<&'a Config, ControlError> {
    config.balloon.as_ref().ok_or_else(|| refusal(prefix, none))
}

/// Shows a part of what the device tells about itself, by way of its type, as clients expect its order of keys.
fn status<T: Serialize + DeserializeOwned>(vm: &Vm, part: &str, off: &str) -> Result<Reply, ControlError> {
    find(vm.config(), INTERNAL, NONE)?;
    let status = vm.device_status(DeviceKind::Balloon, "balloon");
    let mut status = status.expect("a machine has the balloon of its config");
    let shown: Option<T> = serde_json::from_value(status[part].take()).expect("the device's own status");
    shown
        .map(|shown| reply(&shown))
        .ok_or_else(|| refusal(INTERNAL, off))
}

fn refusal(prefix: &'static str, what: &str) -> ControlError {
    ControlError::Single {
        prefix,
        what: what.into(),
    }
}
