//! The route table: which method and path mean which [`Action`], and which [`Reply`] has which body.
//!
//! This is the only place that knows both HTTP and actions. It runs on the `api` thread, which turns untrusted bytes
//! into typed, locally checked actions; the control thread decides whether they are possible.

mod balloon;
mod call;
mod error;
mod requests;

use api_server::{Method, Request, Response, Stream};
use devices::catalog::DeviceConfig;
use devices::mmds;
use devices::virtio::{DeviceKind, block, mem, net, pmem, vsock};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::{
    BootSource, CpuConfig, LoggerConfig, MachineConfig, MachinePatch, MetricsConfig, SerialConfig, check_id,
};
use crate::controller::ControlError;
use crate::events::CONTENT_TYPE;
use crate::unplug::{Unplug, UnplugConfig};

pub use balloon::BalloonView;
pub use call::Call;
pub use error::RouteError;
pub use requests::{Endpoint, RequestMetrics};

/// What a client wants. Each is carried out once, by the controller's only `match`.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "each is named for its request")]
pub enum Action {
    GetInstance,
    GetVersion,
    GetMachineConfig,
    GetVmConfig,
    GetBalloon(BalloonView),
    GetEvents,
    GetMetrics,
    PutMachineConfig(MachineConfig),
    PatchMachineConfig(MachinePatch),
    PutCpuConfig(Box<CpuConfig>),
    PutBootSource(BootSource),
    PutDevice(Box<DeviceConfig>),
    PatchDevice {
        kind: DeviceKind,
        id: String,
        patch: Value,
    },
    GetMemoryHotplug,
    DeleteDevice {
        kind: DeviceKind,
        id: String,
        /// None without a body.
        unplug: Option<UnplugConfig>,
    },
    PutMmdsConfig(mmds::Config),
    GetMmds,
    PutMmds(Value),
    PatchMmds(Value),
    PutSerial(SerialConfig),
    PutLogger(LoggerConfig),
    PutMetrics(MetricsConfig),
    InstanceStart,
    FlushMetrics,
    SendCtrlAltDel,
    PowerButton,
    Pause,
    Resume,
}

/// A carried-out action's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// Done, nothing to say.
    Done,
    /// A JSON document.
    Json(String),
    /// A text of this media type.
    Text(&'static str, String),
    /// The stream of events.
    Events,
    /// The guest was asked to let go of a device; the answer comes when it has, or its time is over.
    Later(Unplug),
}

/// A routed request.
#[derive(Debug)]
pub struct Routed {
    /// What to do.
    pub action: Action,
    /// The answer carries `Deprecation: true`.
    pub deprecated: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ActionBody {
    action_type: ActionType,
}

#[derive(Deserialize)]
enum ActionType {
    FlushMetrics,
    InstanceStart,
    SendCtrlAltDel,
    PowerButton,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "struct Vm")]
struct VmBody {
    state: VmState,
}

#[derive(Deserialize)]
enum VmState {
    Paused,
    Resumed,
}

/// Resources that Firecracker's API has and this version does not.
const UNSUPPORTED: [&str; 1] = ["snapshot"];

