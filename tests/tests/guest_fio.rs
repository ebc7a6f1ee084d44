//! Debian's fio in a guest: reads and writes of random sizes at random places, checked, on drives of every kind. The
//! machine is paused meanwhile, and its limits change.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use mayfly_tests::{
    Drive, GUEST_TIMEOUT, LoopDevice, Result, Scratch, TestVm, Vm, check_qcow2, create_qcow2, read_qcow2,
    wait_until, zeros,
};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
/// Bytes of the disks: those that fio overlaps requests on, and as many that it uses one by one.
const SIZE: u64 = 8 * MIB;

/// Runs fio again and again until there is a file `/tmp/stop`, and leaves its exit code and how often it ran.
const WORK: &str = "
code=0 runs=0
until [ -e /tmp/stop ] && [ $runs -gt 0 ] || [ $code != 0 ]; do
    runs=$((runs + 1))
    /tools/fio --filename=/dev/$1 --direct=1 --rw=randrw --bsrange=512-128k --randseed=$runs --fsync=8 \\
        --verify=crc32c --do_verify=1 --verify_fatal=1 --output=/tmp/report \\
        --name=overlapping --ioengine=libaio --iodepth=16 --size=4m \\
        --name=single --ioengine=psync --size=4m --offset=4m >/tmp/said 2>&1
    code=$?
done
echo $code $runs >/tmp/result.new
mv /tmp/result.new /tmp/result";

/// When the drive comes to the machine.
#[derive(Clone, Copy, PartialEq)]
enum Plug {
    Cold,
    Hot,
}

fn drive(image: &Path, engine: &str) -> Drive {
    Drive::new("work", image).writeback().with("io_engine", engine)
}

fn qcow2(image: &Path, engine: &str) -> Drive {
    drive(image, engine).with("format", "qcow2")
}

/// Pauses the machine and changes the drive's limits while fio works on it, which finds every byte as it wrote it.
fn assert_fio_finds_what_it_wrote(drive: Drive, plug: Plug) -> Result {
    let vm = TestVm::new("fio").vcpus(2).mem_mib(512).drive(Drive::tools()?);
    let vm = match plug {
        Plug::Cold => vm.drive(drive).boot()?,
        Plug::Hot => {
            let vm = vm.boot()?;
            vm.put("/drives/work", &drive.into_json())?.success()?;
            vm
        }
    };
    let guest = vm.guest();
    guest.mount_tools()?;
    let disk = guest.disk("work")?;
    guest.check(&format!(
        "cat >/tmp/work <<'END'\n{WORK}\nEND\nsh /tmp/work {disk} </dev/null >/dev/null 2>&1 &"
    ))?;
    guest.check(&format!(
        "writes=0; until [ $writes -gt 0 ]; do usleep 200000; read -r _ _ _ _ writes _ </sys/block/{disk}/stat; done"
    ))?;
    disturb(&vm)?;

    let wait = "touch /tmp/stop; until [ -e /tmp/result ]; do usleep 100000; done; cat /tmp/result";
    let result = guest.check(wait)?;
    let said = guest
        .run("cat /tmp/said; grep -E 'err=|issued' /tmp/report")?
        .stdout;
    assert!(result.starts_with("0 "), "{result}: {said}");
    assert_eq!(said.matches("err= 0").count(), 2, "{said}");
    assert!(!said.contains("verify"), "{said}");
    for counter in ["read_count", "write_count", "flush_count"] {
        assert!(vm.counted("block_work", counter)? > 0, "{counter}");
    }
    guest.assert_no_complaints()
}

/// Limits of operations, of bytes, of both and none, each of which holds requests back before a pause and the next.
fn disturb(vm: &Vm) -> Result {
    let none = json!({"size": 0, "refill_time": 0});
    let operations = json!({"size": 2, "refill_time": 250});
    let bytes = json!({"size": 64 << 10, "refill_time": 500});
    for (ops, bandwidth) in [(&operations, &none), (&none, &bytes), (&operations, &bytes)] {
        let held = vm.counted("block_work", "rate_limiter_throttled_events")?;
        limit(vm, ops, bandwidth)?;
        wait_until("a request that waits", GUEST_TIMEOUT, || {
            thread::sleep(Duration::from_millis(250));
            let now = vm.counted("block_work", "rate_limiter_throttled_events");
            now.is_ok_and(|now| now > held + 2)
        })?;
        vm.pause()?;
        thread::sleep(Duration::from_millis(300));
        vm.resume()?;
    }
    limit(vm, &none, &none)?;
    for _ in 0..3 {
        thread::sleep(Duration::from_millis(300));
        vm.pause()?;
        vm.resume()?;
    }
    Ok(())
}

fn limit(vm: &Vm, ops: &Value, bandwidth: &Value) -> Result {
    let limits = json!({"ops": ops, "bandwidth": bandwidth});
    let patch = json!({"drive_id": "work", "rate_limiter": limits});
    vm.patch("/drives/work", &patch)?.success().map(drop)
}

/// On a raw image of a file.
fn assert_raw_works(engine: &str, queues: u16, plug: Plug) -> Result {
    let scratch = Scratch::new("fio-raw")?;
    let image = scratch.join("image");
    zeros(&image, SIZE)?;
    assert_fio_finds_what_it_wrote(drive(&image, engine).with("queues", queues), plug)
}

