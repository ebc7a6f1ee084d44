//! What the tests of clients share: guest images, a folder with a `firecracker`, a network, and the sight of a guest.
//!
//! Environment: as for the other guest tests, `MAYFLY_BIN`, `MAYFLY_JAILER`, `MAYFLY_GUEST_DIR` and
//! `MAYFLY_GUEST_COUNT_FILE`.

pub mod fctools_machine;

use std::cell::Cell;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Seen from this crate.
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
/// How long a guest may take to boot or to end. Generous: an emulated host is slow.
pub const GUEST_TIMEOUT: Duration = Duration::from_secs(180);

/// The user of jailed machines.
pub const JAIL_USER: u32 = 54321;

/// The folder of one test, gone with it: the binaries `firecracker` and `jailer`, a kernel, an initramfs, a root disk, two
/// files for a second disk, one for persistent memory, and a tap that reaches the guest.
pub struct Lab {
    folder: PathBuf,
    tap: String,
    network: u8,
    counted: Cell<bool>,
}

impl Lab {
    /// Makes it; each test has a `network` of its own, 172.30.NETWORK.0/24.
    pub fn new(name: &str, network: u8) -> Self {
        let folder = std::env::temp_dir().join(format!("mayfly-{name}-{}", std::process::id()));
        fs::create_dir(&folder).expect("a new folder");
        let lab = Self {
            folder,
            tap: format!("client{network}"),
            network,
            counted: Cell::new(false),
        };
        let binary = std::env::var_os("MAYFLY_BIN").map_or_else(release_binary, PathBuf::from);
        let jailer = std::env::var_os("MAYFLY_JAILER").map(PathBuf::from);
        let jailer = jailer.unwrap_or_else(|| binary.with_file_name("mayfly-jailer"));
        // Copies, as clients make hard links, and the jailer names a jail after the program itself and not after a link.
        let files = [
            ("firecracker", binary),
            ("jailer", jailer),
            ("kernel", guest_file("vmlinux")),
            ("initramfs", guest_file("initramfs.cpio.gz")),
            ("root.ext4", guest_file("rootfs.ext4")),
        ];
        for (name, file) in files {
            fs::copy(file, lab.path(name)).expect("the release build and guest images");
        }
        for (name, mib) in [("small.img", 1), ("large.img", 3), ("pmem.img", 2)] {
            let disk = fs::File::create(lab.path(name)).expect("a new disk");
            disk.set_len(mib << 20).expect("a size");
        }
        let address = format!("172.30.{network}.1/24");
        ip(&["tuntap", "add", "dev", lab.tap(), "mode", "tap"]);
        ip(&["addr", "add", &address, "dev", lab.tap()]);
        ip(&["link", "set", lab.tap(), "up"]);
        lab
    }

    /// A file of the folder, there or not.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The tap's name.
    pub fn tap(&self) -> &str {
        &self.tap
    }

    /// The guest's address.
    pub fn guest(&self) -> String {
        format!("172.30.{}.2", self.network)
    }

    /// Boots quietly from the root disk, with an address.
    pub fn boot_args(&self) -> String {
        format!(
            "console=ttyS0 reboot=k panic=-1 quiet mayfly.ip={}/24",
            self.guest()
        )
    }

    /// Waits until the guest answers on the network; panics, with what the files named hold, when it does not.
    pub fn wait_for_guest(&self, logs: &[&str]) {
        let deadline = Instant::now() + GUEST_TIMEOUT;
        while !self.guest_answers() {
            if Instant::now() > deadline {
                let said: Vec<_> = logs
                    .iter()
                    .map(|log| fs::read_to_string(self.path(log)))
                    .collect();
                panic!("the guest does not answer: {said:#?}");
            }
        }
        self.count_guest();
    }

    /// Tells `make test` that a real guest has booted, once.
    pub fn count_guest(&self) {
        let Some(path) = std::env::var_os("MAYFLY_GUEST_COUNT_FILE") else {
            return;
        };
        if !self.counted.replace(true) {
            let file = fs::File::options().create(true).append(true).open(path);
            let line = format!("{}\n", self.tap);
            let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
            written.expect("the count of guests");
        }
    }

    /// True when the guest answers a ping within two seconds.
    pub fn guest_answers(&self) -> bool {
        let mut ping = Command::new(guest_file("busybox/bin/busybox"));
        ping.args(["ping", "-q", "-c", "1", "-W", "2", &self.guest()]);
        let status = ping.stdout(Stdio::null()).stderr(Stdio::null()).status();
        status.expect("busybox of the guest images").success()
    }

    /// Waits until there is no such file any more.
    pub fn wait_gone(&self, name: &str) {
        let deadline = Instant::now() + GUEST_TIMEOUT;
        while self.path(name).exists() {
            assert!(Instant::now() < deadline, "{name} is still there");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The values of a metric in all lines of a file.
    pub fn metric(&self, file: &str, group: &str, name: &str) -> u64 {
        let text = fs::read_to_string(self.path(file)).expect("metrics");
        let lines = text.lines().map(|line| serde_json::from_str(line).expect("JSON"));
        lines
            .filter_map(|line: serde_json::Value| line[group][name].as_u64())
            .sum()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        ip(&["link", "del", &self.tap]);
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            eprintln!("cannot remove {}: {error}", self.folder.display());
        }
    }
}

fn release_binary() -> PathBuf {
    Path::new(ROOT).join("target/x86_64-unknown-linux-gnu/release/mayfly")
}

/// One of the files that `resources/guest/build.sh` makes.
pub fn guest_file(name: &str) -> PathBuf {
    let built = || Path::new(ROOT).join("build/guest");
    std::env::var_os("MAYFLY_GUEST_DIR")
        .map_or_else(built, PathBuf::from)
        .join(name)
}

fn ip(args: &[&str]) {
    let status = Command::new("ip").args(args).status().expect("the program ip");
    assert!(status.success(), "ip {args:?} failed");
}
