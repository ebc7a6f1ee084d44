//! The service from the outside: requests and their answers, and guests that speak in frames.

pub(crate) mod client;
mod packet;
mod responder;
mod stack;

use std::sync::Arc;

use serde_json::{Value, json};

use super::{Config, ConfigError, DEFAULT_ADDRESS, Mmds, Store, Version};

fn config(rest: &str) -> Config {
    serde_json::from_str(&format!(r#"{{"network_interfaces":["eth0"]{rest}}}"#)).unwrap()
}

fn service_of(config: Config, document: Value) -> Mmds {
    let store = Store::new(1 << 20);
    store.put(document).unwrap();
    Mmds::new(config, Arc::new(store))
}

/// A service with a document of every kind of value.
pub(crate) fn service(version: Version) -> Mmds {
    let document = json!({
        "latest": {"meta-data": {"ami-id": "ami-1", "tags": {"b": "2", "a/b~c": "odd"}, "count": 3, "list": ["x"]}},
        "text": "plain",
        "empty": {},
        "nothing": null,
    });
    let config = Config {
        version,
        ..config("")
    };
    service_of(config, document)
}

fn counter(mmds: &Mmds, name: &str) -> u64 {
    serde_json::to_value(mmds.metrics()).unwrap()[name]
        .as_u64()
        .unwrap()
}

#[test]
fn a_config_has_defaults_and_prints_every_field_in_order() {
    let printed = r#"{"version":"V1","network_interfaces":["eth0"],"ipv4_address":"169.254.169.254","imds_compat":false}"#;
    assert_eq!(serde_json::to_string(&config("")).unwrap(), printed);
    assert_eq!(config(r#","ipv4_address":null"#), config(""));
    assert_eq!(serde_json::from_str::<Config>(printed).unwrap(), config(""));
}

#[test]
fn a_config_refuses_what_it_does_not_know() {
    for wrong in [
        r#"{}"#,
        r#"{"network_interfaces":["a"],"x":1}"#,
        r#"{"network_interfaces":["a"],"version":"V3"}"#,
        r#"{"network_interfaces":["a"],"ipv4_address":"169.254"}"#,
    ] {
        assert!(serde_json::from_str::<Config>(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn a_config_needs_an_interface() {
    let config = Config {
        network_interfaces: Vec::new(),
        ..config("")
    };
    assert_eq!(config.validate(), Err(ConfigError::NoInterfaces));
}

#[test]
fn the_address_is_link_local_and_not_reserved() {
    let at = |address: &str| {
        let config = Config {
            ipv4_address: address.parse().unwrap(),
            ..config("")
        };
        config.validate()
    };
    for good in ["169.254.1.0", "169.254.169.254", "169.254.254.255"] {
        assert_eq!(at(good), Ok(()), "{good}");
    }
    for bad in [
        "169.254.0.255",
        "169.254.255.0",
        "169.253.1.0",
        "170.254.1.0",
        "10.0.0.1",
    ] {
        assert_eq!(at(bad), Err(ConfigError::Address(bad.parse().unwrap())), "{bad}");
    }
}

#[test]
fn the_service_knows_its_interfaces() {
    let mmds = service(Version::V1);
    assert!(mmds.is_served_by("eth0") && !mmds.is_served_by("eth1"));
    assert_eq!(mmds.address(), DEFAULT_ADDRESS);
}
