use super::*;
use crate::testing::{Driver, memory, readable, writable};

const MIB: usize = 1 << 20;

#[test]
fn pops_a_direct_chain_with_both_sides() {
    let mem = memory(MIB);
    let mut driver = Driver::new(&mem, 0x1000, 8);
    let mut queue = driver.queue(false);
    mem.write_slice(b"abc", GuestAddress(0x8000)).unwrap();
    let head = driver.offer(&[readable(0x8000, 3), writable(0x9000, 5), writable(0xa000, 1)]);

    let mut chain = Chain::new();
    let mut ring = queue.open(&mem).unwrap();
    assert!(ring.pop(&mut chain).unwrap());
    assert_eq!(
        (chain.head(), chain.readable.len(), chain.writable.len()),
        (head, 3, 6)
    );
    let mut data = [0; 3];
    chain.readable.read(0, &mut data);
    assert_eq!(&data, b"abc");
    assert!(!ring.pop(&mut chain).unwrap());
}

#[test]
fn pops_an_indirect_chain() {
    let mem = memory(MIB);
    let mut driver = Driver::new(&mem, 0x1000, 8);
    let mut queue = driver.queue(false);
    driver.offer_indirect(0x7000, &[readable(0x8000, 3), writable(0x9000, 5)]);
    let mut chain = Chain::new();
    assert!(queue.open(&mem).unwrap().pop(&mut chain).unwrap());
    assert_eq!((chain.readable.len(), chain.writable.len()), (3, 5));
}

#[test]
fn gives_a_chain_again_after_unpop() {
    let mem = memory(MIB);
    let mut driver = Driver::new(&mem, 0x1000, 8);
    let mut queue = driver.queue(false);
    let head = driver.offer(&[readable(0x8000, 3)]);
    let mut chain = Chain::new();
    let mut ring = queue.open(&mem).unwrap();
    ring.pop(&mut chain).unwrap();
    ring.unpop(1);
    assert!(ring.pop(&mut chain).unwrap());
    assert_eq!(chain.head(), head);
}

#[test]
fn goes_on_where_somebody_else_has_stopped() {
    let mem = memory(MIB);
    let mut driver = Driver::new(&mem, 0x1000, 8);
    let mut queue = driver.queue(false);
    driver.offer(&[readable(0x8000, 3)]);
    let second = driver.offer(&[readable(0x9000, 3)]);
    queue.set_position(1);
    let mut chain = Chain::new();
    let mut ring = queue.open(&mem).unwrap();
    assert!(ring.pop(&mut chain).unwrap());
    assert_eq!(chain.head(), second);
    ring.push(chain.head(), 0);
    ring.publish();
    assert_eq!(queue.position(), 2);
    let used: u16 = mem.read_obj(GuestAddress(driver.config().used_ring + 2)).unwrap();
    assert_eq!(used, 2);
}

#[test]
fn answers_become_visible_on_publish_and_wrap_around() {
    let mem = memory(MIB);
    let mut driver = Driver::new(&mem, 0x1000, 2);
    let mut queue = driver.queue(false);
    let mut chain = Chain::new();
    for round in 0..70_000u32 {
        let head = driver.offer(&[writable(0x8000, 4)]);
        let mut ring = queue.open(&mem).unwrap();
        assert!(ring.pop(&mut chain).unwrap());
        ring.push(chain.head(), round);
        assert_eq!(driver.used(), None);
        ring.publish();
        assert_eq!(driver.used(), Some((head, round)));
    }
}

#[test]
fn interrupts_once_per_crossed_event_index() {
    let mem = memory(MIB);
    let mut driver = Driver::new(&mem, 0x1000, 8);
    let mut queue = driver.queue(true);
    let mut chain = Chain::new();
    let mut serve = |driver: &mut Driver<'_>| {
        driver.offer(&[writable(0x8000, 4)]);
        let mut ring = queue.open(&mem).unwrap();
        ring.pop(&mut chain).unwrap();
        ring.push(chain.head(), 0);
        ring.publish();
        ring.needs_interrupt()
    };
    driver.set_used_event(1);
    assert!(!serve(&mut driver));
    assert!(serve(&mut driver));
    assert!(!serve(&mut driver));
}

