//! The balloon with a real driver: what it takes away and gives back, seen by the guest and in the monitor's memory.

use std::thread;
use std::time::Duration;

use mayfly_tests::{Failure, GUEST_TIMEOUT, Result, TestVm, Vm, wait_until};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
/// Memory of the guests, in MiB.
const MEMORY: usize = 256;
/// What a guest uses once and then frees, in MiB.
const USED: u64 = 144;

fn boot(name: &str, balloon: Value) -> Result<Vm> {
    vm(name, balloon).boot()
}

fn vm(name: &str, balloon: Value) -> TestVm {
    let vm = TestVm::new(name).mem_mib(MEMORY);
    vm.section("balloon", balloon)
}

/// A field of the guest's /proc/meminfo, in MiB.
fn meminfo(vm: &Vm, field: &str) -> Result<u64> {
    let line = vm.guest().check(&format!("grep '^{field}:' /proc/meminfo"))?;
    let kib = line.split_whitespace().nth(1).unwrap_or_default();
    Ok(kib.parse::<u64>()? >> 10)
}

fn set_target(vm: &Vm, amount_mib: u64) -> Result {
    vm.patch("/balloon", &json!({"amount_mib": amount_mib}))?
        .success()
        .map(drop)
}

fn statistics(vm: &Vm) -> Result<Value> {
    vm.get("/balloon/statistics")?.json()
}

fn wait_for_size(vm: &Vm, mib: u64) -> Result {
    wait_for(vm, &format!("a balloon of {mib} MiB"), || {
        Ok(statistics(vm)?["actual_mib"] == mib)
    })
}

fn wait_for(vm: &Vm, what: &str, mut done: impl FnMut() -> Result<bool>) -> Result {
    let waited = wait_until(what, GUEST_TIMEOUT, || done().unwrap_or(false));
    waited.map_err(|failure| vm.failure(&failure.to_string()))
}

/// The size is only shown together with statistics, which the guest is asked for so rarely that none come here.
fn plain() -> Value {
    json!({"amount_mib": 0, "deflate_on_oom": false, "stats_polling_interval_s": 3600})
}

fn assert_it_takes_and_gives_back(vm: &Vm) -> Result {
    vm.use_and_free(USED)?;
    let (free, used) = (meminfo(vm, "MemAvailable")?, vm.resident_bytes()?);

    set_target(vm, 128)?;
    wait_for_size(vm, 128)?;
    let (less, given) = (meminfo(vm, "MemAvailable")?, vm.resident_bytes()?);
    assert!(less + 120 < free, "the guest had {free} MiB and has {less}");
    // A part of what it took had never been touched.
    assert!(
        given + 64 * MIB < used,
        "the host had given {used}, and has {given} still"
    );

    set_target(vm, 0)?;
    wait_for_size(vm, 0)?;
    let again = meminfo(vm, "MemAvailable")?;
    assert!(again + 8 > free, "the guest had {free} MiB and has {again}");
    vm.use_and_free(USED)?;
    assert!(vm.counted("balloon", "inflate_count")? >= 128);
    assert!(vm.counted("balloon", "deflate_count")? >= 128);
    assert_eq!(vm.counted("balloon", "event_fails")?, 0);
    Ok(())
}

#[test]
fn inflating_takes_memory_and_deflating_gives_it_back_on_pci() -> Result {
    assert_it_takes_and_gives_back(&boot("balloon-pci", plain())?)
}

#[test]
fn inflating_takes_memory_and_deflating_gives_it_back_on_mmio() -> Result {
    assert_it_takes_and_gives_back(&vm("balloon-mmio", plain()).mmio().boot()?)
}

#[test]
fn a_target_set_before_the_start_is_reached() -> Result {
    let balloon = json!({"amount_mib": 100, "deflate_on_oom": false, "stats_polling_interval_s": 3600});
    let vm = boot("balloon-early", balloon)?;
    wait_for_size(&vm, 100)?;
    set_target(&vm, 50)?;
    wait_for_size(&vm, 50)?;
    assert_eq!(vm.get("/balloon")?.json()?["amount_mib"], 50);
    Ok(())
}

#[test]
fn statistics_tell_of_the_guest_and_come_as_often_as_asked() -> Result {
    let vm = boot("balloon-stats", plain())?;
    // The driver tells once by itself.
    wait_for(
        &vm,
        "statistics",
        || Ok(statistics(&vm)?["total_memory"].is_u64()),
    )?;
    let told = statistics(&vm)?;
    let mib = |name: &str| told[name].as_u64().map(|bytes| bytes >> 20);
    let total = meminfo(&vm, "MemTotal")?;
    assert_eq!(mib("total_memory"), Some(total), "{told}");
    assert!(
        mib("free_memory") < mib("total_memory") && mib("available_memory") > Some(64),
        "{told}"
    );
    let page_faults = told["minor_faults"].as_u64();
    assert!(page_faults > Some(0), "{told}");

    let every_second = json!({"stats_polling_interval_s": 1});
    vm.patch("/balloon/statistics", &every_second)?.success()?;
    let more_page_faults = |vm: &Vm, before| {
        vm.guest().check("true")?;
        wait_for(vm, "another set", || {
            Ok(statistics(vm)?["minor_faults"].as_u64() > before)
        })?;
        Ok::<_, Failure>(statistics(vm)?["minor_faults"].as_u64())
    };
    // A command in the guest takes page faults.
    let page_faults = more_page_faults(&vm, page_faults)?;
    more_page_faults(&vm, page_faults)?;
    assert!(vm.counted("balloon", "stats_updates_count")? >= 3);
    assert_eq!(vm.get("/balloon")?.json()?["stats_polling_interval_s"], 1);
    assert_eq!(vm.counted("balloon", "stats_update_fails")?, 0);
    vm.patch("/balloon/statistics", &json!({"stats_polling_interval_s": 0}))?
        .assert_refused(&["Statistics cannot be enabled/disabled after activation."]);
    Ok(())
}

