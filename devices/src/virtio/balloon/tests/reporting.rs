//! Free page reporting, and which queue it uses.

use super::*;

fn reporting() -> Config {
    Config {
        free_page_reporting: true,
        ..config()
    }
}

#[test]
fn gives_reported_ranges_back() {
    let mem = memory();
    let mut guest = Guest::new(&mem, &reporting());
    // With no statistics and no hinting, Linux takes the third queue.
    let (one, two) = (writable(FIRST, 8192), writable(FIRST + 3 * PAGE, 4096));
    guest.offer(2, &[one, two]);
    assert_eq!(guest.used(2), Some((0, 0)));
    assert_eq!(guest.zeroed(5), [true, true, false, true, false]);
    let counted = ["count", "freed", "fails"].map(|name| guest.count(&format!("free_page_report_{name}")));
    assert_eq!(counted, [2, 12288, 0]);
}

#[test]
fn takes_the_queue_that_the_specification_has_too() {
    let mem = memory();
    let device = reporting().build().unwrap();
    let features = device.info().features;
    let mut guest = Guest::set_up(&mem, device, features, &[0, 1, 4]);
    guest.offer(4, &[writable(FIRST, 4096)]);
    assert_eq!(guest.zeroed(1), [true]);
}

#[test]
fn keeps_what_is_less_than_a_page() {
    let mem = memory();
    let mut guest = Guest::new(&mem, &reporting());
    guest.offer(2, &[writable(FIRST + 8, 4096), writable(FIRST + 4095, 4098)]);
    assert_eq!(guest.zeroed(3), [false, true, false]);
    assert_eq!(guest.count("free_page_report_freed"), 4096);
}

#[test]
fn of_huge_pages_only_whole_ones_come_back() {
    use vm_memory::{GuestRegionMmap, MmapRegion};
    const HUGE: u64 = 2 << 20;
    let size = 8 << 20;
    let mut mapping = MmapRegion::new(size).unwrap();
    mapping.set_hugetlbfs(true);
    let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
    let mem = GuestMemory::from_regions(vec![region]).unwrap();
    mem.write_slice(&vec![0xaa; size], GuestAddress(0)).unwrap();
    let mut guest = Guest::new(&mem, &reporting());
    guest.offer(2, &[writable(HUGE + 4096, 5 << 20)]);
    let zero = [HUGE + 4096, 2 * HUGE, 3 * HUGE - 4096, 3 * HUGE].map(|at| guest.is_zero(at));
    assert_eq!(zero, [false, true, true, false]);
    assert_eq!(guest.count("free_page_report_freed"), HUGE);

    let pages: Vec<u32> = (0x400..0x500).collect();
    guest.send_pfns(0, &pages);
    assert!(!guest.is_zero(HUGE) && guest.count("event_fails") == 0);
}

#[test]
fn ignores_queues_that_no_feature_is_for() {
    let mem = memory();
    let device = reporting().build().unwrap();
    let none = device.info().features & !feature::REPORTING;
    let mut guest = Guest::set_up(&mem, device, none, &[0, 1, 2]);
    guest.drivers[2].offer(&[writable(FIRST, 4096)]);
    guest.kick(2).unwrap();
    guest.kick(9).unwrap();
    assert_eq!((guest.used(2), guest.zeroed(1)), (None, vec![false]));
}

#[test]
fn a_range_outside_of_memory_breaks_the_queue() {
    let mem = memory();
    let mut guest = Guest::new(&mem, &reporting());
    guest.drivers[2].offer(&[writable(FIRST, u32::MAX)]);
    assert!(guest.kick(2).is_err());
    assert_eq!((guest.zeroed(1), guest.count("event_fails")), (vec![false], 1));
}