/// Turns a request into an action.
pub fn route(request: &Request) -> Result<Routed, RouteError> {
    let body = checked_body(request)?;
    let mut tokens = request.path.trim_start_matches('/').split('/');
    let resource = tokens.next().unwrap_or_default();
    let id = tokens.next();
    let action = match (request.method, resource) {
        (Method::Get, "") => Action::GetInstance,
        (Method::Get, "version") => Action::GetVersion,
        (Method::Get, "machine-config") => Action::GetMachineConfig,
        (Method::Get, "events") => Action::GetEvents,
        (Method::Get, "metrics") => Action::GetMetrics,
        (Method::Get, "vm") if id == Some("config") => Action::GetVmConfig,
        (Method::Put, "machine-config") => return put_machine_config(body),
        (Method::Patch, "machine-config") => return patch_machine_config(body),
        (Method::Put, "cpu-config") => Action::PutCpuConfig(json(body)?),
        (Method::Put, "boot-source") => Action::PutBootSource(json(body)?),
        (Method::Put, "drives") => put_drive(id, body)?,
        (Method::Patch, "drives") => patch_drive(id, body)?,
        (Method::Put, "network-interfaces") => put_net(id, body)?,
        (Method::Patch, "network-interfaces") => patch_net(id, body)?,
        (Method::Delete, "drives") => delete_device(DeviceKind::Block, id, body)?,
        (Method::Delete, "network-interfaces") => delete_device(DeviceKind::Net, id, body)?,
        (Method::Delete, "pmem") => delete_device(DeviceKind::Pmem, id, body)?,
        (Method::Put, "pmem") => put_pmem(id, body)?,
        (Method::Patch, "pmem") => patch_pmem(id, body)?,
        (Method::Get, "hotplug") if id == Some("memory") => Action::GetMemoryHotplug,
        (Method::Put, "hotplug") if id == Some("memory") => put_device(DeviceConfig::Mem(json(body)?)),
        (Method::Patch, "hotplug") if id == Some("memory") => patch_memory_hotplug(body)?,
        (method @ (Method::Get | Method::Put | Method::Patch), "balloon") => {
            balloon::route(method, id.into_iter().chain(tokens), body)?
        }
        (Method::Put, "entropy") => put_device(DeviceConfig::Entropy(json(body)?)),
        (Method::Put, "vsock") => return put_vsock(body),
        (Method::Get, "mmds") => Action::GetMmds,
        (Method::Put, "mmds") => return put_mmds(id, body),
        (Method::Patch, "mmds") => Action::PatchMmds(json(body)?),
        (Method::Put, "serial") => Action::PutSerial(json(body)?),
        (Method::Put, "logger") => Action::PutLogger(json(body)?),
        (Method::Put, "metrics") => Action::PutMetrics(json(body)?),
        (Method::Put, "actions") => action(json(body)?),
        (Method::Patch, "vm") => match json::<VmBody>(body)?.state {
            VmState::Paused => Action::Pause,
            VmState::Resumed => Action::Resume,
        },
        (method, path) if UNSUPPORTED.contains(&path) => {
            return Err(RouteError::Unsupported {
                method,
                path: path.into(),
            });
        }
        (method, path) => {
            return Err(RouteError::NotFound {
                method,
                path: path.into(),
            });
        }
    };
    Ok(Routed {
        action,
        deprecated: false,
    })
}

/// The rules about bodies come before those about paths.
fn checked_body(request: &Request) -> Result<&[u8], RouteError> {
    let body = request.body.as_deref().unwrap_or_default();
    match (request.method, body.is_empty()) {
        (Method::Get, false) => Err(RouteError::Body("GET request cannot have a body.")),
        (Method::Delete, false) if !can_be_unplugged(&request.path) => {
            Err(RouteError::Body("Empty Delete request."))
        }
        (Method::Put, true) => Err(RouteError::Body("Empty PUT request.")),
        (Method::Patch, true) if !balloon::needs_no_body(request) => {
            Err(RouteError::Body("Empty PATCH request."))
        }
        _ => Ok(body),
    }
}

fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, RouteError> {
    serde_json::from_slice(body).map_err(RouteError::Json)
}

fn put_machine_config(body: &[u8]) -> Result<Routed, RouteError> {
    let config: MachineConfig = json(body)?;
    let deprecated = config.cpu_template.is_some();
    Ok(Routed {
        action: Action::PutMachineConfig(config),
        deprecated,
    })
}

fn patch_machine_config(body: &[u8]) -> Result<Routed, RouteError> {
    let patch: MachinePatch = json(body)?;
    if patch.is_empty() {
        return Err(RouteError::Body("Empty PATCH request."));
    }
    let deprecated = patch.cpu_template.is_some();
    Ok(Routed {
        action: Action::PatchMachineConfig(patch),
        deprecated,
    })
}

fn put_device(device: DeviceConfig) -> Action {
    Action::PutDevice(Box::new(device))
}

/// The patch goes by way of its type, so that it is an object even if the client sent an array.
fn patch_device(kind: DeviceKind, id: &str, patch: &impl Serialize) -> Action {
    Action::PatchDevice {
        kind,
        id: id.into(),
        patch: serde_json::to_value(patch).expect("a patch is plain data"),
    }
}

/// Whether a `DELETE` of this path may have a body.
fn can_be_unplugged(path: &str) -> bool {
    let resource = path.trim_start_matches('/').split('/').next();
    matches!(resource, Some("drives" | "network-interfaces" | "pmem"))
}

fn delete_device(kind: DeviceKind, id: Option<&str>, body: &[u8]) -> Result<Action, RouteError> {
    let id = checked_id(id)?.to_owned();
    let unplug = (!body.is_empty()).then(|| json(body)).transpose()?;
    Ok(Action::DeleteDevice { kind, id, unplug })
}

fn put_drive(id: Option<&str>, body: &[u8]) -> Result<Action, RouteError> {
    let id = checked_id(id)?;
    let config: block::Config = json(body)?;
    same_id(id, &config.drive_id)?;
    Ok(put_device(DeviceConfig::Block(config)))
}

