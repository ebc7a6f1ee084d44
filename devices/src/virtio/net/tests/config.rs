use super::super::{Config, ConfigError, Patch};
use crate::rate_limiter::RateLimiterConfig;

fn config(json: &str) -> Config {
    serde_json::from_str(json).unwrap()
}

fn named(name: &str) -> Config {
    Config {
        host_dev_name: Some(name.into()),
        ..config(r#"{"iface_id":"eth0","host_dev_name":"tap0"}"#)
    }
}

#[test]
fn prints_every_field_in_order_with_a_lower_case_mac() {
    let config = config(r#"{"host_dev_name":"tap0","guest_mac":"AA:FC:00:00:00:01","iface_id":"eth0"}"#);
    assert_eq!(
        serde_json::to_string(&config).unwrap(),
        r#"{"iface_id":"eth0","host_dev_name":"tap0","guest_mac":"aa:fc:00:00:00:01","mtu":null,"rx_rate_limiter":null,"tx_rate_limiter":null}"#
    );
}

#[test]
fn says_that_a_mac_is_invalid() {
    for mac in [
        "",
        "aa:fc:00:00:00",
        "aa:fc:00:00:00:01:02",
        "aa:fc:00:00:00:+1",
        "aafc:00:00:00:01",
        "ag:fc:00:00:00:01",
    ] {
        let json = format!(r#"{{"iface_id":"eth0","host_dev_name":"tap0","guest_mac":"{mac}"}}"#);
        let error = serde_json::from_str::<Config>(&json).unwrap_err().to_string();
        assert!(
            error.starts_with("The provided MAC address is invalid. at line 1 column"),
            "{mac}: {error}"
        );
    }
}

#[test]
fn misses_the_tap_as_clients_expect() {
    let error = serde_json::from_str::<Config>(r#"{"iface_id":"a"}"#).unwrap_err();
    let expected = "missing field `host_dev_name` at line 1 column 16";
    assert_eq!(error.to_string(), expected);
    let error = serde_json::from_str::<Config>("null").unwrap_err().to_string();
    assert!(
        error.starts_with("invalid type: null, expected struct NetworkInterfaceConfig"),
        "{error}"
    );
    let error = serde_json::from_str::<Config>("[]").unwrap_err().to_string();
    assert!(error.starts_with("invalid length 0, expected struct"), "{error}");
    assert!(serde_json::from_str::<Config>(r#"["a","tap0",null,1500,null,null]"#).is_ok());
}

#[test]
fn takes_a_descriptor_in_place_of_a_name() {
    let config = config(r#"{"iface_id":"a","host_fd":9}"#);
    assert_eq!(config.validate(), Ok(()));
    let json = serde_json::to_string(&config).unwrap();
    assert!(
        json.starts_with(r#"{"iface_id":"a","guest_mac":null"#) && json.ends_with(r#","host_fd":9}"#),
        "{json}"
    );
    assert_eq!(serde_json::from_str::<Config>(&json).unwrap(), config);

    let both = Config {
        host_dev_name: Some("tap0".into()),
        ..config
    };
    let error = both.validate().unwrap_err().to_string();
    assert!(
        error.contains("interface 'a' has not one end on the host"),
        "{error}"
    );
}

#[test]
fn a_patch_moves_an_interface_away_from_its_descriptor() {
    let mut config = config(r#"{"iface_id":"a","host_fd":9}"#);
    let patch = r#"{"iface_id":"a","host_dev_name":"tap1"}"#;
    config.patch(serde_json::from_str(patch).unwrap()).unwrap();
    assert_eq!(
        (config.host_dev_name.as_deref(), config.host_fd),
        (Some("tap1"), None)
    );
}

#[test]
fn a_patch_as_an_array_needs_no_more_elements_than_clients_know() {
    let patch: Patch = serde_json::from_str(r#"["a",null,null]"#).unwrap();
    assert_eq!(patch, serde_json::from_str(r#"{"iface_id":"a"}"#).unwrap());
}

#[test]
fn refuses_unknown_fields_by_name() {
    let error = serde_json::from_str::<Config>(r#"{"iface_id":"a","host_dev_name":"b","x":1}"#).unwrap_err();
    assert!(error.to_string().starts_with("unknown field `x`"), "{error}");
    assert!(serde_json::from_str::<Patch>(r#"{"iface_id":"a","mtu":1}"#).is_err());
}

#[test]
fn accepts_what_the_kernel_takes_as_a_name() {
    for name in ["a", "tap0", "vm-1.eth0", "tap_é", "123456789012345"] {
        assert_eq!(named(name).validate(), Ok(()), "{name}");
    }
}

#[test]
fn refuses_what_is_no_interface_name() {
    for name in [
        "",
        ".",
        "..",
        "tap 0",
        "tap/0",
        "tap:0",
        "tap%d",
        "tap\0",
        "tap\n",
        "1234567890123456",
    ] {
        let error = named(name).validate().unwrap_err();
        assert_eq!(error, ConfigError::Name { name: name.into() });
    }
}

#[test]
fn bounds_the_mtu() {
    let with = |mtu| Config {
        mtu: Some(mtu),
        ..named("tap0")
    };
    assert_eq!(
        with(67).validate().unwrap_err().to_string(),
        "MTU 67 is out of range [68, 65535]"
    );
    assert_eq!(with(68).validate(), Ok(()));
    assert_eq!(with(65535).validate(), Ok(()));
}

#[test]
fn a_patch_changes_the_limits_it_names() {
    let limits = |size| format!(r#"{{"ops":{{"size":{size},"refill_time":1}}}}"#);
    let mut config = config(&format!(
        r#"{{"iface_id":"a","host_dev_name":"b","rx_rate_limiter":{},"tx_rate_limiter":{}}}"#,
        limits(1),
        limits(2)
    ));
    let patch = format!(r#"{{"iface_id":"a","tx_rate_limiter":{}}}"#, limits(3));
    config.patch(serde_json::from_str(&patch).unwrap()).unwrap();
    let size = |limits: Option<RateLimiterConfig>| limits.unwrap().ops.unwrap().size;
    assert_eq!(
        (size(config.rx_rate_limiter), size(config.tx_rate_limiter)),
        (1, 3)
    );
}

#[test]
fn a_patch_moves_the_interface_and_sets_its_link() {
    let mut config = named("tap0");
    let patch = r#"{"iface_id":"eth0","link_state":"down","host_dev_name":"tap1"}"#;
    config.patch(serde_json::from_str(patch).unwrap()).unwrap();
    let nothing = serde_json::from_str(r#"{"iface_id":"eth0"}"#).unwrap();
    config.patch(nothing).unwrap();
    assert_eq!(config.host_dev_name.as_deref(), Some("tap1"));
    let json = serde_json::to_string(&config).unwrap();
    assert!(
        json.ends_with(r#""tx_rate_limiter":null,"link_state":"down"}"#),
        "{json}"
    );
}

#[test]
fn a_patch_with_a_name_that_no_interface_has_changes_nothing() {
    let mut config = named("tap0");
    let patch = r#"{"iface_id":"eth0","link_state":"down","host_dev_name":"tap/1"}"#;
    let refused = config.patch(serde_json::from_str(patch).unwrap());
    assert_eq!(refused, Err(ConfigError::Name { name: "tap/1".into() }));
    assert_eq!(config, named("tap0"));
}

#[test]
fn takes_passt_in_place_of_a_tap() {
    let json = r#"{"iface_id":"a","guest_mac":null,"mtu":65520,"rx_rate_limiter":null,"tx_rate_limiter":null,"backend":"passt","socket":"/tmp/s"}"#;
    let config = config(json);
    assert_eq!(config.validate(), Ok(()));
    assert_eq!(serde_json::to_string(&config).unwrap(), json);
}

#[test]
fn refuses_two_ends_and_half_ones() {
    for rest in [
        r#""host_dev_name":"tap0","socket":"/s""#,
        r#""host_fd":3,"backend":"tap","socket":"/s""#,
        r#""backend":"passt","socket":"/s","host_dev_name":"tap0""#,
        r#""backend":"passt","socket":"/s","host_fd":3"#,
    ] {
        let config = config(&format!(r#"{{"iface_id":"a",{rest}}}"#));
        assert!(
            matches!(config.validate(), Err(ConfigError::Ends { .. })),
            "{rest}"
        );
    }
    let error = serde_json::from_str::<Config>(r#"{"iface_id":"a","backend":"passt"}"#).unwrap_err();
    assert_eq!(error.to_string(), "missing field `socket` at line 1 column 34");
}

#[test]
fn an_interface_on_passt_moves_to_no_tap() {
    let mut config = config(r#"{"iface_id":"a","backend":"passt","socket":"/s"}"#);
    let patch = serde_json::from_str(r#"{"iface_id":"a","host_dev_name":"tap1"}"#).unwrap();
    assert_eq!(config.patch(patch), Err(ConfigError::NoTap));
}

#[test]
fn vhost_is_for_taps_without_limits() {
    let json = r#"{"iface_id":"a","host_dev_name":"tap0","guest_mac":null,"mtu":null,"rx_rate_limiter":null,"tx_rate_limiter":null,"vhost":true}"#;
    let on_vhost = config(json);
    assert_eq!((on_vhost.validate(), on_vhost.has_vhost()), (Ok(()), true));
    assert_eq!(serde_json::to_string(&on_vhost).unwrap(), json);
    let limit = r#""rx_rate_limiter":{"ops":{"size":1,"refill_time":1}}"#;
    for (rest, words) in [
        (r#""backend":"passt","socket":"/s""#, "needs a tap"),
        (&format!(r#""host_fd":3,{limit}"#), "no rate limiter reaches"),
    ] {
        let config = config(&format!(r#"{{"iface_id":"a","vhost":true,{rest}}}"#));
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    let off = config(&format!(
        r#"{{"iface_id":"a","host_dev_name":"b","vhost":false,{limit}}}"#
    ));
    assert_eq!(off.validate(), Ok(()));
}

#[test]
fn an_interface_on_vhost_takes_no_limits_later_and_their_end_is_fine() {
    let patched = |limit: &str| {
        let mut config = config(r#"{"iface_id":"a","host_dev_name":"tap0","vhost":true}"#);
        let patch = format!(r#"{{"iface_id":"a","tx_rate_limiter":{limit}}}"#);
        config.patch(serde_json::from_str(&patch).unwrap())
    };
    let refused = patched(r#"{"bandwidth":{"size":1,"refill_time":1}}"#);
    assert!(matches!(refused, Err(ConfigError::VhostLimits { .. })));
    assert_eq!(patched(r#"{"bandwidth":{"size":0,"refill_time":0}}"#), Ok(()));
}

#[test]
fn several_queues_need_a_tap_by_name_and_no_vhost() {
    let of = |rest: &str| config(&format!(r#"{{"iface_id":"a",{rest}}}"#)).validate();
    for good in [
        r#""host_dev_name":"tap0","queues":1"#,
        r#""host_dev_name":"tap0","queues":16"#,
        r#""host_fd":9,"queues":1"#,
        r#""host_dev_name":"tap0","queues":1,"vhost":true"#,
        r#""host_dev_name":"tap0","queues":2,"vhost":false"#,
    ] {
        assert_eq!(of(good), Ok(()), "{good}");
    }
    for (bad, reason) in [
        (
            r#""host_dev_name":"tap0","queues":0"#,
            "interface 'a' asks for 0 queues; it must be 1 to 16",
        ),
        (
            r#""host_dev_name":"tap0","queues":17"#,
            "interface 'a' asks for 17 queues; it must be 1 to 16",
        ),
        (r#""host_fd":9,"queues":2"#, "remove queues, or host_fd"),
        (
            r#""backend":"passt","socket":"s","queues":2"#,
            "remove queues, or backend passt",
        ),
        (
            r#""host_dev_name":"tap0","queues":2,"vhost":true"#,
            "remove queues, or vhost",
        ),
    ] {
        let error = of(bad).unwrap_err().to_string();
        assert!(error.contains(reason), "{bad}: {error}");
    }
}

#[test]
fn queues_are_shown_once_set() {
    let config = config(r#"{"iface_id":"a","host_dev_name":"tap0","queues":2}"#);
    let json = serde_json::to_string(&config).unwrap();
    assert!(json.ends_with(r#""tx_rate_limiter":null,"queues":2}"#), "{json}");
    assert_eq!(serde_json::from_str::<Config>(&json).unwrap(), config);
}
