//! What is taken and refused before there is a device.

use super::*;
use crate::virtio::LockError;
use crate::virtio::pmem::OpenError;

fn parse(json: &str) -> Result<Config, String> {
    serde_json::from_str(json).map_err(|error| error.to_string())
}

fn error(config: &Config) -> OpenError {
    config.build(&Ledger::default()).err().unwrap()
}

#[test]
fn absent_settings_have_defaults_and_are_printed_in_order() {
    let config = parse(r#"{"id":"a","path_on_host":"/x"}"#).unwrap();
    assert_eq!(
        serde_json::to_string(&config).unwrap(),
        r#"{"id":"a","path_on_host":"/x","root_device":false,"read_only":false,"rate_limiter":null}"#
    );
}

#[test]
fn required_and_unknown_fields_are_named() {
    assert!(
        parse(r#"{"id":"a"}"#)
            .unwrap_err()
            .contains("missing field `path_on_host`")
    );
    assert!(
        parse(r#"{"id":"a","path_on_host":"/x","y":1}"#)
            .unwrap_err()
            .contains("unknown field `y`")
    );
}

#[test]
fn a_patch_changes_the_limits_of_a_config() {
    let mut config = config(&file(1));
    let limits = r#"{"bandwidth":null,"ops":{"size":1,"one_time_burst":null,"refill_time":5}}"#;
    let patch =
        |limits: &str| serde_json::from_str(&format!(r#"{{"id":"pm","rate_limiter":{limits}}}"#)).unwrap();
    config.patch(&patch(limits));
    let shown = serde_json::to_string(&config).unwrap();
    assert!(
        shown.ends_with(&format!(r#""rate_limiter":{limits}}}"#)),
        "{shown}"
    );
    config.patch(&patch("null"));
    assert!(config.rate_limiter.is_some());
    config.patch(&patch(r#"{"ops":{"size":0,"refill_time":0}}"#));
    assert_eq!(config.rate_limiter, None);
}

#[test]
fn the_guest_sees_whole_granules_at_the_place_that_the_host_gave() {
    let ledger = Ledger::default();
    let whole = config(&file(4 * MIB)).build(&ledger).unwrap();
    assert_eq!(whole.config_space()[..8], (4u64 << 30).to_le_bytes());
    assert_eq!(whole.config_space()[8..], (4u64 << 20).to_le_bytes());

    let odd = config(&file(2 * MIB + 1)).build(&ledger).unwrap();
    assert_eq!(odd.config_space()[8..], (4u64 << 20).to_le_bytes());
    let mapped = ledger.account().mapped.clone();
    assert_eq!(
        mapped,
        [(4 << 20, 4 << 20, false), (4 << 20, (2 << 20) + 1, false)]
    );
}

#[test]
fn memory_goes_with_its_device() {
    let ledger = Ledger::default();
    drop(config(&file(MIB)).build(&ledger).unwrap());
    assert!(ledger.account().mapped.is_empty());
}

#[test]
fn an_empty_missing_or_foreign_file_is_refused() {
    let empty = file(0);
    assert!(matches!(error(&config(&empty)), OpenError::Empty { .. }));
    let at = |path: &str| Config {
        path_on_host: path.into(),
        ..config(&empty)
    };
    assert!(matches!(error(&at("/no/such/file")), OpenError::Open { .. }));
    assert!(matches!(error(&at("/dev/null")), OpenError::NotAFile { .. }));
    assert!(matches!(error(&at("/")), OpenError::NotAFile { .. }));
}

#[test]
fn a_host_without_room_is_named_as_the_cause() {
    let ledger = Ledger::default();
    ledger.account().refuse = true;
    let error = config(&file(MIB)).build(&ledger).err().unwrap();
    assert!(matches!(error, OpenError::Memory { .. }), "{error}");
}

#[test]
fn whoever_writes_has_the_file_until_the_device_goes() {
    let file = file(MIB);
    let writer = config(&file);
    let reader = Config {
        read_only: true,
        ..writer.clone()
    };
    let ledger = Ledger::default();
    let is_in_use = |config: &Config| {
        matches!(
            config.build(&ledger),
            Err(OpenError::Lock(LockError::InUse { .. }))
        )
    };
    let device = writer.build(&ledger).unwrap();
    assert!(is_in_use(&writer) && is_in_use(&reader));
    drop(device);
    let readers = [reader.build(&ledger).unwrap(), reader.build(&ledger).unwrap()];
    assert!(is_in_use(&writer));
    drop(readers);
    assert!(!is_in_use(&writer));
}
