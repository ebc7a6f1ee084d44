//! Devices with several queues, on several io threads.

use std::path::PathBuf;

use mayfly_tests::{Drive, Result, Scratch, TestVm, Vm, pattern, zeros};
use serde_json::json;

const MIB: usize = 1 << 20;
/// Each part of the disk that a process of its own copies.
const PART: usize = 2 * MIB;

/// A machine with two io threads, an empty disk `out` (vda) and one full of bytes (vdb), both with four queues.
struct Disks {
    vm: Vm,
    out: PathBuf,
    content: Vec<u8>,
    scratch: Scratch,
}

fn boot(vm: TestVm) -> Result<Disks> {
    let scratch = Scratch::new("queues")?;
    let content = pattern(4 * PART);
    let (out, input) = (scratch.join("out"), scratch.file("in", &content)?);
    zeros(&out, u64::try_from(content.len())?)?;
    let vm = vm
        .machine("io_threads", json!(2))
        .drive(Drive::new("out", &out).writeback().with("queues", 4))
        .drive(Drive::new("in", &input).read_only().with("queues", 4))
        .boot()?;
    Ok(Disks {
        vm,
        out,
        content,
        scratch,
    })
}

/// How many queues the guest's driver uses of a disk.
fn queues(vm: &Vm, disk: &str) -> Result<String> {
    vm.guest().check(&format!("ls /sys/block/{disk}/mq | wc -l"))
}

/// Copies the disk in four parts at once, each from a CPU that `cpu` says, and compares the whole on the host.
fn assert_copies(disks: &Disks, cpus: [u32; 4]) -> Result {
    let copy = |(part, cpu): (usize, u32)| {
        let at = part * PART / MIB;
        format!(
            "taskset -c {cpu} dd if=/dev/vdb of=/dev/vda bs=64k count={} skip={} seek={} conv=notrunc,fsync 2>/dev/null &",
            PART >> 16,
            at << 4,
            at << 4
        )
    };
    let copies: Vec<_> = (0..).zip(cpus).map(copy).collect();
    disks.vm.guest().check(&format!("{} wait", copies.join("\n")))?;
    assert!(
        std::fs::read(&disks.out)? == disks.content,
        "the disk differs from what was written"
    );
    Ok(())
}

#[test]
fn a_drive_with_four_queues_uses_all_of_them() -> Result {
    let disks = boot(TestVm::new("queues-pci").vcpus(4))?;
    let vm = &disks.vm;
    assert_eq!((queues(vm, "vda")?, queues(vm, "vdb")?), ("4".into(), "4".into()));
    let before = vm.wakeups()?;
    assert_copies(&disks, [0, 1, 2, 3])?;
    assert_every_queue_interrupts(vm)?;
    for ((id, name), sleeps) in vm.wakeups()? {
        assert!(
            !name.starts_with("io ") || sleeps > before[&(id, name.clone())],
            "thread {name} did nothing"
        );
    }
    let read = u64::try_from(disks.content.len())?;
    assert!(vm.counted("block_in", "read_bytes")? >= read);
    assert_eq!(vm.counted("block", "event_fails")?, 0);
    assert_the_driver_comes_and_goes_under_load(&disks)
}

/// The interrupts of the first disk's queues, one of a vector each.
fn assert_every_queue_interrupts(vm: &Vm) -> Result {
    let lines = vm.guest().check("grep 'virtio[0-9]*-req' /proc/interrupts")?;
    assert_eq!(lines.lines().count(), 8, "{lines}");
    for line in lines.lines() {
        let counts = line.split_whitespace().skip(1).take(4);
        assert!(counts.into_iter().any(|count| count != "0"), "{lines}");
    }
    Ok(())
}

/// A driver that is unbound resets the device, while requests are on their way on both loops.
fn assert_the_driver_comes_and_goes_under_load(disks: &Disks) -> Result {
    let guest = disks.vm.guest();
    guest.check(
        "for cpu in 0 1 2 3; do taskset -c $cpu dd if=/dev/vdb of=/dev/null bs=4k iflag=direct 2>/dev/null & done
         device=$(basename $(readlink /sys/block/vdb/device)); cd /sys/bus/virtio/drivers/virtio_blk
         echo $device >unbind; wait; [ ! -e /sys/block/vdb ]; echo $device >bind
         n=0; until [ -e /dev/vdb ] || [ $n = 50 ]; do usleep 100000; n=$((n+1)); done
         dd if=/dev/zero of=/dev/vda bs=1M count=1 conv=notrunc,fsync 2>/dev/null",
    )?;
    assert_copies(disks, [3, 2, 1, 0])
}

#[test]
fn a_drive_with_four_queues_works_on_mmio_with_two_vcpus() -> Result {
    let disks = boot(TestVm::new("queues-mmio").mmio().vcpus(2))?;
    // Linux uses one for each CPU at most.
    assert_eq!(queues(&disks.vm, "vda")?, "2");
    assert_copies(&disks, [0, 1, 0, 1])?;
    assert_eq!(disks.vm.counted("block", "event_fails")?, 0);
    Ok(())
}

#[test]
fn a_drive_is_paused_and_swapped_under_load_on_all_queues() -> Result {
    let disks = boot(TestVm::new("queues-live").vcpus(2))?;
    let vm = &disks.vm;
    let other = disks.scratch.join("other");
    zeros(&other, u64::try_from(disks.content.len())?)?;
    vm.guest().check(
        "for cpu in 0 1; do (while [ ! -e /tmp/end ]; do taskset -c $cpu dd if=/dev/vdb of=/dev/null bs=4k iflag=direct \
         2>/dev/null || touch /tmp/failed; done) & done",
    )?;
    for _ in 0..5 {
        vm.pause()?;
        vm.resume()?;
    }
    // The content is the same, so whatever is read on the way is right.
    let same = disks.scratch.file("same", &disks.content)?;
    vm.patch("/drives/in", &json!({"drive_id": "in", "path_on_host": same}))?
        .success()?;
    vm.guest().check("touch /tmp/end; wait; [ ! -e /tmp/failed ]")?;
    vm.patch("/drives/out", &json!({"drive_id": "out", "path_on_host": other}))?
        .success()?;
    let swapped = Disks { out: other, ..disks };
    assert_copies(&swapped, [0, 1, 0, 1])
}

#[test]
fn a_drive_with_queues_can_be_plugged_in_while_the_guest_runs() -> Result {
    let scratch = Scratch::new("queues-hotplug")?;
    let content = pattern(PART);
    let image = scratch.file("image", &content)?;
    let vm = TestVm::new("queues-hotplug")
        .vcpus(2)
        .machine("io_threads", json!(2))
        .boot()?;
    let drive = json!({"drive_id": "hot", "path_on_host": image, "is_root_device": false, "queues": 2});
    vm.put("/drives/hot", &drive)?.success()?;
    vm.guest().check(
        "n=0; until [ -e /dev/vda ] || [ $n = 100 ]; do usleep 100000; n=$((n+1)); done
         for cpu in 0 1; do taskset -c $cpu dd if=/dev/vda of=/tmp/$cpu bs=64k iflag=direct 2>/dev/null & done; wait
         cmp /tmp/0 /tmp/1 && cmp /tmp/0 /dev/vda",
    )?;
    assert_eq!(queues(&vm, "vda")?, "2");
    vm.request("DELETE", "/drives/hot", "")?.success()?;
    assert_eq!(vm.guest().run("[ -e /sys/block/vda ]")?.code, 1);
    Ok(())
}
