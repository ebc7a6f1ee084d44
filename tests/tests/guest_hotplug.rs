//! Devices that come and go while the guest runs, which notices by itself.

use std::net::Ipv4Addr;

use mayfly_tests::{Drive, Guest, Result, Scratch, Tap, TestVm, Vm, pattern, zeros};
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
    let content = pattern(8 * MIB);
    let image = scratch.file("hot", &content)?;
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
    let guest = vm.guest();
    let tap = Tap::create("mfhot0", Ipv4Addr::new(10, 79, 0, 1))?;
    let config = json!({"iface_id": "hot", "host_dev_name": tap.name(), "guest_mac": "06:00:0a:4f:00:02"});
    put(vm, "network-interfaces", "hot", &config)?;
    await_in(guest, "[ -e /sys/class/net/eth0 ]")?;
    assert_eq!(
        guest.check("cat /sys/class/net/eth0/address")?,
        "06:00:0a:4f:00:02"
    );
    guest.check("ip addr add 10.79.0.2/24 dev eth0 && ip link set eth0 up && ping -c 3 10.79.0.1")?;

    delete(vm, "/network-interfaces/hot", r#"{"timeout_ms": 20000}"#)?;
    guest.check("! [ -e /sys/class/net/eth0 ]")?;
    assert!(ids(vm, "network-interfaces", "iface_id")?.is_empty());
    Ok(())
}

fn assert_pmem_comes_and_goes(vm: &Vm, scratch: &Scratch) -> Result {
    let guest = vm.guest();
    let file = scratch.file("pmem", pattern(4 * MIB))?;
    put(vm, "pmem", "hot", &json!({"id": "hot", "path_on_host": file}))?;
    await_in(guest, "[ -b /dev/pmem0 ]")?;
    guest.check("dd if=/dev/pmem0 bs=1M count=4 | cmp - /dev/vda -n 4194304")?;

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
    let base = scratch.file("base", pattern(8 * MIB))?;
    let vm = TestVm::new("hotplug").drive(Drive::new("base", base)).boot()?;

    assert_a_disk_comes_and_goes(&vm, &scratch)?;
    assert_a_network_card_comes_and_goes(&vm)?;
    assert_pmem_comes_and_goes(&vm, &scratch)?;
    assert_a_disk_can_be_taken_away(&vm, &scratch)
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

/// Descriptors, mappings and threads of the monitor.
fn holdings(vm: &Vm) -> Result<(usize, usize, usize)> {
    let process = |what: &str| format!("/proc/{}/{what}", vm.pid());
    let maps = std::fs::read_to_string(process("maps"))?;
    let count = |what: &str| -> Result<usize> { Ok(std::fs::read_dir(process(what))?.count()) };
    Ok((count("fd")?, maps.lines().count(), count("task")?))
}

#[test]
fn plugging_again_and_again_leaks_nothing_and_loses_no_io() -> Result {
    let scratch = Scratch::new("hotplug-cycles")?;
    let base = scratch.file("base", pattern(8 * MIB))?;
    let work = scratch.join("work");
    zeros(&work, 8 << 20)?;
    let hot = scratch.file("hot", pattern(MIB))?;
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
        Err(_) => 12,
    };
    let mut before = None;
    for cycle in 0..cycles {
        put(&vm, "drives", "hot", &drive("hot", &hot))?;
        guest.disk("hot")?;
        delete(&vm, "/drives/hot", r#"{"timeout_ms": 30000}"#)?;
        // What the first cycles allocate stays for the next.
        if cycle == 3 {
            before = Some(holdings(&vm)?);
        }
    }
    assert_eq!(before, Some(holdings(&vm)?));
    guest.check("touch /tmp/end")?;
    await_in(guest, "[ -e /tmp/ended ]")?;
    guest.check("! [ -e /tmp/bad ]")?;
    Ok(())
}