#[test]
fn asks_nothing_of_a_driver_that_wants_no_interrupts() {
    let mem = memory(MIB);
    let mut driver = Driver::new(&mem, 0x1000, 8);
    let mut queue = driver.queue(false);
    driver.offer(&[writable(0x8000, 4)]);
    driver.set_avail_flags(AVAIL_F_NO_INTERRUPT);
    let mut chain = Chain::new();
    let mut ring = queue.open(&mem).unwrap();
    assert!(!ring.needs_interrupt());
    ring.pop(&mut chain).unwrap();
    ring.push(chain.head(), 0);
    ring.publish();
    assert!(!ring.needs_interrupt());
}

#[test]
fn suppresses_notifications_by_flag_and_by_index() {
    let mem = memory(MIB);
    let mut driver = Driver::new(&mem, 0x1000, 8);
    let mut queue = driver.queue(false);
    queue.open(&mem).unwrap().disable_notify();
    assert_eq!(driver.notify_wish().0, USED_F_NO_NOTIFY);
    assert!(!queue.open(&mem).unwrap().enable_notify().unwrap());
    assert_eq!(driver.notify_wish().0, 0);

    let mut queue = driver.queue(true);
    driver.offer(&[readable(0x8000, 1)]);
    let mut ring = queue.open(&mem).unwrap();
    assert!(ring.enable_notify().unwrap());
    ring.pop(&mut Chain::new()).unwrap();
    assert!(!ring.enable_notify().unwrap());
    assert_eq!(driver.notify_wish().1, 1);
}

#[test]
fn refuses_an_available_index_too_far_ahead() {
    let mem = memory(MIB);
    let driver = Driver::new(&mem, 0x1000, 8);
    let mut queue = driver.queue(false);
    driver.set_avail_index(9);
    let popped = queue.open(&mem).unwrap().pop(&mut Chain::new());
    assert_eq!(popped, Err(QueueError::AvailableIndex { index: 9, next: 0 }));
}

#[test]
fn refuses_a_loop() {
    let mem = memory(MIB);
    let mut driver = Driver::new(&mem, 0x1000, 8);
    let mut queue = driver.queue(false);
    driver.raw_descriptor(0x1000, 0, readable(0x8000, 1), DESC_F_NEXT, 0);
    driver.offer_head(0);
    let popped = queue.open(&mem).unwrap().pop(&mut Chain::new());
    assert!(matches!(popped, Err(QueueError::Chain { .. })));
}

#[test]
fn refuses_indexes_behind_the_table() {
    let mem = memory(MIB);
    let mut driver = Driver::new(&mem, 0x1000, 8);
    let mut queue = driver.queue(false);
    driver.offer_head(8);
    assert!(matches!(
        queue.open(&mem).unwrap().pop(&mut Chain::new()),
        Err(QueueError::Chain { .. })
    ));

    driver.raw_descriptor(0x1000, 0, readable(0x8000, 1), DESC_F_NEXT, 8);
    let mut driver = Driver::new(&mem, 0x1000, 8);
    let mut queue = driver.queue(false);
    driver.raw_descriptor(0x1000, 0, readable(0x8000, 1), DESC_F_NEXT, 8);
    driver.offer_head(0);
    assert!(matches!(
        queue.open(&mem).unwrap().pop(&mut Chain::new()),
        Err(QueueError::Chain { .. })
    ));
}

#[test]
fn refuses_buffers_outside_memory() {
    let mem = memory(MIB);
    let mut driver = Driver::new(&mem, 0x1000, 8);
    let mut queue = driver.queue(false);
    driver.offer(&[writable(u64::MAX - 1, 100)]);
    let popped = queue.open(&mem).unwrap().pop(&mut Chain::new());
    assert!(matches!(popped, Err(QueueError::Buffer { .. })));
}

#[test]
fn refuses_readable_behind_writable() {
    let mem = memory(MIB);
    let mut driver = Driver::new(&mem, 0x1000, 8);
    let mut queue = driver.queue(false);
    driver.offer(&[writable(0x8000, 1), readable(0x9000, 1)]);
    assert!(matches!(
        queue.open(&mem).unwrap().pop(&mut Chain::new()),
        Err(QueueError::Chain { .. })
    ));
}

