//! What is taken and refused before there is a device.

use super::*;
use crate::virtio::mem::{ConfigError, Patch};

fn validate(total: u32, block: u32, slot: u32) -> Result<(), ConfigError> {
    let config = Config {
        total_size_mib: total,
        block_size_mib: block,
        slot_size_mib: slot,
    };
    config.validate()
}

#[test]
fn absent_sizes_have_defaults_and_are_printed_in_order() {
    let config: Config = serde_json::from_str(r#"{"total_size_mib":256}"#).unwrap();
    assert_eq!(
        serde_json::to_string(&config).unwrap(),
        r#"{"total_size_mib":256,"block_size_mib":2,"slot_size_mib":128}"#
    );
    assert!(serde_json::from_str::<Config>(r#"{"total_size_mib":256,"x":1}"#).is_err());
    assert!(serde_json::from_str::<Config>(r#"{"total_size_mib":4294967296}"#).is_err());
}

#[test]
fn sizes_must_be_made_of_each_other() {
    assert_eq!(validate(128, 2, 128), Ok(()));
    assert_eq!(validate(260, 2, 130), Ok(()));
    assert_eq!(validate(u32::MAX - 127, 128, 128), Ok(()));
    assert_eq!(validate(128, 1, 128), Err(ConfigError::SmallBlock(1)));
    assert_eq!(validate(384, 6, 384), Err(ConfigError::OddBlock(6)));
    assert_eq!(validate(128, 2, 126), Err(ConfigError::SmallSlot(126)));
    let odd_slot = ConfigError::OddSlot { slot: 132, block: 8 };
    assert_eq!(validate(132, 8, 132), Err(odd_slot));
    for total in [0, 64, 200] {
        let odd_total = ConfigError::OddTotal { total, slot: 128 };
        assert_eq!(validate(total, 2, 128), Err(odd_total));
    }
}

#[test]
fn a_request_is_whole_blocks_of_what_there_is() {
    let check = |requested_size_mib| config().check(&Patch { requested_size_mib });
    assert_eq!([check(0), check(2), check(1024)], [Ok(()), Ok(()), Ok(())]);
    for requested in [1, 1023, 1026, u32::MAX] {
        let (block, total) = (2, 1024);
        let refused = ConfigError::Requested {
            requested,
            block,
            total,
        };
        assert_eq!(check(requested), Err(refused));
    }
}

#[test]
fn the_driver_is_told_of_the_region() {
    let device = config().build(&Ledger::default()).unwrap();
    let fields: Vec<_> = device
        .config_space()
        .as_chunks::<8>()
        .0
        .iter()
        .map(|bytes| u64::from_le_bytes(*bytes))
        .collect();
    assert_eq!(fields, [2 * MIB, 0, LEDGER_START, 1024 * MIB, 0, 0, 0]);
}
