//! The test harness: it runs the real `mayfly` binary and drives it and its guests through public interfaces only:
//! command line, API socket, console and files.
//!
//! ```no_run
//! # use mayfly_tests::{Drive, Result, TestVm};
//! # fn test() -> Result {
//! let vm = TestVm::new("disk").vcpus(2).drive(Drive::new("data", "/tmp/disk.img")).boot()?;
//! assert_eq!(vm.guest().check("blockdev --getsize64 /dev/vda")?, "8388608");
//! # Ok(())
//! # }
//! ```
//!
//! [`TestVm::boot`] needs the guest images of `resources/guest/build.sh` and a CPU that runs guests at speed;
//! [`TestVm::start`] with a [`TinyKernel`] needs only some `/dev/kvm`. What is missing fails the test and says what to do.
//! Every wait has a deadline, and a failure shows the console, the log and the standard error of the monitor.
//!
//! Environment: `MAYFLY_BIN` (the binary; default: the release build), `MAYFLY_JAILER` (the jailer; default: beside it), `MAYFLY_GUEST_DIR` (the images; default:
//! `build/guest`), `MAYFLY_GUEST_COUNT_FILE` (each guest that booted appends a line).

mod agent;
mod client;
mod console;
pub mod coverage;
mod cpu_time;
mod devices;
mod environment;
mod event_stream;
mod failure;
mod guest;
mod host_setting;
mod image;
pub mod isolation;
pub mod jail;
mod loop_device;
mod monitor;
mod monitor_builder;
pub mod network;
mod qemu_img;
mod scratch;
pub mod steps;
pub mod stream;
mod tap;
pub mod terminal;
mod tiny;
pub mod virtio_mmio;
mod vm;

pub use client::{Client, Response};
pub use console::Console;
pub use cpu_time::cpu_time;
pub use devices::{Drive, Net, Pmem};
pub use environment::{GuestImage, binary};
pub use event_stream::EventStream;
pub use failure::{Failure, Result};
pub use guest::{Guest, Output};
pub use host_setting::HostSetting;
pub use image::{pattern, without_pvh_note, zeros};
pub use loop_device::LoopDevice;
pub use monitor::Monitor;
pub use monitor_builder::MonitorBuilder;
pub use qemu_img::{check_qcow2, create_encrypted_qcow2, create_qcow2, qemu_img, read_qcow2};
pub use scratch::Scratch;
pub use tap::Tap;
pub use terminal::Terminal;
pub use tiny::TinyKernel;
pub use vm::{TestVm, Vm};

use std::time::{Duration, Instant};

/// How long a guest may take to boot or to answer, and a process to end. Generous: an emulated host is slow.
pub const GUEST_TIMEOUT: Duration = Duration::from_secs(120);
/// How long anything may take that involves no guest.
pub const HOST_TIMEOUT: Duration = Duration::from_secs(30);

/// Waits until `done` says so, asking again every few milliseconds.
pub fn wait_until(what: &str, timeout: Duration, mut done: impl FnMut() -> bool) -> Result {
    let deadline = Instant::now() + timeout;
    while !done() {
        if Instant::now() > deadline {
            return Err(Failure::new(format!("waited {timeout:?} in vain: {what}")));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