#[test]
fn refuses_nested_and_misshapen_indirect_tables() {
    let mem = memory(MIB);
    for (len, flags) in [
        (15, DESC_F_INDIRECT),
        (0, DESC_F_INDIRECT),
        (16, DESC_F_INDIRECT | DESC_F_NEXT),
    ] {
        let mut driver = Driver::new(&mem, 0x1000, 8);
        let mut queue = driver.queue(false);
        driver.raw_descriptor(0x1000, 0, readable(0x7000, len), flags, 0);
        driver.offer_head(0);
        let popped = queue.open(&mem).unwrap().pop(&mut Chain::new());
        assert!(matches!(popped, Err(QueueError::Chain { .. })), "{len} {flags}");
    }
    let mut driver = Driver::new(&mem, 0x1000, 8);
    let mut queue = driver.queue(false);
    driver.raw_descriptor(0x7000, 0, readable(0x7000, 16), DESC_F_INDIRECT, 0);
    driver.raw_descriptor(0x1000, 0, readable(0x7000, 16), DESC_F_INDIRECT, 0);
    driver.offer_head(0);
    assert!(matches!(
        queue.open(&mem).unwrap().pop(&mut Chain::new()),
        Err(QueueError::Chain { .. })
    ));
}

#[test]
fn refuses_rings_outside_memory_or_misaligned() {
    let mem = memory(MIB);
    let good = Driver::new(&mem, 0x1000, 8).config();
    let bad = [
        QueueConfig { size: 3, ..good },
        QueueConfig { size: 16, ..good },
        QueueConfig { size: 0, ..good },
        QueueConfig {
            desc_table: 0x1008,
            ..good
        },
        QueueConfig {
            avail_ring: 0x1001,
            ..good
        },
        QueueConfig {
            used_ring: 0x2002,
            ..good
        },
        QueueConfig {
            used_ring: u64::MAX - 3,
            ..good
        },
        QueueConfig {
            desc_table: MIB as u64 - 16,
            ..good
        },
    ];
    for config in bad {
        assert!(Queue::new(config, false, &mem).is_err(), "{config:?}");
    }
    assert!(
        Queue::new(
            QueueConfig {
                ready: false,
                size: 3,
                ..good
            },
            false,
            &mem
        )
        .is_ok()
    );
}

#[test]
fn keeps_its_positions_in_its_saved_state() {
    let mem = memory(MIB);
    let mut driver = Driver::new(&mem, 0x1000, 8);
    let mut queue = driver.queue(true);
    driver.offer(&[writable(0x8000, 4)]);
    let mut chain = Chain::new();
    let mut ring = queue.open(&mem).unwrap();
    ring.pop(&mut chain).unwrap();
    ring.push(chain.head(), 4);
    ring.publish();
    let json = serde_json::to_string(&queue).unwrap();
    assert_eq!(serde_json::from_str::<Queue>(&json).unwrap(), queue);
}

proptest::proptest! {
    #[test]
    fn survives_any_ring_content(noise in proptest::collection::vec(proptest::num::u8::ANY, 0x400), event_idx: bool) {
        let mem = memory(0x2000);
        let driver = Driver::new(&mem, 0x1000, 16);
        let mut queue = driver.queue(event_idx);
        mem.write_slice(&noise, GuestAddress(0x1000)).unwrap();
        let mut chain = Chain::new();
        let mut ring = queue.open(&mem).unwrap();
        for _ in 0..64 {
            match ring.pop(&mut chain) {
                Ok(true) => ring.push(chain.head(), 1),
                _ => break,
            }
        }
        ring.publish();
        ring.needs_interrupt();
        let _ = ring.enable_notify();
    }
}

#[test]
fn a_buffer_may_cross_from_one_region_into_the_next() {
    let regions = [(GuestAddress(0), MIB), (GuestAddress(MIB as u64), MIB)];
    let mem = GuestMemory::from_ranges(&regions).unwrap();
    let mut driver = Driver::new(&mem, 0x1000, 8);
    let mut queue = driver.queue(false);
    driver.offer(&[readable(0xf_fffe, 5), writable(0x10_0010, 7)]);
    driver.offer(&[readable(0x1f_fffe, 5)]);
    mem.write_slice(b"hello", GuestAddress(0xf_fffe)).unwrap();

    let mut chain = Chain::new();
    let mut ring = queue.open(&mem).unwrap();
    assert!(ring.pop(&mut chain).unwrap());

    let mut data = [0; 5];
    chain.readable.read(0, &mut data);
    assert_eq!(
        (&data, chain.readable.iovecs().len(), chain.writable.len()),
        (b"hello", 2, 7)
    );
    let past_the_end = QueueError::Buffer {
        head: 2,
        address: 0x1f_fffe,
        len: 5,
    };
    assert_eq!(ring.pop(&mut chain), Err(past_the_end));
}
