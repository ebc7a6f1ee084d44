//! The PCI slots: what the guest does when one was filled, is to be emptied, or was let go of.

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Device, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local, Method,
    MethodCall, Notify, OpRegion, OpRegionSpace, Scope, Store, ZERO,
};
use devices::acpi::pci_hotplug;

use super::{name, path};
use crate::x86_64::layout;

/// Notification values (ACPI 6.5 §5.6.6).
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;

/// What `_EVT` does about slots, with the pending events in `events`.
pub(super) fn on_event(events: &dyn Aml) -> impl Aml {
    let mut aml = Vec::new();
    let is_it = And::new(&ZERO, events, &layout::GED_PCI_HOTPLUG);
    let tell = MethodCall::new(path("\\_SB_.PCI0.TELL"), vec![]);
    If::new(&is_it, vec![&tell]).to_aml_bytes(&mut aml);
    Bytes(aml)
}

/// The slots with their way out, the registers, and the method that passes on what the registers say.
pub(super) fn slots(aml: &mut Vec<u8>) {
    let (port, length) = (layout::PCI_HOTPLUG_PORT, pci_hotplug::PORTS);
    let registers = [*b"CHCK", *b"REQU", *b"EJCT"].map(|register| FieldEntry::Named(register, 32));
    let region = OpRegion::new(path("SLTS"), OpRegionSpace::SystemIO, &port, &length);
    let field = Field::new(
        path("SLTS"),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        registers.to_vec(),
    );
    // Slot 0 is the host bridge.
    let numbers: Vec<u8> = (1..layout::PCI_SLOTS).collect();
    let devices: Vec<Bytes> = numbers.iter().map(|number| slot(*number)).collect();
    let tell = tell(&numbers);
    let mut children: Vec<&dyn Aml> = vec![&region, &field];
    children.extend(devices.iter().map(|device| device as &dyn Aml));
    children.push(&tell);
    Scope::new(path("\\_SB_.PCI0"), children).to_aml_bytes(aml);
}

fn slot_name(number: u8) -> String {
    format!("S{number:03}")
}

fn bit(number: u8) -> u32 {
    1 << number
}

fn slot(number: u8) -> Bytes {
    let address = u32::from(number) << 16;
    let (register, bit) = (path("EJCT"), bit(number));
    let eject = Store::new(&register, &bit);
    let mut aml = Vec::new();
    Device::new(
        path(&slot_name(number)),
        vec![
            &name("_ADR", &address),
            &name("_SUN", &number),
            &Method::new(path("_EJ0"), 1, true, vec![&eject]),
        ],
    )
    .to_aml_bytes(&mut aml);
    Bytes(aml)
}

/// Reads both registers once, as reading clears them, and notifies every slot that they name. Of a slot whose device was
/// replaced, the guest learns first that the old one is gone.
fn tell(numbers: &[u8]) -> Bytes {
    let mut body = Vec::new();
    for (register, value) in [("REQU", EJECT_REQUEST), ("CHCK", DEVICE_CHECK)] {
        Store::new(&Local(0), &path(register)).to_aml_bytes(&mut body);
        for &number in numbers {
            let (slot, bit) = (path(&slot_name(number)), bit(number));
            let is_named = And::new(&ZERO, &Local(0), &bit);
            let notify = Notify::new(&slot, &value);
            If::new(&is_named, vec![&notify]).to_aml_bytes(&mut body);
        }
    }
    let mut aml = Vec::new();
    Method::new(path("TELL"), 0, true, vec![&Bytes(body)]).to_aml_bytes(&mut aml);
    Bytes(aml)
}

/// AML that is written already.
struct Bytes(Vec<u8>);

impl Aml for Bytes {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        self.0.iter().for_each(|byte| sink.byte(*byte));
    }
}
