//! A virtio device of any kind, for targets that are about the registers in front of it.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use arbitrary::Arbitrary;
use devices::catalog::{DeviceConfig, Services};
use devices::testing::Ledger;
use devices::virtio::VirtioDevice;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::wire;

/// Bytes of the files behind disks and pmem devices.
const FILE_LEN: usize = 8192;

/// Which device.
#[derive(Arbitrary, Debug, Clone, Copy)]
pub enum Kind {
    /// A network card.
    Net,
    /// One with two pairs of queues.
    NetPairs,
    /// A disk with two queues; with overlapping requests or without.
    Block(bool),
    /// The entropy device.
    Entropy,
    /// A balloon with all its queues.
    Balloon,
    /// A file as memory.
    Pmem,
    /// Sockets.
    Vsock,
    /// Hotpluggable memory.
    Mem,
}

/// Makes a device. Another one that is made of the same kind takes its state, and lives beside it.
pub fn any(kind: Kind) -> Box<dyn VirtioDevice> {
    let path = new_path();
    if matches!(kind, Kind::Block(_) | Kind::Pmem) {
        fs::write(&path, [9; FILE_LEN]).expect("there is room in /dev/shm");
    }
    let config = match kind {
        Kind::Net => return Box::new(wire::card().0),
        Kind::NetPairs => return Box::new(wire::card_with_pairs().0),
        Kind::Block(overlap) => DeviceConfig::Block(parse(json!({
            "drive_id": "disk",
            "is_root_device": false,
            "path_on_host": path,
            "io_engine": if overlap { "Async" } else { "Sync" },
            "queues": 2,
        }))),
        Kind::Entropy => DeviceConfig::Entropy(parse(json!({}))),
        Kind::Balloon => DeviceConfig::Balloon(parse(json!({
            "amount_mib": 1,
            "deflate_on_oom": true,
            "stats_polling_interval_s": u16::MAX,
            "free_page_hinting": true,
            "free_page_reporting": true,
        }))),
        Kind::Pmem => DeviceConfig::Pmem(parse(json!({"id": "pmem", "path_on_host": path}))),
        Kind::Vsock => DeviceConfig::Vsock(parse(json!({"guest_cid": 3, "uds_path": path}))),
        Kind::Mem => DeviceConfig::Mem(parse(json!({
            "total_size_mib": 512,
            "block_size_mib": 8,
            "slot_size_mib": 128,
        }))),
    };
    let services = Services {
        memory: &Ledger::default(),
        mmds: None,
    };
    let device = config
        .build(&services)
        .expect("the host has what the device needs");
    // The device keeps the file; a socket it removes by itself.
    if matches!(kind, Kind::Block(_) | Kind::Pmem) {
        fs::remove_file(path).expect("the file is ours");
    }
    device
}

fn parse<T: DeserializeOwned>(config: Value) -> T {
    serde_json::from_value(config).expect("the config is valid")
}

/// A path that no device of this process has had.
fn new_path() -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("/dev/shm/mayfly-fuzz-{}-{count}", std::process::id()).into()
}
