//! Memory that is plugged in and out: what Linux makes of it, and what the host gives and gets back.

use mayfly_tests::{Drive, GUEST_TIMEOUT, Guest, GuestImage, Result, Scratch, TestVm, Vm, wait_until};
use serde_json::json;

const MIB: u64 = 1 << 20;

fn boot(vm: TestVm) -> Result<Vm> {
    let vm = vm.memory_hotplug(512).boot()?;
    // Memory in the movable zone can always be given back.
    vm.guest()
        .check("echo online_movable >/sys/devices/system/memory/auto_online_blocks")?;
    Ok(vm)
}

fn status(vm: &Vm, field: &str) -> Result<u64> {
    Ok(vm.get("/hotplug/memory")?.success()?.json()?[field]
        .as_u64()
        .unwrap_or_default())
}

/// Requests an amount, and waits until the guest has it.
fn resize(vm: &Vm, mib: u64) -> Result {
    vm.patch("/hotplug/memory", &json!({"requested_size_mib": mib}))?
        .success()?;
    assert_eq!(status(vm, "requested_size_mib")?, mib);
    wait_until(&format!("{mib} MiB plugged"), GUEST_TIMEOUT, || {
        status(vm, "plugged_size_mib").is_ok_and(|plugged| plugged == mib)
    })
}

/// The guest's memory in MiB.
fn total(guest: &Guest) -> Result<u64> {
    let kib = guest.check("awk '/^MemTotal/ {print $2}' /proc/meminfo")?;
    Ok(kib.parse::<u64>()? / 1024)
}

/// The guest fills a file in memory that is larger than all it had at first.
fn fill(guest: &Guest) -> Result {
    guest.check("mkdir -p /big && mount -t tmpfs -o size=100% tmpfs /big && dd if=/dev/zero of=/big/file bs=1M count=200")?;
    Ok(())
}

fn assert_memory_comes_and_goes(vm: &Vm) -> Result {
    let guest = vm.guest();
    let before = total(&guest)?;
    resize(vm, 256)?;
    let more = total(&guest)? - before;
    assert!((240..=256).contains(&more), "{more} MiB more");

    let small = vm.resident_bytes()?;
    fill(&guest)?;
    let large = vm.resident_bytes()?;
    assert!(large > small + 180 * MIB, "{small} bytes, then {large}");

    guest.check("umount /big")?;
    resize(vm, 0)?;
    assert_eq!(total(&guest)?, before);
    let after = vm.resident_bytes()?;
    assert!(after < large - 180 * MIB, "{large} bytes, then {after}");
    Ok(())
}

#[test]
fn memory_on_pci_comes_and_goes() -> Result {
    let vm = boot(TestVm::new("hotplug-pci").mem_mib(192))?;
    assert_eq!(
        vm.get("/hotplug/memory")?.success()?.body,
        concat!(
            r#"{"block_size_mib":2,"total_size_mib":512,"slot_size_mib":128,"#,
            r#""plugged_size_mib":0,"requested_size_mib":0}"#
        )
    );
    assert_memory_comes_and_goes(&vm)?;
    assert_eq!(vm.counted("memory_hotplug", "plug_bytes")?, 256 * MIB);
    assert_eq!(vm.counted("memory_hotplug", "unplug_bytes")?, 256 * MIB);
    assert_eq!(vm.counted("memory_hotplug", "plug_fails")?, 0);
    Ok(())
}

#[test]
fn memory_on_mmio_comes_and_goes() -> Result {
    assert_memory_comes_and_goes(&boot(
        TestVm::new("hotplug-mmio").mem_mib(192).mmio().config_file(),
    )?)
}

#[test]
fn devices_reach_memory_that_was_plugged_in() -> Result {
    let scratch = Scratch::new("hotplug")?;
    let image = scratch.join("image");
    std::fs::copy(GuestImage::Rootfs.path()?, &image)?;
    let vm = boot(TestVm::new("hotplug-dma").drive(Drive::new("image", &image)))?;
    resize(&vm, 256)?;
    let guest = vm.guest();
    guest.check(
        "mkdir /mnt && mount -t ext4 /dev/vda /mnt && dd if=/dev/urandom of=/mnt/file bs=1M count=16",
    )?;
    let sum = guest.check("sha256sum /mnt/file; sync; echo 3 >/proc/sys/vm/drop_caches")?;
    assert_eq!(guest.check("sha256sum /mnt/file")?, sum);
    // Linux takes pages for files from the movable zone first, and that has plugged memory only.
    let pages = "awk '/^Node/ {zone = $4} zone == \"Movable\" && /nr_zone_(in)?active_file/ {sum += $2} END {print sum}'";
    let pages: usize = guest.check(&format!("{pages} /proc/zoneinfo"))?.parse()?;
    // A few may lie elsewhere.
    assert!(pages >= (15 << 20) / 4096, "{pages} pages of files");
    Ok(())
}

#[test]
fn a_pause_keeps_plugged_memory_and_a_request_is_seen_after_it() -> Result {
    let vm = boot(TestVm::new("hotplug-pause"))?;
    resize(&vm, 128)?;
    vm.pause()?;
    vm.patch("/hotplug/memory", &json!({"requested_size_mib": 130}))?
        .success()?;
    assert_eq!(status(&vm, "plugged_size_mib")?, 128);
    vm.resume()?;
    wait_until("the rest is plugged", GUEST_TIMEOUT, || {
        status(&vm, "plugged_size_mib").is_ok_and(|plugged| plugged == 130)
    })?;
    assert_eq!(
        vm.get("/vm/config")?.json()?["memory-hotplug"]["total_size_mib"],
        512
    );
    Ok(())
}
