//! Rate limiters, measured with the guest's clock: no test here asks for speed, only for slowness. What a limit holds
//! back takes at least its time; after the limit is lifted, nothing is held back any more.

use std::path::Path;
use std::thread;
use std::time::Duration;

use mayfly_tests::network::{Server, Subnet, give, receive};
use mayfly_tests::{
    Drive, Failure, GUEST_TIMEOUT, Guest, Net, Result, Scratch, TestVm, Vm, pattern, wait_until,
};
use serde_json::{Value, json};

const MIB: usize = 1 << 20;
/// How much of its time a limit is surely seen to take: the two clocks need not run alike.
const TOLERANCE: f64 = 0.9;

/// A bucket of this rate that holds a second's tokens.
fn per_second(rate: usize) -> Value {
    json!({"size": rate, "refill_time": 1000})
}

fn disabled() -> Value {
    json!({"size": 0, "refill_time": 0})
}

/// How many seconds a script takes by the guest's clock.
fn seconds(guest: &Guest, script: &str) -> Result<f64> {
    let timed = format!("cut -d' ' -f1 /proc/uptime; {{ {script}; }} >&2 && cut -d' ' -f1 /proc/uptime");
    let output = guest.check(&format!(
        "{{ {timed}; }} 2>/tmp/said || {{ cat /tmp/said; exit 1; }}"
    ))?;
    let times: Vec<f64> = output.split_whitespace().flat_map(str::parse).collect();
    match times[..] {
        [start, end] => Ok(end - start),
        _ => Err(Failure::new(format!("no two times but {output:?}"))),
    }
}

/// Asserts that `amount` took as long as a rate and its bucket ask.
fn assert_slow(seconds: f64, amount: usize, rate: usize) {
    let least = (amount - rate) as f64 / rate as f64 * TOLERANCE;
    assert!(
        seconds >= least,
        "{amount} at {rate} a second took {seconds} s, and not {least} s"
    );
}

/// Asserts that some work is not held back.
fn assert_free(vm: &Vm, group: &str, counter: &str, work: impl FnOnce() -> Result) -> Result {
    let before = vm.counted(group, counter)?;
    work()?;
    assert_eq!(vm.counted(group, counter)?, before);
    Ok(())
}

/// Waits for two seconds in which no io thread wakes up. A timer that goes off now and then would spoil every try.
fn assert_idle(vm: &Vm) -> Result {
    wait_until("io threads that sleep for 2 s", GUEST_TIMEOUT, || {
        let before = vm.io_sleeps().ok();
        thread::sleep(Duration::from_secs(2));
        before.is_some() && vm.io_sleeps().ok() == before
    })
}

#[test]
fn a_disk_is_as_slow_as_its_limits() -> Result {
    let scratch = Scratch::new("limits")?;
    let image = scratch.file("disk", pattern(4 * MIB))?;
    let limits = json!({"bandwidth": per_second(MIB)});
    let drive = Drive::new("data", &image).with("rate_limiter", limits);
    // Its tap is down, so that there is no traffic when nobody asks for it.
    let net = Net::on("net0", "mflim0").with("tx_rate_limiter", json!({"ops": per_second(100)}));
    let vm = TestVm::new("limits-disk").drive(drive).net(net).boot()?;
    let guest = vm.guest();
    assert_bandwidth(&vm, &guest, &image)?;
    assert_operations(&vm, &guest)?;
    assert_idle(&vm)
}

/// Reads, and writes with a pause in between, are slowed down, and are right.
fn assert_bandwidth(vm: &Vm, guest: &Guest, image: &Path) -> Result {
    let read = "echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vda of=/tmp/copy bs=64k";
    assert_slow(seconds(guest, read)?, 4 * MIB, MIB);
    assert!(vm.counted("block", "rate_limiter_throttled_events")? > 0);
    assert!(vm.counted("block", "rate_limiter_event_count")? > 0);

    guest.check("( dd if=/tmp/copy of=/dev/vda bs=64k conv=fsync; touch /tmp/written ) >/dev/null 2>&1 &")?;
    thread::sleep(Duration::from_secs(1));
    vm.pause()?;
    thread::sleep(Duration::from_secs(1));
    vm.resume()?;
    guest.check("until [ -e /tmp/written ]; do usleep 100000; done; cmp /dev/vda /tmp/copy")?;
    assert!(std::fs::read(image)? == pattern(4 * MIB), "the disk differs");
    Ok(())
}

/// A patch puts a limit of operations in the place of the other; another one lifts it.
fn assert_operations(vm: &Vm, guest: &Guest) -> Result {
    let patch = |limits: Value| {
        let patch = json!({"drive_id": "data", "rate_limiter": limits});
        vm.patch("/drives/data", &patch)?.success()
    };
    patch(json!({"bandwidth": disabled(), "ops": per_second(100)}))?;
    // Without read-ahead each page is a request.
    let read = "echo 0 >/sys/block/vda/queue/read_ahead_kb; echo 3 >/proc/sys/vm/drop_caches
        dd if=/dev/vda of=/dev/null bs=4k count=300";
    assert_slow(seconds(guest, read)?, 300, 100);
    patch(json!({"ops": disabled()}))?;
    assert_free(vm, "block", "rate_limiter_throttled_events", || {
        seconds(guest, read).map(drop)
    })
}

