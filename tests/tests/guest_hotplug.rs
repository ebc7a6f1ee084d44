//! Devices that come and go while the guest runs, which notices by itself.

use mayfly_tests::network::{Network, Subnet, assert_guest_fetches_in, assert_guest_sends_in, plug};
use mayfly_tests::{Drive, GUEST_TIMEOUT, Guest, Result, Scratch, TestVm, Vm, pattern, wait_until, zeros};
use serde_json::{Value, json};

const MIB: usize = 1 << 20;

/// Waits until a shell condition holds in the guest.
fn await_in(guest: Guest<'_>, condition: &str) -> Result<String> {
    guest.check(&format!(
        "n=0; until {condition}; do n=$((n + 1)); [ $n -lt 300 ] || exit 1; sleep 0.1; done"
    ))
}

fn put(vm: &Vm, resource: &str, id: &str, config: &Value) -> Result {
    vm.put(&format!("/{resource}/{id}"), config)?.success().map(drop)
}

fn delete(vm: &Vm, path: &str, body: &str) -> Result {
    vm.request("DELETE", path, body)?.success().map(drop)
}

fn ids(vm: &Vm, section: &str, key: &str) -> Result<Vec<String>> {
    let config = vm.get("/vm/config")?.json()?;
    let items = config[section].as_array().cloned().unwrap_or_default();
    Ok(items
        .iter()
        .filter_map(|item| item[key].as_str().map(str::to_owned))
        .collect())
}

fn drive(id: &str, path: &std::path::Path) -> Value {
    json!({"drive_id": id, "path_on_host": path, "is_root_device": false, "cache_type": "Writeback"})
}

fn assert_a_disk_comes_and_goes(vm: &Vm, scratch: &Scratch) -> Result {
    let guest = vm.guest();
    let image = scratch.file("hot", pattern(Network::AMOUNT))?;
    put(vm, "drives", "hot", &drive("hot", &image))?;
    let name = guest.disk("hot")?;
    let sum = guest.check(&format!("md5sum < /dev/{name}"))?;
    assert_eq!(sum, guest.check("md5sum < /dev/vda")?);
    guest.check(&format!("echo changed | dd of=/dev/{name} conv=notrunc,fsync"))?;
    assert!(std::fs::read(&image)?.starts_with(b"changed\n"));
    assert_eq!(ids(vm, "drives", "drive_id")?, ["base", "hot"]);

    delete(vm, "/drives/hot", "")?;
    assert_eq!(ids(vm, "drives", "drive_id")?, ["base"]);
    guest.check(&format!(
        "! grep -qsx hot /sys/block/*/serial && ! [ -e /dev/{name} ]"
    ))?;
    Ok(())
}

