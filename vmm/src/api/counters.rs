//! Under which names requests are counted.

use api_server::{Method, Request};

/// The metrics group and name of a request.
pub(super) fn counter_of(request: &Request) -> Option<(&'static str, &'static str)> {
    let resource = request
        .path
        .trim_start_matches('/')
        .split('/')
        .next()
        .unwrap_or_default();
    Some(match (request.method, resource) {
        (Method::Get, "") => ("get_api_requests", "instance_info"),
        (Method::Get, "version") => ("get_api_requests", "vmm_version"),
        (Method::Get, "machine-config") => ("get_api_requests", "machine_cfg"),
        (Method::Put, "actions") => ("put_api_requests", "actions"),
        (Method::Put, "boot-source") => ("put_api_requests", "boot_source"),
        (Method::Put, "drives") => ("put_api_requests", "drive"),
        (Method::Put, "logger") => ("put_api_requests", "logger"),
        (Method::Put, "machine-config") => ("put_api_requests", "machine_cfg"),
        (Method::Put, "metrics") => ("put_api_requests", "metrics"),
        (Method::Put, "network-interfaces") => ("put_api_requests", "network"),
        (Method::Put, "serial") => ("put_api_requests", "serial"),
        (Method::Patch, "drives") => ("patch_api_requests", "drive"),
        (Method::Patch, "machine-config") => ("patch_api_requests", "machine_cfg"),
        _ => return None,
    })
}
