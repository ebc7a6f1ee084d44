//! What a test needs from the machine it runs on. What is missing fails the test, with what to do about it.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;

use crate::{Failure, Result};

/// Seen from this crate.
const WORKSPACE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// The `mayfly` binary under test.
pub fn binary() -> Result<PathBuf> {
    let release = || PathBuf::from(WORKSPACE).join("target/x86_64-unknown-linux-gnu/release/mayfly");
    let path = std::env::var_os("MAYFLY_BIN").map_or_else(release, PathBuf::from);
    let missing = || {
        Failure::new(format!(
            "no binary {}: run `make build`, or set MAYFLY_BIN",
            path.display()
        ))
    };
    path.canonicalize().map_err(|_| missing())
}

/// The `mayfly-jailer` under test.
pub(crate) fn jailer() -> Result<PathBuf> {
    let path = match std::env::var_os("MAYFLY_JAILER") {
        Some(path) => path.into(),
        None => binary()?.with_file_name("mayfly-jailer"),
    };
    let missing = || {
        Failure::new(format!(
            "no jailer {}: run `make build`, or set MAYFLY_JAILER",
            path.display()
        ))
    };
    path.canonicalize().map_err(|_| missing())
}

/// One of the files that `resources/guest/build.sh` and `tools.sh` make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestImage {
    /// The kernel as an ELF file with a PVH note.
    Vmlinux,
    /// The same kernel, compressed.
    BzImage,
    /// Busybox, virtio modules, agent.
    Initramfs,
    /// The same as a root disk.
    Rootfs,
    /// A disk of Debian's programs, see [`Guest::mount_tools`](crate::Guest::mount_tools).
    Tools,
}

impl GuestImage {
    /// Where it is.
    pub fn path(self) -> Result<PathBuf> {
        let built = || PathBuf::from(WORKSPACE).join("build/guest");
        let folder = std::env::var_os("MAYFLY_GUEST_DIR").map_or_else(built, PathBuf::from);
        let path = folder.join(match self {
            Self::Vmlinux => "vmlinux",
            Self::BzImage => "bzImage",
            Self::Initramfs => "initramfs.cpio.gz",
            Self::Rootfs => "rootfs.ext4",
            Self::Tools => "tools.ext4",
        });
        let script = if self == Self::Tools {
            "tools.sh"
        } else {
            "build.sh"
        };
        let missing = || {
            Failure::new(format!(
                "no guest image {}: run resources/guest/{script}",
                path.display()
            ))
        };
        path.canonicalize().map_err(|_| missing())
    }
}

/// Fails where no machine can be made at all.
pub(crate) fn require_kvm() -> Result {
    let hint = "load the kvm module and give this user access, or run the test by tests/lab/lab.sh";
    let opened = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    opened
        .map(drop)
        .map_err(|e| Failure::new(format!("cannot open /dev/kvm: {e}; {hint}")))
}

/// Fails where Linux guests would not run, or too slowly.
pub(crate) fn require_fast_kvm() -> Result {
    require_kvm()?;
    let cpu = std::fs::read_to_string("/proc/cpuinfo")?;
    if cpu.split_whitespace().any(|flag| flag == "vmx" || flag == "svm") {
        return Ok(());
    }
    Err(Failure::new(
        "this CPU has neither vmx nor svm: run guest tests by `tests/lab/lab.sh -- TEST_BINARY`",
    ))
}

/// Tells `make test` that one more real guest has booted.
pub(crate) fn count_guest(name: &str) -> Result {
    let Some(path) = std::env::var_os("MAYFLY_GUEST_COUNT_FILE") else {
        return Ok(());
    };
    let mut file = File::options().create(true).append(true).open(path)?;
    // One write, so that the lines of parallel tests stay whole.
    Ok(file.write_all(format!("{name}\n").as_bytes())?)
}