fn assert_a_network_card_comes_and_goes(vm: &Vm) -> Result {
    let (guest, subnet) = (vm.guest(), Subnet(60));
    let mac = "06:00:0a:4d:3c:02";
    let _tap = plug(vm, "hot", subnet, |card| card.with("guest_mac", mac))?;
    assert_eq!(guest.check("cat /sys/class/net/eth0/address")?, mac);
    assert_guest_sends_in(vm, subnet)?;
    assert_guest_fetches_in(vm, subnet)?;
    for name in ["tx_bytes_count", "rx_bytes_count"] {
        let bytes = vm.counted("net_hot", name)?;
        assert!(bytes > u64::try_from(Network::AMOUNT)?, "{name}: {bytes}");
        assert_eq!(vm.counted("net", name)?, bytes);
    }

    delete(vm, "/network-interfaces/hot", r#"{"timeout_ms": 20000}"#)?;
    guest.check("! [ -e /sys/class/net/eth0 ]")?;
    assert!(ids(vm, "network-interfaces", "iface_id")?.is_empty());
    Ok(())
}

fn assert_pmem_comes_and_goes(vm: &Vm, scratch: &Scratch) -> Result {
    let guest = vm.guest();
    let file = scratch.file("pmem", pattern(Network::AMOUNT))?;
    put(vm, "pmem", "hot", &json!({"id": "hot", "path_on_host": file}))?;
    await_in(guest, "[ -b /dev/pmem0 ]")?;
    guest.check("cmp /dev/pmem0 /dev/vda")?;
    let flushes = vm.counted("pmem_hot", "queue_event_count")?;
    guest.check("echo changed | dd of=/dev/pmem0 conv=notrunc,fsync")?;
    assert!(std::fs::read(&file)?.starts_with(b"changed\n"));
    assert!(vm.counted("pmem_hot", "queue_event_count")? > flushes);
    assert_eq!(vm.counted("pmem_hot", "event_fails")?, 0);

    delete(vm, "/pmem/hot", r#"{"timeout_ms": 20000}"#)?;
    guest.check("! [ -e /dev/pmem0 ]")?;
    assert!(ids(vm, "pmem", "id")?.is_empty());
    Ok(())
}

/// A device that is taken away without a question is missed by the guest, which lives on.
fn assert_a_disk_can_be_taken_away(vm: &Vm, scratch: &Scratch) -> Result {
    let guest = vm.guest();
    let image = scratch.file("lost", pattern(MIB))?;
    put(vm, "drives", "lost", &drive("lost", &image))?;
    let name = guest.disk("lost")?;
    delete(vm, "/drives/lost", r#"{"force": true}"#)?;
    await_in(guest, &format!("! [ -e /sys/block/{name} ]"))?;
    // The guest is well, and its next disk may come to the same place.
    put(vm, "drives", "next", &drive("next", &image))?;
    guest.disk("next")?;
    // It does at once when the guest hears of both together: the old one goes first.
    vm.pause()?;
    delete(vm, "/drives/next", r#"{"force": true}"#)?;
    put(vm, "drives", "last", &drive("last", &image))?;
    vm.resume()?;
    guest.disk("last")?;
    delete(vm, "/drives/last", r#"{"timeout_ms": 20000}"#)
}

#[test]
fn a_guest_notices_what_is_plugged_and_lets_go_when_asked() -> Result {
    let scratch = Scratch::new("hotplug")?;
    let base = scratch.file("base", pattern(Network::AMOUNT))?;
    let vm = TestVm::new("hotplug").drive(Drive::new("base", base)).boot()?;

    assert_a_disk_comes_and_goes(&vm, &scratch)?;
    assert_a_network_card_comes_and_goes(&vm)?;
    assert_pmem_comes_and_goes(&vm, &scratch)?;
    assert_a_disk_can_be_taken_away(&vm, &scratch)
}

/// A guest whose driver waits for a disk lets go of it only when that has answered.
#[test]
fn a_disk_that_is_let_go_of_too_late_comes_back() -> Result {
    let scratch = Scratch::new("hotplug-late")?;
    let base = scratch.file("base", pattern(8 * MIB))?;
    let slow = scratch.file("slow", pattern(8 * MIB))?;
    let vm = TestVm::new("hotplug-late")
        .drive(Drive::new("base", base))
        .boot()?;
    let guest = vm.guest();
    put(&vm, "drives", "slow", &drive("slow", &slow))?;
    let name = guest.disk("slow")?;
    let first = guest.check(&format!("cat /sys/block/{name}/diskseq"))?;
    let limit = |ops: Value| {
        let patch = json!({"drive_id": "slow", "rate_limiter": {"ops": ops}});
        vm.patch("/drives/slow", &patch)?.success().map(drop)
    };
    limit(json!({"size": 1, "refill_time": 3_600_000}))?;
    guest.check(&format!(
        "dd if=/dev/{name} of=/dev/null bs=4k count=8 iflag=direct >/dev/null 2>&1 &"
    ))?;
    wait_until("a read waits", GUEST_TIMEOUT, || {
        let held = vm.counted("block_slow", "rate_limiter_throttled_events");
        held.is_ok_and(|held| held > 0)
    })?;
    let asked = vm.request("DELETE", "/drives/slow", r#"{"timeout_ms": 3000}"#)?;
    asked.assert_refused(&["slow", "still attached"]);

    limit(json!({"size": 0, "refill_time": 0}))?;
    await_in(
        guest,
        &format!("grep -qsvx {first} $(dirname $(grep -lsx slow /sys/block/*/serial))/diskseq"),
    )?;
    let name = guest.disk("slow")?;
    assert_eq!(
        guest.check(&format!("md5sum < /dev/{name}"))?,
        guest.check("md5sum < /dev/vda")?
    );
    assert_eq!(ids(&vm, "drives", "drive_id")?, ["base", "slow"]);
    delete(&vm, "/drives/slow", r#"{"timeout_ms": 20000}"#)
}

#[test]
fn thirty_disks_fit_beside_the_first() -> Result {
    let scratch = Scratch::new("hotplug-many")?;
    let image = scratch.join("image");
    zeros(&image, 1 << 20)?;
    let vm = TestVm::new("hotplug-many")
        .drive(Drive::new("base", &image).read_only())
        .boot()?;
    let shared = |id: &str| {
        let mut drive = drive(id, &image);
        drive["is_read_only"] = true.into();
        drive
    };
    for number in 0..30 {
        let id = format!("d{number}");
        put(&vm, "drives", &id, &shared(&id))?;
    }
    await_in(vm.guest(), "[ $(ls -d /sys/block/vd* | wc -l) = 31 ]")?;
    let full = vm.put("/drives/more", &shared("more"))?;
    full.assert_refused(&["more", "slot"]);
    Ok(())
}

/// What the machine has at a time.
#[derive(Debug, PartialEq, Eq)]
struct Holdings {
    /// Descriptors, mappings and threads of the monitor.
    monitor: [usize; 3],
    /// The guest's count of interrupts, and the BARs of all devices.
    guest: String,
}

fn holdings(vm: &Vm) -> Result<Holdings> {
    let process = |what: &str| format!("/proc/{}/{what}", vm.pid());
    let maps = std::fs::read_to_string(process("maps"))?;
    let count = |what: &str| -> Result<usize> { Ok(std::fs::read_dir(process(what))?.count()) };
    let guest = vm
        .guest()
        .check("wc -l </proc/interrupts && grep ' : 0000:' /proc/iomem")?;
    Ok(Holdings {
        monitor: [count("fd")?, maps.lines().count(), count("task")?],
        guest,
    })
}

/// Attaches one device, waits until the guest has it, and detaches it: a drive, a network card and a pmem device by turns.
fn plug_in_turn(vm: &Vm, turn: u32, file: &std::path::Path) -> Result {
    match turn % 3 {
        0 => {
            put(vm, "drives", "hot", &drive("hot", file))?;
            vm.guest().disk("hot")?;
            delete(vm, "/drives/hot", r#"{"timeout_ms": 30000}"#)
        }
        1 => {
            let _tap = plug(vm, "hot", Subnet(61), |card| card)?;
            delete(vm, "/network-interfaces/hot", r#"{"timeout_ms": 30000}"#)
        }
        _ => {
            put(vm, "pmem", "hot", &json!({"id": "hot", "path_on_host": file}))?;
            await_in(vm.guest(), "[ -b /dev/pmem0 ]")?;
            delete(vm, "/pmem/hot", r#"{"timeout_ms": 30000}"#)
        }
    }
}

#[test]
fn plugging_again_and_again_leaks_nothing_and_loses_no_io() -> Result {
    let scratch = Scratch::new("hotplug-cycles")?;
    let base = scratch.file("base", pattern(8 * MIB))?;
    let work = scratch.join("work");
    zeros(&work, 8 << 20)?;
    let hot = scratch.file("hot", pattern(2 * MIB))?;
    let vm = TestVm::new("hotplug-cycles")
        .drive(Drive::new("base", base))
        .drive(Drive::new("work", &work).writeback())
        .vcpus(2)
        .boot()?;
    let guest = vm.guest();
    guest.check(
        "(while ! [ -e /tmp/end ]; do dd if=/dev/vda of=/dev/vdb bs=64k conv=fsync 2>/dev/null || touch /tmp/bad; \
         cmp /dev/vda /dev/vdb || touch /tmp/bad; done; touch /tmp/ended) >/dev/null 2>&1 &",
    )?;
    let cycles: u32 = match std::env::var("MAYFLY_HOTPLUG_CYCLES") {
        Ok(cycles) => cycles.parse()?,
        Err(_) => 15,
    };
    let mut before = None;
    for cycle in 0..cycles {
        plug_in_turn(&vm, cycle, &hot)?;
        // What the first cycles of each kind allocate stays for the next.
        if cycle == 8 {
            before = Some(holdings(&vm)?);
        }
    }
    assert_eq!(before, Some(holdings(&vm)?));
    guest.check("touch /tmp/end")?;
    await_in(guest, "[ -e /tmp/ended ]")?;
    guest.check("! [ -e /tmp/bad ]")?;
    Ok(())
}
