//! The balloon's part of the route table.

use api_server::{Method, Request};
use devices::catalog::DeviceConfig;
use devices::virtio::DeviceKind;
use devices::virtio::balloon::{Patch, StartHinting};

use super::{Action, RouteError, json, patch_device, put_device};

/// What there is to see of the balloon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is named for its path")]
pub enum BalloonView {
    Config,
    Statistics,
    Hinting,
}

/// Whether the request is one of those `PATCH`es that need no body.
pub(super) fn needs_no_body(request: &Request) -> bool {
    let mut tokens = request.path.trim_start_matches('/').split('/');
    request.method == Method::Patch
        && (tokens.next(), tokens.next()) == (Some("balloon"), Some("hinting"))
        && matches!(tokens.next(), Some("start" | "stop"))
}

/// Turns a request into an action; `rest` are the parts of its path behind `balloon`.
pub(super) fn route<'a>(
    method: Method,
    mut rest: impl Iterator<Item = &'a str>,
    body: &[u8],
) -> Result<Action, RouteError> {
    let (path, part) = (rest.next().unwrap_or_default(), rest.next().unwrap_or_default());
    let unrecognized = |path: String| RouteError::Unrecognized { method, path };
    match (method, path, part) {
        (Method::Put, ..) => Ok(put_device(DeviceConfig::Balloon(json(body)?))),
        (Method::Get, "", _) => Ok(Action::GetBalloon(BalloonView::Config)),
        (Method::Get, "statistics", _) => Ok(Action::GetBalloon(BalloonView::Statistics)),
        (Method::Get, "hinting", "status") => Ok(Action::GetBalloon(BalloonView::Hinting)),
        (Method::Patch, "statistics", _) => Ok(patch(&Patch::Statistics(json(body)?))),
        (Method::Patch, "hinting", "start") => {
            let start = if body.is_empty() {
                StartHinting::default()
            } else {
                json(body)?
            };
            Ok(patch(&Patch::StartHinting(start)))
        }
        // Clients may send a body, which says nothing.
        (Method::Patch, "hinting", "stop") => Ok(patch(&Patch::StopHinting)),
        (_, "hinting", part) => Err(unrecognized(format!("/hinting/{part}"))),
        // Clients know any other path to mean the balloon itself.
        (Method::Patch, ..) => Ok(patch(&Patch::Target(json(body)?))),
        (_, path, _) => Err(unrecognized(path.into())),
    }
}

fn patch(patch: &Patch) -> Action {
    patch_device(DeviceKind::Balloon, "balloon", patch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Routed, route};

    fn request(method: Method, path: &str, body: &str) -> Result<Action, String> {
        let request = Request {
            method,
            path: path.into(),
            body: Some(body.as_bytes().to_vec()).filter(|body| !body.is_empty()),
        };
        let routed = route(&request).map_err(|error| error.to_string());
        routed.map(|Routed { action, .. }| action)
    }

    fn get(path: &str) -> Result<Action, String> {
        request(Method::Get, path, "")
    }

    fn patched(path: &str, body: &str) -> Result<Patch, String> {
        match request(Method::Patch, path, body)? {
            Action::PatchDevice { patch, .. } => serde_json::from_value(patch).map_err(|e| e.to_string()),
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn knows_what_there_is_to_see() {
        for (path, view) in [
            ("/balloon", BalloonView::Config),
            ("/balloon/", BalloonView::Config),
            ("/balloon/statistics", BalloonView::Statistics),
            ("/balloon/hinting/status", BalloonView::Hinting),
        ] {
            assert_eq!(get(path), Ok(Action::GetBalloon(view)), "{path}");
        }
        for (path, shown) in [
            ("/balloon/foo", "foo"),
            ("/balloon/hinting", "/hinting/"),
            ("/balloon/hinting/foo", "/hinting/foo"),
        ] {
            let refusal = format!("Unrecognized GET request path `{shown}`.");
            assert_eq!(get(path), Err(refusal), "{path}");
        }
    }

    #[test]
    fn hinting_needs_no_body_and_begins_with_acknowledging() {
        let start = |acknowledge_on_stop| Ok(Patch::StartHinting(StartHinting { acknowledge_on_stop }));
        assert_eq!(patched("/balloon/hinting/start", ""), start(true));
        assert_eq!(patched("/balloon/hinting/start", r#"{"x":1}"#), start(true));
        let body = r#"{"acknowledge_on_stop":false}"#;
        assert_eq!(patched("/balloon/hinting/start", body), start(false));
        assert_eq!(patched("/balloon/hinting/start", "{}"), start(true));
        assert_eq!(patched("/balloon/hinting/stop", ""), Ok(Patch::StopHinting));
        assert_eq!(patched("/balloon/hinting/stop", "{}"), Ok(Patch::StopHinting));
        let refusal = "Unrecognized PATCH request path `/hinting/foo`.";
        assert_eq!(patched("/balloon/hinting/foo", "{}"), Err(refusal.into()));
        assert_eq!(
            patched("/balloon/hinting/foo", ""),
            Err("Empty PATCH request.".into())
        );
    }

    #[test]
    fn a_patch_of_any_other_path_sets_the_target() {
        let target = patched("/balloon", r#"{"amount_mib":7}"#);
        assert!(matches!(&target, Ok(Patch::Target(patch)) if patch.amount_mib == 7));
        assert_eq!(patched("/balloon/foo", r#"{"amount_mib":7}"#), target);
        let statistics = patched("/balloon/statistics", r#"{"stats_polling_interval_s":3}"#);
        assert!(matches!(statistics, Ok(Patch::Statistics(patch)) if patch.stats_polling_interval_s == 3));
        let refusal = patched("/balloon/statistics", r#"{"amount_mib":7}"#).unwrap_err();
        assert!(refusal.contains("unknown field `amount_mib`"), "{refusal}");
    }
}
