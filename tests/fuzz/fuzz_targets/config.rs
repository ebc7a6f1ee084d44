//! Any text as a config file or as the body of any API request: nothing panics, and a config that is accepted means the
//! same when it is written out and read again.
//!
//! Input: one byte that chooses the request, then the body; with other requests the path comes first, up to a line feed.
#![no_main]

use api_server::{Method, Request};
use libfuzzer_sys::fuzz_target;
use vmm::api;
use vmm::config::VmConfig;

const REQUESTS: [(Method, &str); 18] = [
    (Method::Put, "/machine-config"),
    (Method::Patch, "/machine-config"),
    (Method::Put, "/boot-source"),
    (Method::Put, "/drives/a"),
    (Method::Patch, "/drives/a"),
    (Method::Put, "/network-interfaces/a"),
    (Method::Put, "/entropy"),
    (Method::Put, "/serial"),
    (Method::Put, "/logger"),
    (Method::Put, "/metrics"),
    (Method::Put, "/actions"),
    (Method::Patch, "/vm"),
    (Method::Get, "/vm/config"),
    (Method::Put, "/cpu-config"),
    (Method::Put, "/balloon"),
    (Method::Patch, "/balloon"),
    (Method::Patch, "/balloon/statistics"),
    (Method::Patch, "/balloon/hinting/start"),
];
const METHODS: [Method; 4] = [Method::Get, Method::Put, Method::Patch, Method::Delete];

fuzz_target!(|input: &[u8]| {
    let Some((&choice, rest)) = input.split_first() else {
        return;
    };
    let choice = usize::from(choice);
    if choice == 0 {
        return config_file(rest);
    }
    match REQUESTS.get(choice - 1) {
        Some(&(method, path)) => request(method, path, rest),
        None => {
            let end = rest.iter().position(|&byte| byte == b'\n').unwrap_or(rest.len());
            let path = String::from_utf8_lossy(&rest[..end]);
            request(
                METHODS[choice % 4],
                &path,
                rest.get(end + 1..).unwrap_or_default(),
            );
        }
    }
});

fn config_file(text: &[u8]) {
    let Ok(config) = serde_json::from_slice::<VmConfig>(text) else {
        return;
    };
    let written = serde_json::to_value(&config).expect("a config can be written");
    // Some sections are applied at once and not written; all else comes back as it was.
    let read: VmConfig = serde_json::from_value(written.clone()).expect("what was written can be read");
    assert_eq!(
        serde_json::to_value(&read).expect("a config can be written"),
        written
    );
    check(config);
}

/// Puts a config together as the API would; what is refused changes nothing.
fn check(config: VmConfig) {
    let devices = config.devices();
    let mut built = VmConfig::default();
    let _ = built.put_machine(config.machine_config);
    let _ = built.put_boot_source(config.boot_source);
    for device in devices {
        let before = built.clone();
        if built.put_device(device).is_err() {
            assert_eq!(built, before);
        }
    }
    assert!(built.drives.iter().filter(|drive| drive.is_root_device).count() <= 1);
}

fn request(method: Method, path: &str, body: &[u8]) {
    let body = Some(body.to_vec()).filter(|body| !body.is_empty());
    let request = Request {
        method,
        path: path.into(),
        body,
    };
    if let Err(error) = api::route(&request) {
        assert!(!error.to_string().is_empty());
    }
}
