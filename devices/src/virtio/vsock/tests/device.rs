use super::super::F_STREAM;
use super::*;
use crate::testing::Inline;
use crate::virtio::feature::COMMON;
use crate::virtio::{Blob, DeviceKind, LaneHost};

#[test]
fn shows_its_address_and_three_queues() {
    let mem = ram();
    let guest = Guest::new(&mem);
    assert_eq!(guest.vsock.config_space(), u64::from(CID).to_le_bytes());
    let info = guest.vsock.info();
    assert_eq!((info.kind, info.features), (DeviceKind::Vsock, COMMON | F_STREAM));
    assert_eq!(
        (info.kind.id(), info.queue_sizes.as_slice()),
        (19, [256; 3].as_slice())
    );
}

#[test]
fn watches_one_descriptor_from_activation_on() {
    let mem = ram();
    assert_eq!(Guest::new(&mem).recorder.watched.lock().unwrap().len(), 1);
}

#[test]
fn names_its_counters_as_clients_expect() {
    let mem = ram();
    let metrics = Guest::new(&mem).vsock.metrics();
    assert_eq!(metrics.as_object().unwrap().len(), 20);
    assert_eq!(metrics["killq_resync"], 0);
}

#[test]
fn takes_no_changes() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let mut io = testing::io(&mem, &mut guest.queues, &guest.recorder, 0);
    let error = guest.vsock.update(serde_json::json!({}), &mut io).unwrap_err();
    assert!(error.to_string().contains("takes no changes"));
}

#[test]
fn loads_what_it_saved_and_nothing_else() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    assert!(guest.vsock.load(guest.vsock.save()).is_ok());
    assert!(guest.vsock.load(Blob::new("net", 1, &[0; 0])).is_err());
    assert!(guest.vsock.load(Blob::new("vsock", 1, &[0])).is_err());
}

/// Offers an event buffer, and gives what the device made of it.
fn event(guest: &mut Guest<'_>, len: u32) -> Option<(u32, u32)> {
    guest.mem.write_obj(u32::MAX, GuestAddress(SENT)).unwrap();
    guest.event.offer(&[writable(SENT, len)]);
    guest.kick(EVENT);
    let (_, written) = guest.event.used()?;
    Some((written, guest.mem.read_obj(GuestAddress(SENT)).unwrap()))
}

#[test]
fn tells_a_restored_driver_once_that_its_connections_are_gone() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    guest.vsock.load(guest.vsock.save()).unwrap();
    assert_eq!(event(&mut guest, 4), Some((4, 0)));
    assert_eq!(guest.recorder.take_interrupts(), 1);
    assert_eq!(event(&mut guest, 4), None);
    assert_eq!(guest.recorder.take_interrupts(), 0);
}

#[test]
fn tells_a_driver_that_offers_its_event_buffer_late_or_too_short() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    guest.vsock.load(guest.vsock.save()).unwrap();
    guest.kick(EVENT);
    assert_eq!(event(&mut guest, 3).map(|(written, _)| written), Some(0));
    assert_eq!(guest.counter("ev_queue_event_fails"), 1);
    assert_eq!(event(&mut guest, 8), Some((4, 0)));
}

#[test]
fn tells_a_fresh_driver_nothing() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    assert_eq!(event(&mut guest, 4), None);
    guest.vsock.load(guest.vsock.save()).unwrap();
    guest.vsock.reset();
    assert_eq!(event(&mut guest, 4), None);
}

#[test]
fn a_reset_ends_every_connection_and_keeps_the_socket() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    let (mut by_host, _) = guest.connected();
    let (mut by_guest, ports) = guest.accepted();
    let mut silent = guest.program("");
    guest.poll();
    guest.vsock.reset();
    assert!(at_end(&mut by_host) && at_end(&mut by_guest) && at_end(&mut silent));
    assert_eq!(guest.counter("conns_removed"), 2);
    guest.send_data(ports, b"x");
    assert_eq!(guest.control().op, Op::Reset as u16);
    guest.connected();
}

#[test]
fn a_program_that_comes_before_the_driver_waits_for_it() {
    let mem = ram();
    let mut guest = Guest::new(&mem);
    guest.vsock.reset();
    let _program = guest.program("CONNECT 52\n");
    guest.call(|vsock, io| vsock.activate(io)).unwrap();
    guest.poll();
    assert_eq!(guest.control().op, Op::Request as u16);
}

#[test]
fn works_on_a_lane_with_event_indexes() {
    let mem = ram();
    let folder = TempDir::new().unwrap();
    let path = folder.as_path().join("v");
    let device = config(path.clone()).build().unwrap();
    let host = Arc::new(Inline::default());
    let recorder = testing::recorder();
    let mut drivers = [0x1000, 0x1_0000, 0x2_0000].map(|base| Driver::new(&mem, base, SIZE));
    let mut slot = crate::virtio::VirtioSlot::new(
        Box::new(device),
        recorder.clone(),
        crate::SharedMemory::new(mem.clone()),
        Arc::clone(&host) as Arc<dyn LaneHost>,
    )
    .unwrap();
    slot.set_status(3);
    slot.driver.device_features_select = 1;
    slot.driver.driver_features_select = 0;
    slot.set_driver_features(1 << 29);
    slot.driver.driver_features_select = 1;
    slot.set_driver_features(1);
    slot.set_status(11);
    for (index, driver) in (0u16..).zip(&drivers) {
        slot.driver.queue_select = index;
        *slot.queue_mut().unwrap() = driver.config();
    }
    slot.set_status(15);
    let mut program = UnixStream::connect(&path).unwrap();
    program.write_all(b"CONNECT 52\n").unwrap();
    let muxer = 1 << 16;
    host.event(muxer);
    assert_eq!(drivers[0].used(), None);
    // Without a buffer the device wants to hear of the first one.
    assert_eq!(drivers[0].notify_wish().1, 0);
    drivers[0].offer(&[writable(BUFFERS, 4096)]);
    host.event(0);
    assert_eq!(drivers[0].used().map(|(_, len)| len), Some(44));
    assert_eq!(recorder.take_interrupts(), 1);
    drop(slot);
}
