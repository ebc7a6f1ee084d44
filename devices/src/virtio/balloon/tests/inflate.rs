//! Inflating, deflating, and the fields that go with them.

use super::*;

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;

#[test]
fn gives_pages_back_before_it_answers() {
    let mem = memory();
    let mut guest = Guest::new(&mem, &config());
    guest.send_pfns(INFLATE, &[FIRST_PFN + 3, FIRST_PFN, FIRST_PFN + 1]);
    assert_eq!(guest.used(INFLATE), Some((0, 0)));
    assert_eq!(guest.zeroed(5), [true, true, false, true, false]);
    assert_eq!((guest.count("inflate_count"), guest.count("event_fails")), (1, 0));
    assert_eq!(guest.recorder.take_interrupts(), 1);
}

#[test]
fn leaves_pages_that_are_taken_back_alone() {
    let mem = memory();
    let mut guest = Guest::new(&mem, &config());
    guest.send_pfns(DEFLATE, &[FIRST_PFN]);
    assert_eq!(guest.used(DEFLATE), Some((0, 0)));
    assert_eq!(guest.zeroed(1), [false]);
    assert_eq!(guest.count("deflate_count"), 1);
}

#[test]
fn counts_pages_outside_of_memory_and_takes_the_others() {
    let mem = memory();
    let mut guest = Guest::new(&mem, &config());
    guest.send_pfns(INFLATE, &[0x100, u32::MAX, 0xff, FIRST_PFN]);
    assert_eq!(guest.zeroed(2), [true, false]);
    assert!(guest.is_zero(0xff * PAGE));
    assert_eq!((guest.count("inflate_count"), guest.count("event_fails")), (1, 1));
    assert_eq!(guest.used(INFLATE), Some((0, 0)));
}

#[test]
fn takes_runs_across_regions_and_not_the_hole_between() {
    let at = |page: u64, pages: usize| (GuestAddress(page * PAGE), pages * 4096);
    let mem = GuestMemory::from_ranges(&[at(0, 0x80), at(0x80, 0x10), at(0xa0, 0x10)]).unwrap();
    let fill = |page: u64| mem.write_slice(&[0xaa; 4096], GuestAddress(page * PAGE)).unwrap();
    [0x7e, 0x7f, 0x80, 0x8f, 0xa0, 0xa1].into_iter().for_each(fill);
    let mut guest = Guest::new(&mem, &config());
    guest.send_pfns(INFLATE, &(0x7f..=0xa0).collect::<Vec<_>>());
    let zero = [0x7e, 0x7f, 0x80, 0x8f, 0xa0, 0xa1].map(|page| guest.is_zero(page * PAGE));
    assert_eq!(zero, [false, true, true, true, true, false]);
    assert_eq!(guest.count("event_fails"), 1);
}

#[test]
fn counts_requests_that_are_no_page_numbers() {
    let mem = memory();
    let mut guest = Guest::new(&mem, &config());
    guest.send(INFLATE, &[FIRST_PFN.to_le_bytes().as_slice(), &[0; 3]].concat());
    assert_eq!((guest.zeroed(1), guest.count("event_fails")), (vec![true], 1));
    guest.offer(INFLATE, &[writable(REQUEST, 4)]);
    assert_eq!((guest.count("inflate_count"), guest.count("event_fails")), (2, 2));
}

#[test]
fn gives_shared_memory_back_to_its_file() {
    use vm_memory::{FileOffset, GuestRegionMmap, MmapRegion};
    let file = vmm_sys_util::tempfile::TempFile::new_in("/dev/shm".as_ref())
        .unwrap()
        .into_file();
    file.set_len(MEMORY as u64).unwrap();
    let mapping = MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), MEMORY).unwrap();
    let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
    let mem = GuestMemory::from_regions(vec![region]).unwrap();
    mem.write_slice(&[0xaa; 8192], GuestAddress(FIRST)).unwrap();
    let blocks = || std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
    let mut guest = Guest::new(&mem, &config());
    guest.send_pfns(DEFLATE, &[FIRST_PFN]);
    let before = blocks();
    guest.send_pfns(INFLATE, &[FIRST_PFN]);
    // Blocks have 512 bytes.
    assert_eq!(blocks(), before - 8);
    assert_eq!(guest.zeroed(2), [true, false]);
    assert_eq!(guest.count("event_fails"), 0);
}

#[test]
fn shows_a_new_target_and_takes_the_size_that_the_driver_writes() {
    let mem = memory();
    let mut guest = Guest::new(&mem, &config());
    assert_eq!((guest.field(0), guest.field(4)), (256, 0));
    let patch = Patch::Target(TargetPatch { amount_mib: 3 });
    guest.patch(&patch).unwrap();
    guest.device.write_config(4, &[1, 2, 3, 4]);
    guest.device.write_config(5, &[9]);
    assert_eq!((guest.field(0), guest.field(4)), (768, 0x0403_0901));
    // None of these is the driver's.
    guest.device.write_config(0, &[0xff; 8]);
    guest.device.write_config(3, &[0xff; 2]);
    guest.device.write_config(6, &[0xff; 4]);
    guest.device.write_config(usize::MAX, &[0xff; 4]);
    assert_eq!((guest.field(0), guest.field(4)), (768, 0x0403_0901));
    guest.device.reset();
    assert_eq!((guest.field(0), guest.field(4)), (768, 0));
}

#[test]
fn refuses_changes_without_a_driver_and_targets_beyond_32_bits() {
    let mem = memory();
    let patch = |amount_mib| Patch::Target(TargetPatch { amount_mib });
    let mut guest = Guest::new(&mem, &config());
    let refusal = guest.patch(&patch(u32::MAX)).unwrap_err();
    assert!(
        refusal.starts_with("Amount of pages requested is too large"),
        "{refusal}"
    );
    guest.queues.clear();
    let refusal = guest.patch(&patch(0)).unwrap_err();
    assert!(refusal.starts_with("Device not activated yet."), "{refusal}");
    assert_eq!(guest.field(0), 256);
}

#[test]
fn leaves_what_is_beyond_a_turn_for_later() {
    let mem = memory();
    let mut guest = Guest::new(&mem, &config());
    mem.write_obj(FIRST_PFN, GuestAddress(REQUEST)).unwrap();
    for _ in 0..17 {
        guest.drivers[0].offer(&[readable(REQUEST, 4)]);
    }
    let again = |guest: &mut Guest<'_>| {
        guest.run(|device, io| {
            device.on_queue(INFLATE, io).unwrap();
            io.again
        })
    };
    assert_eq!((again(&mut guest), guest.count("inflate_count")), (Some(0), 16));
    assert_eq!((again(&mut guest), guest.count("inflate_count")), (None, 17));
}

#[test]
fn a_broken_queue_is_counted_and_reported() {
    let mem = memory();
    let mut guest = Guest::new(&mem, &config());
    guest.drivers[0].offer(&[readable(MEMORY as u64, 4)]);
    assert!(matches!(guest.kick(INFLATE), Err(DeviceError::Queue(_))));
    assert_eq!(guest.count("event_fails"), 1);
}

#[test]
fn an_idle_balloon_watches_nothing() {
    let mem = memory();
    let guest = Guest::new(&mem, &config());
    assert!(guest.recorder.watched.lock().unwrap().is_empty());
    assert_eq!(guest.recorder.config.load(Ordering::Relaxed), 0);
}