#[test]
fn a_guest_short_of_memory_takes_some_back_from_the_balloon() -> Result {
    let balloon = json!({"amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 3600});
    let vm = boot("balloon-oom", balloon)?;
    let target = meminfo(&vm, "MemAvailable")? - 32;
    set_target(&vm, target)?;
    wait_for_size(&vm, target)?;
    vm.guest().check(
        "mkdir -p /ram && mount -t tmpfs -o size=90% none /ram && dd if=/dev/zero of=/ram/file bs=1M count=64",
    )?;
    let actual = statistics(&vm)?["actual_mib"].as_u64();
    assert!(actual < Some(target), "{actual:?} of {target} MiB");
    assert!(vm.counted("balloon", "deflate_count")? > 0);
    Ok(())
}

fn hinting_status(vm: &Vm) -> Result<Value> {
    vm.get("/balloon/hinting/status")?.json()
}

#[test]
fn a_hinting_run_gives_free_pages_back_and_the_guest_goes_on() -> Result {
    let vm = boot(
        "balloon-hints",
        json!({"amount_mib": 0, "deflate_on_oom": false, "free_page_hinting": true}),
    )?;
    vm.use_and_free(USED)?;
    let (free, used) = (meminfo(&vm, "MemAvailable")?, vm.resident_bytes()?);
    assert_eq!(hinting_status(&vm)?, json!({"host_cmd": 0, "guest_cmd": null}));
    vm.request("PATCH", "/balloon/hinting/start", "")?.success()?;
    wait_for(&vm, "the end of the run", || {
        Ok(hinting_status(&vm)? == json!({"host_cmd": 1, "guest_cmd": 0}))
    })?;
    let given = vm.resident_bytes()?;
    assert!(
        given + 100 * MIB < used,
        "the host had given {used}, and has {given} still"
    );
    assert!(vm.counted("balloon", "free_page_hint_freed")? > 100 * MIB);
    assert_eq!(vm.counted("balloon", "free_page_hint_fails")?, 0);
    let again = meminfo(&vm, "MemAvailable")?;
    assert!(again + 8 > free, "the guest had {free} MiB and has {again}");
    vm.use_and_free(USED)?;
    assert_the_guest_keeps_hinted_pages_until_the_stop(&vm)
}

fn assert_the_guest_keeps_hinted_pages_until_the_stop(vm: &Vm) -> Result {
    vm.patch("/balloon/hinting/start", &json!({"acknowledge_on_stop": false}))?
        .success()?;
    wait_for(vm, "the end of the hints", || {
        Ok(hinting_status(vm)? == json!({"host_cmd": 3, "guest_cmd": 0}))
    })?;
    let kept = meminfo(vm, "MemFree")?;
    vm.request("PATCH", "/balloon/hinting/stop", "")?.success()?;
    wait_for(vm, "the return of the hinted pages", || {
        Ok(meminfo(vm, "MemFree")? > kept + 64)
    })
}

#[test]
fn reporting_gives_freed_memory_back_by_itself() -> Result {
    let vm = boot(
        "balloon-reports",
        json!({"amount_mib": 0, "deflate_on_oom": false, "free_page_reporting": true}),
    )?;
    let used = vm.use_and_free(USED)?;
    wait_for(&vm, "100 MiB to come back", || {
        Ok(vm.resident_bytes()? + 100 * MIB < used)
    })?;
    assert!(vm.counted("balloon", "free_page_report_freed")? > 100 * MIB);
    vm.use_and_free(USED)?;
    assert_eq!(vm.counted("balloon", "free_page_report_fails")?, 0);
    Ok(())
}

#[test]
fn an_idle_balloon_wakes_nobody_up() -> Result {
    let balloon = json!({
        "amount_mib": 64, "deflate_on_oom": true, "free_page_hinting": true, "stats_polling_interval_s": 0,
    });
    let vm = boot("balloon-idle", balloon)?;
    wait_for(&vm, "64 MiB to be inflated", || {
        Ok(vm.counted("balloon", "inflate_count")? >= 64)
    })?;
    // By now the driver has written its size, too.
    vm.guest().check("true")?;
    let before = vm.io_sleeps()?;
    thread::sleep(Duration::from_secs(3));
    assert_eq!(vm.io_sleeps()?, before);
    Ok(())
}