#[test]
fn a_limit_that_is_lifted_sets_a_waiting_disk_going() -> Result {
    let scratch = Scratch::new("limits")?;
    let image = scratch.file("disk", pattern(MIB))?;
    let none_today = json!({"ops": {"size": 1, "refill_time": 86_400_000}});
    let vm = TestVm::new("limits-lift")
        .mmio()
        .drive(Drive::new("data", &image))
        .boot()?;
    let guest = vm.guest();
    let patch = |limits: Value| {
        let patch = json!({"drive_id": "data", "rate_limiter": limits});
        vm.patch("/drives/data", &patch)?.success()
    };
    patch(none_today)?;
    guest.check("( dd if=/dev/vda of=/tmp/copy bs=64k; touch /tmp/read ) >/dev/null 2>&1 &")?;
    wait_until("a request that waits", GUEST_TIMEOUT, || {
        vm.counted("block", "rate_limiter_throttled_events")
            .is_ok_and(|count| count > 0)
    })?;
    assert_idle(&vm)?;
    assert_ne!(guest.run("test -e /tmp/read")?.code, 0);
    patch(json!({"ops": disabled()}))?;
    guest.check("until [ -e /tmp/read ]; do usleep 100000; done; cmp /dev/vda /tmp/copy")?;
    Ok(())
}

#[test]
fn entropy_is_as_slow_as_its_limit() -> Result {
    let limits = json!({"rate_limiter": {"bandwidth": per_second(1024)}});
    let vm = TestVm::new("limits-entropy").section("entropy", limits).boot()?;
    let before = vm.counted("entropy", "entropy_bytes")?;
    let draw = "dd if=/dev/hwrng of=/dev/null bs=64 count=64";
    let seconds = seconds(&vm.guest(), draw)?;
    let drawn = vm.counted("entropy", "entropy_bytes")? - before;
    assert_slow(seconds, usize::try_from(drawn)?.min(4096), 1024);
    assert!(drawn >= 3072, "only {drawn} bytes were drawn");
    assert!(vm.counted("entropy", "entropy_rate_limiter_throttled")? > 0);
    Ok(())
}

const SUBNET: Subnet = Subnet(60);
/// What goes through the card, and at which rate: surely less than a guest moves in an emulated host.
const NET_AMOUNT: usize = MIB;
const NET_RATE: usize = MIB / 8;

/// The guest sends its disk; how long it takes.
fn send(vm: &Vm) -> Result<f64> {
    let server = Server::start(SUBNET.host(), receive)?;
    let send = format!("nc {} {} </dev/vda", SUBNET.host(), server.port());
    let time = seconds(&vm.guest(), &send)?;
    assert!(
        server.join()? == pattern(NET_AMOUNT),
        "not what the guest has sent came"
    );
    Ok(time)
}

/// The guest receives what is on its disk; how long it takes.
fn fetch(vm: &Vm) -> Result<f64> {
    let server = Server::start(SUBNET.host(), |stream| give(stream, NET_AMOUNT))?;
    let fetch = format!(
        "nc {} {} </dev/null | cmp - /dev/vda",
        SUBNET.host(),
        server.port()
    );
    let time = seconds(&vm.guest(), &fetch)?;
    server.join()?;
    Ok(time)
}

#[test]
fn a_network_card_is_as_slow_as_its_limits_in_each_direction() -> Result {
    let tap = SUBNET.tap()?;
    let scratch = Scratch::new("limits")?;
    let disk = scratch.file("disk", pattern(NET_AMOUNT))?;
    let net = Net::new("net0", &tap).with("tx_rate_limiter", json!({"bandwidth": per_second(NET_RATE)}));
    let vm = TestVm::new("limits-net")
        .net(net)
        .drive(Drive::new("data", disk).read_only())
        .boot_arg(&SUBNET.boot_arg())
        .boot()?;
    let patch = |rx: Value, tx: Value| {
        let limits = |bucket| json!({"bandwidth": bucket});
        let patch = json!({"iface_id": "net0", "rx_rate_limiter": limits(rx), "tx_rate_limiter": limits(tx)});
        vm.patch("/network-interfaces/net0", &patch)?.success()
    };
    assert_slow(send(&vm)?, NET_AMOUNT, NET_RATE);
    assert!(vm.counted("net", "tx_rate_limiter_event_count")? > 0);
    assert_free(&vm, "net", "rx_rate_limiter_throttled", || fetch(&vm).map(drop))?;

    patch(per_second(NET_RATE), disabled())?;
    assert_slow(fetch(&vm)?, NET_AMOUNT, NET_RATE);
    assert!(vm.counted("net", "rx_event_rate_limiter_count")? > 0);
    assert_free(&vm, "net", "tx_rate_limiter_throttled", || send(&vm).map(drop))?;

    patch(disabled(), Value::Null)?;
    assert_free(&vm, "net", "rx_rate_limiter_throttled", || fetch(&vm).map(drop))
}

#[test]
fn a_flood_on_the_console_is_cut_and_the_guest_goes_on() -> Result {
    let scratch = Scratch::new("limits")?;
    let console = scratch.join("console");
    let hourly = json!({"size": 1000, "refill_time": 3_600_000});
    let serial = json!({"serial_out_path": console, "rate_limiter": hourly});
    let vm = TestVm::new("limits-console")
        .boot_arg("debug ignore_loglevel")
        .section("serial", serial)
        .start()?;
    let dropped = |least: u64| {
        wait_until("output beyond the limit", GUEST_TIMEOUT, || {
            vm.counted("uart", "rate_limiter_dropped_bytes")
                .is_ok_and(|dropped| dropped > least)
        })
    };
    dropped(1000)?;
    dropped(5000)?;
    // A byte every 3.6 s may have come in the meantime.
    let written = std::fs::read(&console)?.len();
    assert!((1000..1100).contains(&written), "{written} bytes");
    Ok(())
}
