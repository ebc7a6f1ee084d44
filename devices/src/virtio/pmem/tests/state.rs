//! Patches and saved state.

use serde_json::json;

use super::*;
use crate::virtio::{Blob, UpdateError};

fn update(patch: serde_json::Value) -> Result<(), UpdateError> {
    let mem = testing::memory(MIB);
    device().update(patch, &mut Guest::new(&mem, false).lend())
}

#[test]
fn a_patch_may_lift_limits_and_change_nothing_else() {
    update(json!({"id": "pm"})).unwrap();
    update(json!({"id": "pm", "rate_limiter": {}})).unwrap();
    let limits = json!({"id": "pm", "rate_limiter": {"ops": {"size": 1, "refill_time": 1}}});
    assert!(matches!(update(limits), Err(UpdateError::Device(_))));
    let path = json!({"id": "pm", "path_on_host": "/x"});
    assert!(matches!(update(path), Err(UpdateError::Json(_))));
}

#[test]
fn a_saved_device_is_loaded_by_one_of_the_same_size_and_kind_only() {
    let mut read_only = read_only_device();
    let mut larger = config(&file(4 * MIB)).build(&Ledger::default()).unwrap();

    device().load(device().save()).unwrap();

    let error = larger.load(device().save()).unwrap_err().to_string();
    assert!(
        error.contains("had 2097152 bytes at 0x100000000 and has 4194304"),
        "{error}"
    );
    let error = read_only.load(device().save()).unwrap_err().to_string();
    assert!(error.contains("read_only of pmem device 'pm'"), "{error}");
    assert!(device().load(Blob::new("pmem", 2, &())).is_err());
}
