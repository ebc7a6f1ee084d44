//! Kinds of pages behind guest memory, as they are asked for; the guest is a few instructions.

use std::fs;
use std::time::Instant;

use mayfly_tests::{
    HOST_TIMEOUT, Monitor, MonitorBuilder, Response, Result, Scratch, TestVm, TinyKernel, Vm,
};
use serde_json::json;

/// A monitor with a kernel to boot.
fn monitor() -> Result<Monitor> {
    let monitor = MonitorBuilder::new("memory")?.start()?;
    let path = monitor.dir().join("kernel");
    std::fs::write(&path, TinyKernel::new().halt().elf())?;
    monitor
        .put("/boot-source", &json!({"kernel_image_path": path}))?
        .success()?;
    Ok(monitor)
}

fn start(monitor: &Monitor) -> Result<Response> {
    monitor.put("/actions", &json!({"action_type": "InstanceStart"}))
}

#[test]
fn dirty_page_tracking_and_huge_pages_are_shown() -> Result {
    let monitor = monitor()?;
    for pages in ["2M", "Transparent", "None"] {
        let machine =
            json!({"vcpu_count": 1, "mem_size_mib": 128, "track_dirty_pages": true, "huge_pages": pages});
        monitor.put("/machine-config", &machine)?.success()?;
        let expected = format!(
            r#"{{"vcpu_count":1,"mem_size_mib":128,"smt":false,"track_dirty_pages":true,"huge_pages":"{pages}"}}"#
        );
        assert_eq!(monitor.get("/machine-config")?.body, expected);
    }
    Ok(())
}

#[test]
fn huge_pages_need_an_even_size() -> Result {
    let monitor = monitor()?;
    for pages in ["2M", "Transparent"] {
        monitor
            .put(
                "/machine-config",
                &json!({"vcpu_count": 1, "mem_size_mib": 129, "huge_pages": pages}),
            )?
            .assert_refused(&["Machine config error", "mem_size_mib is 129", "multiple of 2"]);
    }
    let odd = json!({"vcpu_count": 1, "mem_size_mib": 129});
    monitor.put("/machine-config", &odd)?.success()?;
    monitor
        .patch("/machine-config", &json!({"huge_pages": "2M"}))?
        .assert_refused(&["multiple of 2"]);
    Ok(())
}

#[test]
fn a_machine_of_huge_pages_that_are_not_there_is_refused_with_the_remedy() -> Result {
    let monitor = monitor()?;
    let machine = json!({"vcpu_count": 1, "mem_size_mib": 262_144, "huge_pages": "2M"});
    monitor.put("/machine-config", &machine)?.success()?;
    start(&monitor)?.assert_refused(&["Start microvm error", "131072 free huge pages", "nr_hugepages"]);
    monitor
        .patch(
            "/machine-config",
            &json!({"huge_pages": "Transparent", "mem_size_mib": 128}),
        )?
        .success()?;
    start(&monitor)?.success()?;
    Ok(())
}

#[test]
fn a_machine_whose_dirty_pages_are_tracked_starts() -> Result {
    let monitor = monitor()?;
    let machine = json!({"vcpu_count": 1, "mem_size_mib": 128, "track_dirty_pages": true});
    monitor.put("/machine-config", &machine)?.success()?;
    start(&monitor)?.success()?;
    assert_eq!(monitor.get("/machine-config")?.json()?["track_dirty_pages"], true);
    Ok(())
}

/// KiB that a process has mapped of the file at `path` and shares with others.
fn shared_kib(vm: &Vm, path: &str) -> Result<u64> {
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", vm.pid()))?;
    let (mut is_of_file, mut sum) = (false, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            // A file that was just written can still be dirty.
            Some("Shared_Clean:" | "Shared_Dirty:") if is_of_file => {
                sum += words.next().unwrap_or_default().parse::<u64>()?;
            }
            Some(first) if !first.ends_with(':') => is_of_file = line.ends_with(path),
            _ => {}
        }
    }
    Ok(sum)
}

#[test]
fn what_a_kernel_does_not_write_is_not_read_by_the_monitor_and_is_shared() -> Result {
    const DATA: u64 = 32 << 20;
    let scratch = Scratch::new("shared-kernel")?;
    let kernel = TinyKernel::new()
        .read_data(u32::try_from(DATA >> 12)?)
        .print("up\n")
        .halt();
    let path = kernel.write(&scratch)?;
    let start = |name| -> Result<Vm> {
        let vm = TestVm::new(name).kernel(&path).start()?;
        assert!(vm.console().wait_for("up\n", Instant::now() + HOST_TIMEOUT));
        Ok(vm)
    };
    let (first, second) = (start("first")?, start("second")?);

    let io = fs::read_to_string(format!("/proc/{}/io", second.pid()))?;
    let read = io.lines().find_map(|line| line.strip_prefix("rchar: "));
    let read: u64 = read.unwrap_or_default().parse()?;
    assert!(read < DATA / 4, "{read} bytes were read");
    for vm in [&first, &second] {
        let shared = shared_kib(vm, &path.to_string_lossy())?;
        assert!(shared >= DATA / 1024, "{shared} KiB are shared");
    }
    Ok(())
}
