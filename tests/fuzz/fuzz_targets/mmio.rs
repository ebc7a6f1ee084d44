//! Any accesses to the registers of a virtio-mmio device of any kind, in any order and width, while its queues run:
//! nothing panics, a reset always brings the device back, and a saved state always loads.
#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use devices::SharedMemory;
use devices::bus::BusDevice;
use devices::interrupt_line::EdgeLine;
use devices::testing::Inline;
use devices::virtio::mmio::{MmioVirtio, RANGE_LEN};
use devices::virtio::slot::Transport;
use libfuzzer_sys::fuzz_target;
use mayfly_fuzz::device::{self, Kind};
use mayfly_fuzz::registers::Access;
use vm_memory::{Bytes, GuestAddress};

#[derive(Arbitrary, Debug)]
enum Step {
    /// Any register.
    Any(Access),
    /// A register before the configuration space: aligned, with 32 bits, as a driver does it.
    Register(u8, u32),
    /// The next status that leads to a running device.
    Advance,
    /// The selected queue: its size, and its rings' page.
    Queue(u8, u8),
    /// Guest memory.
    Memory(u16, u64),
    /// A queue's notification.
    Kick(u8),
    /// The device's own descriptors are reported ready.
    Ready,
    /// Save, and load into a new device.
    Snapshot,
}

struct NoLine;

impl EdgeLine for NoLine {
    fn pulse(&self) {}
}

fuzz_target!(|input: (Kind, Vec<Step>)| {
    let (kind, steps) = input;
    let memory = SharedMemory::new(mayfly_fuzz::memory());
    let host = Arc::new(Inline::default());
    let make = |host: &Arc<Inline>| {
        let host = Arc::clone(host) as _;
        MmioVirtio::new(device::any(kind), Arc::new(NoLine), memory.clone(), host)
            .expect("the host has descriptors left")
    };
    let mut device = make(&host);
    for step in &steps {
        match *step {
            Step::Any(access) => any(&mut device, access),
            Step::Register(index, value) => write(&mut device, 4 * u64::from(index % 64), value),
            Step::Advance => advance(&mut device),
            Step::Queue(size, page) => queue(&mut device, size, page),
            Step::Memory(address, value) => vm_memory::GuestAddressSpace::memory(&memory)
                .write_obj(value, GuestAddress(u64::from(address)))
                .expect("16 bits of address lie in memory"),
            Step::Kick(queue) => host.event(u32::from(queue % 8)),
            Step::Ready => mayfly_fuzz::ready(&host),
            Step::Snapshot => {
                device.slot().pause();
                let state = device.save();
                device.slot().resume();
                let mut copy = make(&Arc::default());
                copy.load(state.clone()).expect("what was saved can be loaded");
                assert_eq!(copy.save(), state);
            }
        }
    }
    write(&mut device, 0x70, 0);
    assert!(host.is_empty(), "a reset stops the device");
    assert_eq!(device.slot().status(), 0);
});

fn any(device: &mut MmioVirtio, access: Access) {
    let offset = u64::from(access.offset) % RANGE_LEN;
    // Both closures need the device; only one of them runs.
    let device = std::cell::RefCell::new(device);
    access.run(
        |data| device.borrow_mut().read(offset, data),
        |data| device.borrow_mut().write(offset, data),
    );
}

fn write(device: &mut MmioVirtio, offset: u64, value: u32) {
    device.write(offset, &value.to_le_bytes());
}

/// The next step of virtio 1.2 §3.1.1.
fn advance(device: &mut MmioVirtio) {
    let status = u32::from(device.slot().status());
    match status {
        0 => write(device, 0x70, 1),
        1 => write(device, 0x70, 3),
        3 => {
            // VERSION_1 and nothing else.
            write(device, 0x24, 1);
            write(device, 0x20, 1);
            write(device, 0x70, 0xb);
        }
        _ => write(device, 0x70, status | 4),
    }
}

fn queue(device: &mut MmioVirtio, size: u8, page: u8) {
    let base = 0x1000 * u32::from(page % 64);
    for (offset, value) in [
        (0x38, 1 << (size % 10)),
        (0x80, base),
        (0x90, base + 0x400),
        (0xa0, base + 0x800),
        (0x44, 1),
    ] {
        write(device, offset, value);
    }
}
