//! Who may use an image at one time.

use serde_json::json;

use super::super::OpenError;
use super::*;
use crate::virtio::{LockError, UpdateError};

fn update(device: &mut Block, path: &str) -> Result<(), UpdateError> {
    let (mem, recorder) = (testing::memory(0x1000), Recorder::default());
    let patch = json!({"drive_id": "data", "path_on_host": path});
    device.update(patch, &mut testing::io(&mem, &mut [], &recorder, feature::COMMON))
}

fn open(image: &TempFile, read_only: bool) -> Result<Block, OpenError> {
    Config {
        is_read_only: Some(read_only),
        ..config(image)
    }
    .build()
}

fn is_in_use(result: Result<Block, OpenError>) -> bool {
    matches!(result, Err(OpenError::Lock(LockError::InUse { .. })))
}

#[test]
fn a_writer_has_its_image_for_itself() {
    let image = image(512);
    let writer = open(&image, false).unwrap();
    let error = open(&image, false).err().unwrap().to_string();
    assert!(error.contains(&path(&image)), "{error}");
    assert!(
        error.contains("for writing, as another device of this machine has it"),
        "{error}"
    );
    assert!(is_in_use(open(&image, true)));
    drop(writer);
    assert!(open(&image, false).is_ok());
}

#[test]
fn readers_share_an_image_and_keep_writers_out() {
    let image = image(512);
    let readers = [open(&image, true).unwrap(), open(&image, true).unwrap()];
    assert!(is_in_use(open(&image, false)));
    drop(readers);
    assert!(open(&image, false).is_ok());
}

#[test]
fn a_swap_locks_the_new_image_and_lets_the_old_one_go() {
    let (old, new) = (image(512), image(512));
    let mut device = open(&old, false).unwrap();
    update(&mut device, &path(&new)).unwrap();
    assert!(open(&old, false).is_ok() && is_in_use(open(&new, true)));
}

#[test]
fn a_swap_to_an_image_in_use_changes_nothing() {
    let (mine, other) = (image(512), image(1024));
    let (mut device, holder) = (open(&mine, false).unwrap(), open(&other, false).unwrap());
    let error = update(&mut device, &path(&other)).unwrap_err();
    assert!(error.to_string().contains("another device"), "{error}");
    assert_eq!(device.config_space()[0], 1);
    drop(holder);
    assert!(is_in_use(open(&mine, false)) && open(&other, false).is_ok());
}

#[test]
fn an_image_that_is_opened_anew_stays_locked_and_has_its_new_size() {
    let image = image(512);
    let mut device = open(&image, false).unwrap();
    for sectors in [3, 2] {
        image.as_file().set_len(sectors * 512).unwrap();
        update(&mut device, &path(&image)).unwrap();
        assert_eq!(device.config_space()[..8], sectors.to_le_bytes());
        assert!(is_in_use(open(&image, false)));
    }
    drop(device);
    assert!(open(&image, false).is_ok());
}

#[test]
fn another_file_under_the_old_name_is_locked_for_itself() {
    let (first, second) = (image(512), image(1024));
    let mut device = open(&first, false).unwrap();
    std::fs::rename(second.as_path(), first.as_path()).unwrap();
    update(&mut device, &path(&first)).unwrap();
    assert_eq!(device.config_space()[0], 2);
    assert!(is_in_use(open(&first, false)));
}
