//! The socket's file.

use std::fs;

use super::super::OpenError;
use super::*;

fn build(path: impl Into<PathBuf>) -> Result<Vsock, OpenError> {
    config(path.into()).build()
}

#[test]
fn the_file_lives_as_long_as_the_device() {
    let folder = TempDir::new().unwrap();
    let path = folder.as_path().join("v");
    let vsock = build(&path).unwrap();
    assert!(UnixStream::connect(&path).is_ok());
    drop(vsock);
    assert!(!path.exists());
    assert!(build(&path).is_ok());
}

#[test]
fn a_file_of_somebody_else_survives_the_device() {
    let folder = TempDir::new().unwrap();
    let path = folder.as_path().join("v");
    let vsock = build(&path).unwrap();
    fs::rename(&path, folder.as_path().join("moved")).unwrap();
    fs::write(&path, "precious").unwrap();
    drop(vsock);
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
}

#[test]
fn refuses_a_path_in_use_and_one_that_nobody_serves_any_more() {
    let folder = TempDir::new().unwrap();
    let path = folder.as_path().join("v");
    drop(UnixListener::bind(&path).unwrap());
    let error = build(&path).err().unwrap();
    assert!(matches!(error, OpenError::InUse { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("/v\" is in use") && text.contains("remove the file"),
        "{text}"
    );
    assert!(path.exists());
}

#[test]
fn names_the_folder_that_is_missing_or_none() {
    let folder = TempDir::new().unwrap();
    let missing = folder.as_path().join("missing");
    let error = build(missing.join("v")).err().unwrap();
    assert!(
        matches!(&error, OpenError::NoFolder { folder, .. } if *folder == missing),
        "{error}"
    );
    let file = folder.as_path().join("file");
    fs::write(&file, "").unwrap();
    let error = build(file.join("v")).err().unwrap();
    assert!(
        matches!(&error, OpenError::NoFolder { folder, .. } if *folder == file),
        "{error}"
    );
}

#[test]
fn takes_the_longest_path_that_the_kernel_takes() {
    let folder = TempDir::new().unwrap();
    let len = super::super::MAX_PATH - folder.as_path().as_os_str().len() - 1;
    assert!(build(folder.as_path().join("x".repeat(len))).is_ok());
    let error = build(folder.as_path().join("x".repeat(len + 1))).err().unwrap();
    assert!(matches!(error, OpenError::Config(_)), "{error}");
}
