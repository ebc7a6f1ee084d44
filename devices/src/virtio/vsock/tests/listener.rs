//! The socket's file.

use std::fs;
use std::path::Path;

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

#[test]
fn a_relative_path_is_as_long_as_it_was_written() {
    let folder = TempDir::new().unwrap();
    // The same folder, from the working directory.
    let here = std::env::current_dir().unwrap();
    let up = "../".repeat(here.components().count() - 1);
    let relative = Path::new(&up).join(folder.as_path().strip_prefix("/").unwrap());
    let len = super::super::MAX_PATH - relative.as_os_str().len() - 1 - "_80".len();
    let path = relative.join("x".repeat(len));
    let to_port = format!("{}_80", path.display());
    let mem = ram();
    let mut guest = Guest::at(&mem, folder, path.clone());
    guest.offer(1, 4096);
    let _listener = UnixListener::bind(to_port).unwrap();
    guest.send(Op::Request, Ports { host: 80, guest: 1 });
    assert_eq!(guest.control().op, Op::Response as u16);
    drop(guest.vsock);
    assert!(!path.exists());
}
