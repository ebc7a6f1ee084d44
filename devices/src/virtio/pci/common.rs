//! The common configuration structure (virtio 1.2 §4.1.4.3): register decoding over a slot.

use super::irq::PciIrq;
use crate::virtio::slot::VirtioSlot;

/// Bytes of the structure without the fields of features that are not offered.
pub(super) const LEN: usize = 56;

/// Offsets of the fields that can be written.
mod field {
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 8;
    pub(super) const DRIVER_FEATURE: u64 = 12;
    pub(super) const CONFIG_MSIX_VECTOR: u64 = 16;
    pub(super) const DEVICE_STATUS: u64 = 20;
    pub(super) const QUEUE_SELECT: u64 = 22;
    pub(super) const QUEUE_SIZE: u64 = 24;
    pub(super) const QUEUE_MSIX_VECTOR: u64 = 26;
    pub(super) const QUEUE_ENABLE: u64 = 28;
    pub(super) const QUEUE_DESC: u64 = 32;
    pub(super) const QUEUE_DRIVER: u64 = 40;
    pub(super) const QUEUE_DEVICE: u64 = 48;
}

/// Reads any part of the structure; bytes behind it are zero. Reading has no side effect.
pub(super) fn read(slot: &VirtioSlot, irq: &PciIrq, offset: u64, data: &mut [u8]) {
    let bytes = image(slot, irq);
    data.fill(0);
    let start = usize::try_from(offset).unwrap_or(LEN).min(LEN);
    for (to, from) in data.iter_mut().zip(&bytes[start..]) {
        *to = *from;
    }
}

/// The structure as it stands.
fn image(slot: &VirtioSlot, irq: &PciIrq) -> [u8; LEN] {
    let queue = slot.queue().copied();
    let select = slot.driver.queue_select;
    let mut bytes = [0; LEN];
    let mut at = 0;
    let mut put = |field: &[u8]| {
        bytes[at..at + field.len()].copy_from_slice(field);
        at += field.len();
    };
    put(&slot.driver.device_features_select.to_le_bytes());
    put(&slot.device_features().to_le_bytes());
    put(&slot.driver.driver_features_select.to_le_bytes());
    put(&slot.driver_features().to_le_bytes());
    put(&irq.config_vector().to_le_bytes());
    put(&slot.queue_count().to_le_bytes());
    put(&[slot.status(), slot.config_generation()]);
    put(&select.to_le_bytes());
    put(&queue.map_or(0, |q| q.size).to_le_bytes());
    put(&irq.queue_vector(select).to_le_bytes());
    put(&queue.map_or(0, |q| u16::from(q.ready)).to_le_bytes());
    // queue_notify_off: every queue has its own address, and addresses are in the order of the queues.
    put(&queue.map_or(0, |_| select).to_le_bytes());
    put(&queue.map_or(0, |q| q.desc_table).to_le_bytes());
    put(&queue.map_or(0, |q| q.avail_ring).to_le_bytes());
    put(&queue.map_or(0, |q| q.used_ring).to_le_bytes());
    bytes
}

/// Writes a field in its own width; 64-bit fields take any part of them (virtio 1.2 §4.1.3.1 asks for halves).
/// Accesses of any other shape have no effect.
pub(super) fn write(slot: &mut VirtioSlot, irq: &PciIrq, offset: u64, data: &[u8]) {
    match *data {
        [value] if offset == field::DEVICE_STATUS => set_status(slot, irq, value),
        [a, b] if offset < field::QUEUE_DESC => write_u16(slot, irq, offset, u16::from_le_bytes([a, b])),
        [a, b, c, d] if offset < field::QUEUE_DESC => {
            write_u32(slot, offset, u32::from_le_bytes([a, b, c, d]));
        }
        _ => write_address(slot, offset, data),
    }
}

fn set_status(slot: &mut VirtioSlot, irq: &PciIrq, value: u8) {
    match value {
        0 => reset(slot, irq),
        _ => slot.set_status(value),
    }
}

pub(super) fn reset(slot: &mut VirtioSlot, irq: &PciIrq) {
    slot.reset();
    // The lane is back, so nothing raises any more.
    irq.reset();
}

fn write_u16(slot: &mut VirtioSlot, irq: &PciIrq, offset: u64, value: u16) {
    match offset {
        field::CONFIG_MSIX_VECTOR => irq.set_config_vector(value),
        field::QUEUE_SELECT => slot.driver.queue_select = value,
        field::QUEUE_MSIX_VECTOR => irq.set_queue_vector(slot.driver.queue_select, value),
        field::QUEUE_SIZE => {
            if let Some(queue) = slot.queue_mut() {
                queue.size = value;
            }
        }
        // The driver must not write zero (virtio 1.2 §4.1.4.3.2).
        field::QUEUE_ENABLE if value == 1 => {
            if let Some(queue) = slot.queue_mut() {
                queue.ready = true;
            }
        }
        _ => {}
    }
}

fn write_u32(slot: &mut VirtioSlot, offset: u64, value: u32) {
    match offset {
        field::DEVICE_FEATURE_SELECT => slot.driver.device_features_select = value,
        field::DRIVER_FEATURE_SELECT => slot.driver.driver_features_select = value,
        field::DRIVER_FEATURE => slot.set_driver_features(value),
        _ => {}
    }
}

fn write_address(slot: &mut VirtioSlot, offset: u64, data: &[u8]) {
    let Some(queue) = slot.queue_mut() else {
        return;
    };
    let (address, start) = match offset & !7 {
        field::QUEUE_DESC => (&mut queue.desc_table, field::QUEUE_DESC),
        field::QUEUE_DRIVER => (&mut queue.avail_ring, field::QUEUE_DRIVER),
        field::QUEUE_DEVICE => (&mut queue.used_ring, field::QUEUE_DEVICE),
        _ => return,
    };
    let mut bytes = address.to_le_bytes();
    let part = usize::try_from(offset - start)
        .ok()
        .and_then(|at| bytes.get_mut(at..at + data.len()));
    if let Some(part) = part {
        part.copy_from_slice(data);
        *address = u64::from_le_bytes(bytes);
    }
}
