//! What goes together in one machine, in any order of requests.

use serde_json::{Value, json};

use super::*;

fn card(vhost: bool) -> DeviceConfig {
    device(
        DeviceConfig::Net,
        json!({"iface_id": "net0", "host_dev_name": "tap0", "vhost": vhost}),
    )
}

fn drive() -> DeviceConfig {
    device(
        DeviceConfig::Block,
        json!({"drive_id": "remote", "is_root_device": false, "socket": "/socket"}),
    )
}

fn memory() -> DeviceConfig {
    device(DeviceConfig::Mem, json!({"total_size_mib": 1024}))
}

fn device<C: serde::de::DeserializeOwned>(kind: fn(C) -> DeviceConfig, config: Value) -> DeviceConfig {
    kind(serde_json::from_value(config).unwrap())
}

/// What is said to the last of these devices, and whether it is there.
fn put_all<const N: usize>(devices: [DeviceConfig; N]) -> (String, bool) {
    let mut config = VmConfig::default();
    let last = devices
        .last()
        .map(|device| (device.kind(), device.id().to_owned()));
    let results: Vec<_> = devices
        .into_iter()
        .map(|device| config.put_device(device))
        .collect();
    let (kind, id) = last.unwrap();
    let said = results.into_iter().find_map(Result::err);
    (
        said.map(|error| error.to_string()).unwrap_or_default(),
        config.device(kind, &id).is_some(),
    )
}

#[test]
fn a_card_with_vhost_and_plugged_memory_exclude_each_other() {
    let (said, is_there) = put_all([memory(), card(true)]);
    assert!(said.contains("interface 'net0' has vhost") && !is_there, "{said}");
    let (said, is_there) = put_all([card(true), memory()]);
    assert!(said.contains("interface 'net0' has vhost") && !is_there, "{said}");
    assert_eq!(
        put_all([card(true), card(false), memory()]),
        (String::new(), true)
    );
    assert_eq!(put_all([memory(), card(false)]), (String::new(), true));
}

#[test]
fn a_vhost_user_backend_and_plugged_memory_exclude_each_other() {
    let (said, is_there) = put_all([memory(), drive()]);
    assert!(
        said.contains("drive 'remote' has a vhost-user backend") && !is_there,
        "{said}"
    );
    let (said, is_there) = put_all([drive(), memory()]);
    assert!(
        said.contains("drive 'remote' has a vhost-user backend") && !is_there,
        "{said}"
    );
}