/// On a qcow2 image, which is whole afterwards.
fn assert_qcow2_works(engine: &str, queues: u16, plug: Plug) -> Result {
    let scratch = Scratch::new("fio-qcow2")?;
    let image = scratch.join("image");
    create_qcow2(&image, None, "8M")?;
    assert_fio_finds_what_it_wrote(qcow2(&image, engine).with("queues", queues), plug)?;
    check_qcow2(&image)?;
    assert!(
        read_qcow2(&image)?.iter().any(|byte| *byte != 0),
        "nothing is in the image"
    );
    Ok(())
}

/// Past the page cache, on a block device with blocks of this many bytes.
fn assert_direct_works(engine: &str, block_size: u32) -> Result {
    let scratch = Scratch::new("fio-direct")?;
    let file = scratch.join("file");
    zeros(&file, SIZE)?;
    let device = LoopDevice::new(&file, block_size)?;
    let drive = drive(device.path(), engine)
        .with("direct", true)
        .with("queues", 2);
    assert_fio_finds_what_it_wrote(drive, Plug::Cold)
}

/// Past the page cache, on a qcow2 image on a block device with large blocks.
fn assert_direct_qcow2_works(engine: &str) -> Result {
    let scratch = Scratch::new("fio-direct-qcow2")?;
    let file = scratch.join("file");
    zeros(&file, 2 * SIZE)?;
    let device = LoopDevice::new(&file, 4096)?;
    create_qcow2(device.path(), None, "8M")?;
    let drive = qcow2(device.path(), engine)
        .with("direct", true)
        .with("queues", 2);
    assert_fio_finds_what_it_wrote(drive, Plug::Cold)?;
    check_qcow2(device.path())
}

#[test]
fn a_raw_image_works_with_the_synchronous_engine() -> Result {
    assert_raw_works("Sync", 1, Plug::Cold)
}

#[test]
fn a_raw_image_works_with_the_asynchronous_engine() -> Result {
    assert_raw_works("Async", 1, Plug::Hot)
}

#[test]
fn a_raw_image_works_with_two_synchronous_queues() -> Result {
    assert_raw_works("Sync", 2, Plug::Hot)
}

#[test]
fn a_raw_image_works_with_two_asynchronous_queues() -> Result {
    assert_raw_works("Async", 2, Plug::Cold)
}

#[test]
fn a_qcow2_image_works_with_the_synchronous_engine() -> Result {
    assert_qcow2_works("Sync", 1, Plug::Cold)
}

#[test]
fn a_qcow2_image_works_with_the_asynchronous_engine() -> Result {
    assert_qcow2_works("Async", 1, Plug::Hot)
}

#[test]
fn a_qcow2_image_works_with_two_synchronous_queues() -> Result {
    assert_qcow2_works("Sync", 2, Plug::Hot)
}

#[test]
fn a_qcow2_image_works_with_two_asynchronous_queues() -> Result {
    assert_qcow2_works("Async", 2, Plug::Cold)
}

#[test]
fn a_block_device_works_past_the_page_cache_synchronously() -> Result {
    assert_direct_works("Sync", 4096)
}

#[test]
fn a_block_device_works_past_the_page_cache_asynchronously() -> Result {
    assert_direct_works("Async", 512)
}

#[test]
fn a_block_device_with_large_blocks_works_past_the_page_cache_asynchronously() -> Result {
    assert_direct_works("Async", 4096)
}

#[test]
fn a_qcow2_image_works_past_the_page_cache_synchronously() -> Result {
    assert_direct_qcow2_works("Sync")
}

#[test]
fn a_qcow2_image_works_past_the_page_cache_asynchronously() -> Result {
    assert_direct_qcow2_works("Async")
}

/// What fio checks is what the image holds: a single bit that changes behind the guest's back is found.
#[test]
fn a_changed_bit_is_found() -> Result {
    let scratch = Scratch::new("fio-damage")?;
    let image = scratch.join("image");
    zeros(&image, SIZE)?;
    let vm = TestVm::new("fio-damage")
        .mem_mib(512)
        .drive(Drive::tools()?)
        .drive(drive(&image, "Sync"))
        .boot()?;
    let guest = vm.guest();
    guest.mount_tools()?;
    let disk = guest.disk("work")?;
    let fio = |options: &str| {
        guest.run(&format!(
            "/tools/fio --name=work --filename=/dev/{disk} --direct=1 --rw=randwrite --bsrange=512-128k --size=4m \
             --verify=crc32c --verify_fatal=1 {options} 2>&1"
        ))
    };
    let written = fio("--do_verify=0")?;
    assert_eq!(written.code, 0, "{}", written.stdout);
    let whole = fio("--verify_only")?;
    assert_eq!(whole.code, 0, "{}", whole.stdout);

    let file = File::options().read(true).write(true).open(&image)?;
    let mut byte = [0];
    let at = 3 * MIB + 333;
    file.read_exact_at(&mut byte, at)?;
    file.write_all_at(&[byte[0] ^ 0x10], at)?;
    let damaged = fio("--verify_only")?;
    assert_ne!(damaged.code, 0, "{}", damaged.stdout);
    assert!(damaged.stdout.contains("verify failed"), "{}", damaged.stdout);

    file.write_all_at(&byte, at)?;
    let mended = fio("--verify_only")?;
    assert_eq!(mended.code, 0, "{}", mended.stdout);
    Ok(())
}
