//! Kinds of pages behind guest memory, seen from the host. The host's settings are changed for these tests, and put back.

use mayfly_tests::{HostSetting, Result, TestVm, Vm};
use serde_json::json;

const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

fn number(path: &str) -> Result<u64> {
    Ok(std::fs::read_to_string(path)?.trim().parse()?)
}

/// A field of the process's memory mappings in all, in KiB.
fn mapped(vm: &Vm, field: &str) -> Result<u64> {
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", vm.pid()))?;
    let values = smaps.lines().filter_map(|line| line.strip_prefix(field));
    let numbers = values.filter_map(|value| value.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    Ok(numbers.sum())
}

/// A guest with this kind of pages that has filled 64 MiB of its memory.
fn booted(name: &str, huge_pages: &str) -> Result<Vm> {
    let vm = TestVm::new(name)
        .mem_mib(256)
        .machine("huge_pages", json!(huge_pages))
        .boot()?;
    let sum = "dd if=/dev/zero bs=1M count=64 2>/dev/null | tr '\\0' x >/tmp/x && md5sum </tmp/x";
    assert_eq!(vm.guest().check(sum)?, "de506679685541efcb501eac224adc64  -");
    Ok(vm)
}

#[test]
fn reserved_huge_pages_are_used_and_given_back() -> Result {
    let _reserved = HostSetting::reserve_huge_pages(128)?;
    let free = number(FREE)?;
    let vm = booted("pages-2m", "2M")?;
    vm.pause()?;
    let used = mapped(&vm, "Private_Hugetlb:")?;
    assert!((64 << 10..=256 << 10).contains(&used), "{used} KiB");
    assert_eq!(free - number(FREE)?, used / 2048);
    drop(vm);
    assert_eq!(number(FREE)?, free);
    Ok(())
}

#[test]
fn transparent_huge_pages_are_used_on_request() -> Result {
    let _setting = HostSetting::transparent_huge_pages_on_request()?;
    let vm = booted("pages-small", "None")?;
    assert_eq!(mapped(&vm, "AnonHugePages:")?, 0);
    drop(vm);
    let vm = booted("pages-transparent", "Transparent")?;
    let used = mapped(&vm, "AnonHugePages:")?;
    assert!(used >= 32 << 10, "{used} KiB");
    Ok(())
}

#[test]
fn a_guest_works_while_its_writes_are_noted() -> Result {
    let vm = TestVm::new("dirty")
        .vcpus(2)
        .machine("track_dirty_pages", json!(true))
        .boot()?;
    let work =
        "dd if=/dev/urandom of=/tmp/x bs=1M count=8 2>/dev/null && cp /tmp/x /tmp/y && cmp /tmp/x /tmp/y";
    vm.guest().check(work)?;
    assert_eq!(vm.get("/machine-config")?.json()?["track_dirty_pages"], true);
    Ok(())
}