fn patch_drive(id: Option<&str>, body: &[u8]) -> Result<Action, RouteError> {
    let id = checked_id(id)?;
    let patch: block::Patch = json(body)?;
    same_id(id, &patch.drive_id)?;
    Ok(patch_device(DeviceKind::Block, id, &patch))
}

fn put_pmem(id: Option<&str>, body: &[u8]) -> Result<Action, RouteError> {
    let id = checked_id(id)?;
    let config: pmem::Config = json(body)?;
    same_id(id, &config.id)?;
    Ok(put_device(DeviceConfig::Pmem(config)))
}

fn patch_pmem(id: Option<&str>, body: &[u8]) -> Result<Action, RouteError> {
    let id = checked_id(id)?;
    let patch: pmem::Patch = json(body)?;
    same_id(id, &patch.id)?;
    Ok(patch_device(DeviceKind::Pmem, id, &patch))
}

fn patch_memory_hotplug(body: &[u8]) -> Result<Action, RouteError> {
    let patch: mem::Patch = json(body)?;
    Ok(patch_device(DeviceKind::Mem, mem::ID, &patch))
}

fn put_net(id: Option<&str>, body: &[u8]) -> Result<Action, RouteError> {
    let id = checked_id(id)?;
    let config: net::Config = json(body)?;
    same_iface_id(id, &config.iface_id)?;
    Ok(put_device(DeviceConfig::Net(config)))
}

fn patch_net(id: Option<&str>, body: &[u8]) -> Result<Action, RouteError> {
    let id = checked_id(id)?;
    let patch: net::Patch = json(body)?;
    same_iface_id(id, &patch.iface_id)?;
    Ok(patch_device(DeviceKind::Net, id, &patch))
}

fn same_iface_id(path: &str, body: &str) -> Result<(), RouteError> {
    if path == body {
        return Ok(());
    }
    Err(RouteError::IdMismatch(format!(
        "The id from the path [{path}] does not match the id from the body [{body}]!"
    )))
}

fn put_vsock(body: &[u8]) -> Result<Routed, RouteError> {
    let config: vsock::Config = json(body)?;
    let deprecated = config.vsock_id.is_some();
    Ok(Routed {
        action: put_device(DeviceConfig::Vsock(config)),
        deprecated,
    })
}

fn put_mmds(path: Option<&str>, body: &[u8]) -> Result<Routed, RouteError> {
    let (action, deprecated) = match path {
        None | Some("") => (Action::PutMmds(json(body)?), false),
        Some("config") => {
            let config: mmds::Config = json(body)?;
            let deprecated = config.version == mmds::Version::V1;
            (Action::PutMmdsConfig(config), deprecated)
        }
        Some(path) => {
            return Err(RouteError::SubPath {
                method: Method::Put,
                path: path.into(),
            });
        }
    };
    Ok(Routed { action, deprecated })
}

fn same_id(path: &str, body: &str) -> Result<(), RouteError> {
    if path == body {
        return Ok(());
    }
    Err(RouteError::IdMismatch(
        "The id from the path does not match the id from the body!".into(),
    ))
}

fn checked_id(id: Option<&str>) -> Result<&str, RouteError> {
    let id = id.unwrap_or_default();
    check_id(id).map_err(RouteError::Id)?;
    Ok(id)
}

fn action(body: ActionBody) -> Action {
    match body.action_type {
        ActionType::FlushMetrics => Action::FlushMetrics,
        ActionType::InstanceStart => Action::InstanceStart,
        ActionType::SendCtrlAltDel => Action::SendCtrlAltDel,
        ActionType::PowerButton => Action::PowerButton,
    }
}

/// What is left to do about a request.
pub enum Rest {
    /// Nothing.
    Answered,
    /// The client listens to events.
    Stream(Stream),
    /// The client waits for a device to go.
    Wait(Unplug, Call),
}

/// Answers what was carried out, or not, if that can be done now.
pub fn answer(call: Call, result: Result<Reply, ControlError>) -> Rest {
    let response = match result {
        Ok(Reply::Done) => Response::no_content(),
        Ok(Reply::Json(body)) => Response::json(body),
        Ok(Reply::Text(kind, body)) => Response::with_content_type(kind, body),
        Ok(Reply::Events) => return Rest::Stream(call.stream(CONTENT_TYPE)),
        Ok(Reply::Later(unplug)) => return Rest::Wait(unplug, call),
        Err(error) => {
            let status = if error.is_overflow() { 413 } else { 400 };
            Response::fault(status, &crate::error::chain(&error))
        }
    };
    call.answer(response);
    Rest::Answered
}
