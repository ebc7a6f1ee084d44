//! `qemu-img`, which knows better than we do what a good image is.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use crate::{Failure, Result};

/// Runs `qemu-img` and returns what it prints.
pub fn qemu_img<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Result<String> {
    let mut command = Command::new("qemu-img");
    let output = command.args(args).output().map_err(|error| {
        Failure::new(format!(
            "cannot run qemu-img ({error}): install the Debian package qemu-utils"
        ))
    })?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    Err(Failure::new(format!(
        "{command:?} failed ({}):\n{text}{errors}",
        output.status
    )))
}

/// Creates a qcow2 image of `size`, or as large as its raw base.
pub fn create_qcow2(image: &Path, base: Option<&Path>, size: &str) -> Result {
    let (image, size) = (image.as_os_str(), OsStr::new(size));
    let words = ["create", "-q", "-f", "qcow2"].map(OsStr::new);
    match base {
        Some(base) => {
            let base = [
                OsStr::new("-F"),
                OsStr::new("raw"),
                OsStr::new("-b"),
                base.as_os_str(),
            ];
            qemu_img(words.into_iter().chain(base).chain([image]))?;
        }
        None => {
            qemu_img(words.into_iter().chain([image, size]))?;
        }
    }
    Ok(())
}

/// Creates a qcow2 image of a MiB that is encrypted.
pub fn create_encrypted_qcow2(image: &Path) -> Result {
    let create = || {
        let options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10";
        let words = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "--object",
            "secret,id=key,data=word",
        ];
        let words = words.into_iter().chain(["-o", options]).map(OsStr::new);
        qemu_img(words.chain([image.as_os_str(), OsStr::new("1M")])).map(drop)
    };
    // It measures how fast the processor is, and gives up when the kernel counts no time for it, as on a busy host.
    let unlucky = |failure: &Failure| failure.to_string().contains("accurate CPU usage");
    (0..20)
        .map(|_| create())
        .find(|created| !created.as_ref().is_err_and(unlucky))
        .unwrap_or_else(create)
}

/// Fails if an image is not whole. Clusters that nobody uses any more are no fault.
pub fn check_qcow2(image: &Path) -> Result {
    let output = Command::new("qemu-img").arg("check").arg(image).output()?;
    match output.status.code() {
        // 3: leaked clusters only.
        Some(0 | 3) => Ok(()),
        _ => Err(Failure::new(format!(
            "{} is damaged:\n{}{}",
            image.display(),
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        ))),
    }
}

/// All bytes of the disk in an image.
pub fn read_qcow2(image: &Path) -> Result<Vec<u8>> {
    let raw = image.with_extension("raw-copy");
    let words = ["convert", "-f", "qcow2", "-O", "raw"].map(OsStr::new);
    qemu_img(words.into_iter().chain([image.as_os_str(), raw.as_os_str()]))?;
    let bytes = std::fs::read(&raw)?;
    std::fs::remove_file(&raw)?;
    Ok(bytes)
}
