//! A block device of the host over a file, for the time of a test.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Failure, Result};

/// A loop device. It lets go of its file when dropped.
#[derive(Debug)]
pub struct LoopDevice(PathBuf);

impl LoopDevice {
    /// A device over `file` with logical blocks of this many bytes; needs the right to, as root has.
    pub fn new(file: &Path, block_size: u32) -> Result<Self> {
        if !Path::new("/dev/loop-control").exists() {
            // losetup says it if there is none then.
            let _ = Command::new("modprobe").arg("loop").status();
        }
        let block_size = block_size.to_string();
        let words = ["--find", "--show", "--sector-size", &block_size].map(OsStr::new);
        let path = losetup(words.into_iter().chain([file.as_os_str()]))?;
        Ok(Self(path.trim().into()))
    }

    /// Its node.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Takes over the size that its file has now.
    pub fn follow_size(&self) -> Result {
        losetup([OsStr::new("--set-capacity"), self.0.as_os_str()]).map(drop)
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if let Err(error) = losetup([OsStr::new("--detach"), self.0.as_os_str()]) {
            eprintln!("{error}");
        }
    }
}

fn losetup<'a>(args: impl IntoIterator<Item = &'a OsStr>) -> Result<String> {
    let mut command = Command::new("losetup");
    command.args(args).env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
    let output = command.output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    Err(Failure::new(format!(
        "{command:?} failed (is this root, and the loop module there?): {errors}"
    )))
}
