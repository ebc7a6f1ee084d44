//! Requests of a disk whose backend is away: they are answered with an error.

use std::io;

use crate::GuestMemory;
use crate::virtio::{Chain, DeviceError, Queue, QueueError, Ring};

/// The status of a request that failed (virtio 1.2 §5.2.6).
const IO_ERROR: u8 = 1;

/// Answers the chains that a backend has left behind. Then the queue stands where nothing waits.
pub(super) fn fail_left(queue: &mut Queue, mem: &GuestMemory) -> Result<(), DeviceError> {
    let ring = queue.open(mem)?;
    let (left, (available, used)) = (ring.left().ok_or_else(unclear)?, ring.indexes());
    queue.go_on_from(available, used);
    let mut ring = queue.open(mem)?;
    let mut chain = Chain::new();
    for head in left.heads {
        ring.look_up(head, &mut chain)?;
        answer(&mut ring, &mut chain);
    }
    ring.publish();
    Ok(())
}

/// The rings do not say which requests a backend has left.
pub(super) fn unclear() -> DeviceError {
    DeviceError::Host {
        op: "tell which requests the lost vhost-user backend has left unanswered",
        source: io::ErrorKind::InvalidData.into(),
    }
}

/// Answers what waits, at most as much as the queue holds; whether there is more.
pub(super) fn fail_pending(ring: &mut Ring<'_, '_>) -> Result<bool, QueueError> {
    let mut chain = Chain::new();
    for _ in 0..ring.size() {
        if ring.pop(&mut chain)? {
            answer(ring, &mut chain);
        } else if !ring.enable_notify()? {
            ring.publish();
            return Ok(false);
        }
    }
    ring.publish();
    Ok(true)
}

fn answer<'m>(ring: &mut Ring<'_, 'm>, chain: &mut Chain<'m>) {
    let status = chain.writable.pop_byte();
    let written = u32::from(status.is_some());
    if let Some(status) = status {
        status.copy_from(&[IO_ERROR]);
    }
    ring.push(chain.head(), written);
}
