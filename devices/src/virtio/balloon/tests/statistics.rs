//! Statistics: what is read, and when the guest is asked.

use std::os::fd::RawFd;

use super::*;

const STATS: u16 = 2;

fn polled() -> Config {
    Config {
        stats_polling_interval_s: 3600,
        ..config()
    }
}

fn entry(tag: u16, value: u64) -> Vec<u8> {
    [tag.to_le_bytes().as_slice(), &value.to_le_bytes()].concat()
}

fn interval(seconds: u16) -> Patch {
    Patch::Statistics(StatisticsPatch {
        stats_polling_interval_s: seconds,
    })
}

impl Guest<'_> {
    fn expire(&mut self) {
        self.run(|device, io| device.on_event(0, io)).unwrap();
    }

    fn timer(&self) -> Option<(RawFd, u32)> {
        self.recorder.watched.lock().unwrap().first().copied()
    }

    /// Whether the timer expires after so many seconds, which began a moment ago.
    fn waits(&self, seconds: u64) -> bool {
        let (fd, _) = self.timer().unwrap();
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
        let left = info.lines().find_map(|line| line.strip_prefix("it_value: ("));
        let (left, _) = left.unwrap().split_once(',').unwrap();
        (seconds.saturating_sub(30)..=seconds).contains(&left.parse().unwrap())
    }

    fn shown(&self) -> Value {
        self.status()["statistics"].clone()
    }
}

#[test]
fn shows_what_the_guest_told_and_keeps_what_it_leaves_out() {
    let mem = memory();
    let mut guest = Guest::new(&mem, &polled());
    guest.device.write_config(4, &520u32.to_le_bytes());
    let sizes = json!({"target_pages": 256, "actual_pages": 520, "target_mib": 1, "actual_mib": 2});
    assert_eq!(guest.shown(), sizes);
    guest.send(STATS, &[entry(4, 7), entry(77, 1), entry(15, u64::MAX)].concat());
    guest.expire();
    guest.send(STATS, &entry(0, 5));
    let mut told = sizes;
    told["free_memory"] = 7.into();
    told["direct_reclaim"] = u64::MAX.into();
    told["swap_in"] = 5.into();
    assert_eq!((guest.shown(), guest.count("stats_updates_count")), (told, 2));
}

#[test]
fn knows_every_statistic_by_its_tag() {
    let mem = memory();
    let mut guest = Guest::new(&mem, &polled());
    let entries: Vec<u8> = (0..17).flat_map(|tag| entry(tag, 100 + u64::from(tag))).collect();
    guest.send(STATS, &entries);
    let shown = guest.shown();
    let names = [
        "swap_in",
        "swap_out",
        "major_faults",
        "minor_faults",
        "free_memory",
        "total_memory",
        "available_memory",
        "disk_caches",
        "hugetlb_allocations",
        "hugetlb_failures",
        "oom_kill",
        "alloc_stall",
        "async_scan",
        "direct_scan",
        "async_reclaim",
        "direct_reclaim",
    ];
    let told = names.map(|name| shown[name].as_u64());
    assert_eq!(told.to_vec(), (100..116).map(Some).collect::<Vec<_>>());
    assert_eq!(shown.as_object().unwrap().len(), 20);
}

#[test]
fn holds_the_buffer_until_the_timer_expires() {
    let mem = memory();
    let mut guest = Guest::new(&mem, &polled());
    guest.expire();
    guest.send(STATS, &entry(4, 7));
    assert_eq!((guest.used(STATS), guest.recorder.take_interrupts()), (None, 0));
    guest.expire();
    assert_eq!(
        (guest.used(STATS), guest.recorder.take_interrupts()),
        (Some((0, 0)), 1)
    );
    guest.expire();
    assert_eq!((guest.used(STATS), guest.recorder.take_interrupts()), (None, 0));
}

#[test]
fn waits_the_whole_interval_after_every_expiration() {
    let mem = memory();
    let mut guest = Guest::new(&mem, &polled());
    assert!(guest.waits(3600));
    guest.patch(&interval(60)).unwrap();
    assert!(guest.waits(60));
    guest.device.reset();
    assert!(guest.waits(0));
    guest.expire();
    assert!(guest.waits(60));
}

#[test]
fn a_driver_that_offers_a_second_buffer_has_the_first_back() {
    let mem = memory();
    let mut guest = Guest::new(&mem, &polled());
    guest.send(STATS, &entry(4, 7));
    guest.send(STATS, &entry(4, 8));
    assert_eq!((guest.used(STATS), guest.used(STATS)), (Some((0, 0)), None));
    guest.expire();
    assert_eq!(guest.used(STATS), Some((1, 0)));
}

#[test]
fn counts_buffers_without_an_entry_and_reads_no_more_than_64() {
    let mem = memory();
    let mut guest = Guest::new(&mem, &polled());
    guest.send(STATS, &[0; 9]);
    assert_eq!(
        (
            guest.count("stats_update_fails"),
            guest.count("stats_updates_count")
        ),
        (1, 0)
    );
    let entries: Vec<u8> = (0..65).flat_map(|value| entry(4, value)).collect();
    guest.send(STATS, &entries);
    assert_eq!(guest.shown()["free_memory"], 63);
    guest.drivers[2].offer(&[readable(MEMORY as u64, 10)]);
    assert!(guest.kick(STATS).is_err());
    assert_eq!(
        (guest.count("stats_update_fails"), guest.count("event_fails")),
        (2, 0)
    );
}

#[test]
fn the_interval_can_be_changed_and_not_begun_or_ended() {
    let mem = memory();
    let mut guest = Guest::new(&mem, &polled());
    assert!(guest.timer().is_some());
    guest.patch(&interval(1)).unwrap();
    let refusal = guest.patch(&interval(0)).unwrap_err();
    assert!(
        refusal.starts_with("Statistics cannot be enabled/disabled after activation."),
        "{refusal}"
    );

    let mut guest = Guest::new(&mem, &config());
    assert!(guest.timer().is_none() && guest.shown().is_null());
    guest.patch(&interval(0)).unwrap();
    assert!(guest.patch(&interval(1)).is_err());
}

#[test]
fn asks_no_driver_that_has_no_statistics() {
    let mem = memory();
    let guest = Guest::with_features(&mem, &polled(), !feature::STATS_VQ);
    assert!(guest.timer().is_none());
}

#[test]
fn a_reset_forgets_what_the_driver_told() {
    let mem = memory();
    let mut guest = Guest::new(&mem, &polled());
    guest.send(STATS, &entry(4, 7));
    guest.device.reset();
    guest.expire();
    assert_eq!(guest.used(STATS), None);
    assert_eq!(guest.shown().get("free_memory"), None);
}
