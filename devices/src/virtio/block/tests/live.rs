//! Changes of a live drive, and its saved state.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use super::*;
use crate::SharedMemory;
use crate::testing::Inline;
use crate::virtio::slot::status;
use crate::virtio::{StateError, UpdateError, VirtioSlot};

fn swap(image: &TempFile) -> Value {
    json!({"drive_id": "data", "path_on_host": path(image)})
}

fn update(device: &mut Block, patch: Value) -> Result<(), UpdateError> {
    let (mem, recorder) = (testing::memory(0x1000), Recorder::default());
    device.update(patch, &mut testing::io(&mem, &mut [], &recorder, feature::COMMON))
}

#[test]
fn swaps_the_image_and_its_capacity() {
    let (old, new, mem) = (image(512), image(4 * 512), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&old), Guest::new(&mem));
    update(&mut device, swap(&new)).unwrap();
    assert_eq!(device.config_space()[..8], 4u64.to_le_bytes());
    assert_eq!(
        guest.request(&mut device, IN, 3, &[writable(DATA, 512)]),
        (OK, 513)
    );
    assert_eq!(guest.bytes(DATA, 512), [4; 512]);
    guest.request(&mut device, OUT, 0, &[readable(DATA, 512)]);
    assert_eq!(content(&old), [1; 512]);
}

#[test]
fn refuses_requests_that_the_smaller_new_image_does_not_have() {
    let (old, new, mem) = (image(4 * 512), image(512), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&old), Guest::new(&mem));
    update(&mut device, swap(&new)).unwrap();
    assert_eq!(
        guest.request(&mut device, OUT, 3, &[readable(DATA, 512)]),
        (IO_ERROR, 1)
    );
    assert_eq!(content(&new).len(), 512);
}

#[test]
fn keeps_the_old_image_when_the_new_one_cannot_be_used() {
    let (old, mem) = (image(512), testing::memory(1 << 20));
    let (mut device, mut guest) = (device(&old), Guest::new(&mem));
    let error = update(&mut device, swap(&image(0))).unwrap_err();
    assert!(error.to_string().contains("less than one sector"), "{error}");
    update(
        &mut device,
        json!({"drive_id": "data", "path_on_host": "/no-such-image"}),
    )
    .unwrap_err();
    assert_eq!(
        guest.request(&mut device, IN, 0, &[writable(DATA, 512)]),
        (OK, 513)
    );
    assert_eq!(device.metrics()["update_fails"], 2);
}

#[test]
fn refuses_patches_that_say_nothing_or_too_much() {
    let mut device = device(&image(512));
    assert!(update(&mut device, json!({"drive_id": "data"})).is_err());
    assert!(matches!(
        update(&mut device, json!({"drive_id": "data", "is_read_only": true})),
        Err(UpdateError::Json(_))
    ));
}

#[test]
fn refuses_backing_files_where_a_new_drive_would_and_changes_nothing() {
    let (old, new) = (image(512), image(1024));
    let mut device = device(&old);
    let patch = json!({"drive_id": "data", "path_on_host": path(&new), "backing_files": [path(&old)]});
    let error = update(&mut device, patch).unwrap_err().to_string();
    assert!(error.contains("a raw image has no backing file"), "{error}");
    assert_eq!(device.config_space()[..8], 1u64.to_le_bytes());
}

#[test]
fn a_swapped_image_of_a_read_only_drive_stays_read_only() {
    let (old, new, mem) = (image(512), image(512), testing::memory(1 << 20));
    let (mut device, mut guest) = (read_only(&old), Guest::new(&mem));
    update(&mut device, swap(&new)).unwrap();
    assert_eq!(
        guest.request(&mut device, OUT, 0, &[readable(DATA, 512)]),
        (IO_ERROR, 1)
    );
}

#[test]
fn loads_a_state_of_the_same_image_only() {
    let (small, large) = (image(512), image(1024));
    let saved = device(&small).save();
    assert!(device(&small).load(saved.clone()).is_ok());
    let error = device(&large).load(saved.clone()).unwrap_err();
    assert!(error.to_string().contains("had 1 sectors"), "{error}");
    assert!(matches!(
        read_only(&small).load(saved),
        Err(StateError::Inconsistent { .. })
    ));
}

/// A slot whose driver has set up queue 0 from address zero and is ready.
pub(super) fn running(device: Block, mem: &GuestMemory, irq: Arc<Recorder>, host: Arc<Inline>) -> VirtioSlot {
    let shared = SharedMemory::new(mem.clone());
    let mut slot = VirtioSlot::new(Box::new(device), irq, shared, host).unwrap();
    for (half, value) in [(0, feature::EVENT_IDX | feature::INDIRECT_DESC), (1, 1)] {
        slot.driver.driver_features_select = half;
        slot.set_driver_features(u32::try_from(value).unwrap());
    }
    let ready = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
    slot.set_status(ready);
    *slot.queue_mut().unwrap() = Driver::new(mem, 0, 256).config();
    slot.set_status(ready | status::DRIVER_OK);
    slot
}

#[test]
fn the_driver_is_told_of_a_new_capacity() {
    let (mem, irq, new) = (testing::memory(1 << 20), testing::recorder(), image(1024));
    let mut slot = running(device(&image(512)), &mem, irq.clone(), Arc::default());
    slot.update(swap(&new)).unwrap();
    let mut capacity = [0; 8];
    slot.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 2);
    assert_eq!(
        (slot.config_generation(), irq.config.load(Ordering::Relaxed)),
        (1, 1)
    );
}

#[test]
fn the_lane_posts_a_notification_for_work_that_was_left() {
    let (mem, host) = (testing::memory(1 << 20), Arc::<Inline>::default());
    let slot = running(device(&image(512)), &mem, testing::recorder(), host.clone());
    let mut guest = Guest::new(&mem);
    guest.header(HEADER, GET_ID, 0);
    for _ in 0..200 {
        guest
            .driver
            .offer_indirect(0x30000, &[readable(HEADER, 16), writable(DATA, 21)]);
    }
    host.event(0);
    assert_eq!(slot.kicks()[0].read().unwrap(), 1);
    while std::iter::from_fn(|| guest.driver.used()).count() > 0 {
        host.event(0);
    }
    assert_eq!(slot.metrics()["invalid_reqs_count"], 0);
    assert_eq!(slot.metrics()["event_fails"], 0);
    assert_eq!(slot.status() & status::NEEDS_RESET, 0);
}
