//! Changes of the requested size, and the device in its slot.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::*;
use crate::SharedMemory;
use crate::testing::Inline;
use crate::virtio::slot::status;
use crate::virtio::{VirtioSlot, feature};

#[test]
fn the_usable_region_grows_with_the_request_and_does_not_shrink_with_it() {
    let mem = testing::memory(MEMORY);
    let mut guest = Guest::new(&mem, 0);
    guest.ask(STATE, 0, 1);
    assert_eq!(guest.field(USABLE), 0);
    guest.request_size(2).unwrap();
    assert_eq!(guest.plug(511, 1), ACK);
    guest.request_size(0).unwrap();
    assert_eq!(guest.unplug(511, 1), ACK);
    assert_eq!((guest.field(USABLE), guest.field(PLUGGED)), (1024 * MIB, 0));
    assert_eq!(guest.plug(0, 1), NACK);
}

#[test]
fn a_large_region_becomes_usable_in_the_largest_pieces_of_linux() {
    let config = Config {
        total_size_mib: 6144,
        ..config()
    };
    let (mem, ledger) = (testing::memory(MEMORY), Ledger::default());
    let mut guest = Guest::new(&mem, 0);
    guest.device = config.build(&ledger).unwrap();
    for (requested, usable) in [(2, 2048), (2048, 2048), (2050, 4096), (6144, 6144)] {
        guest.request_size(requested).unwrap();
        assert_eq!(guest.device.config_space()[32..40], (usable * MIB).to_le_bytes());
    }
}

#[test]
fn a_request_out_of_range_is_refused_and_changes_nothing() {
    let mem = testing::memory(MEMORY);
    let mut guest = Guest::new(&mem, 4);
    for size in [3, 1026] {
        assert!(matches!(guest.request_size(size), Err(UpdateError::Device(_))));
    }
    assert_eq!(guest.status().requested_size_mib, 4);
}

/// A slot with the device, as a transport has it.
fn slot() -> (VirtioSlot, Arc<Recorder>) {
    let device = Box::new(config().build(&Ledger::default()).unwrap());
    let (irq, host) = (testing::recorder(), Arc::<Inline>::default());
    let memory = SharedMemory::new(testing::memory(MEMORY));
    let slot = VirtioSlot::new(device, Arc::clone(&irq) as _, memory, host as _).unwrap();
    (slot, irq)
}

fn start(slot: &mut VirtioSlot) {
    slot.set_status(status::ACKNOWLEDGE | status::DRIVER);
    slot.driver.driver_features_select = 1;
    slot.set_driver_features(u32::try_from(feature::VERSION_1 >> 32).unwrap());
    let negotiated = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
    slot.set_status(negotiated);
    slot.set_status(negotiated | status::DRIVER_OK);
}

fn requested(slot: &VirtioSlot) -> u64 {
    let mut bytes = [0; 8];
    slot.read_config(48, &mut bytes);
    u64::from_le_bytes(bytes)
}

#[test]
fn a_new_request_is_told_to_a_driver_that_is_there() {
    let (mut slot, irq) = slot();
    let refused = slot.update(json!({"requested_size_mib": 4})).unwrap_err();
    assert!(refused.to_string().contains("no running virtio-mem driver"));
    start(&mut slot);
    slot.update(json!({"requested_size_mib": 4})).unwrap();
    assert_eq!(
        (requested(&slot), irq.config.load(Ordering::Relaxed)),
        (4 * MIB, 1)
    );
    assert_eq!(slot.device_status()["requested_size_mib"], 4);
}

#[test]
fn a_reset_of_the_device_changes_nothing_about_memory() {
    let (mut slot, _irq) = slot();
    start(&mut slot);
    slot.update(json!({"requested_size_mib": 4})).unwrap();
    slot.set_status(0);
    assert_eq!(requested(&slot), 4 * MIB);
    assert_eq!(slot.device_status()["requested_size_mib"], 4);
}
