//! What a guest does with a disk, with either engine: file systems, trimming, growing, and work that is interrupted.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use mayfly_tests::{Drive, Result, Scratch, TestVm, Vm, pattern, zeros};
use serde_json::json;

const MIB: u64 = 1 << 20;

/// Runs a tool of the host on an image.
fn tool(program: &str, args: &[&str], image: &Path) -> Result {
    let path = "/usr/sbin:/sbin:/usr/bin:/bin";
    let output = Command::new(program)
        .args(args)
        .arg(image)
        .env("PATH", path)
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program}: {said}");
    Ok(())
}

/// Bytes that a file takes on the host's disk.
fn allocated(image: &Path) -> Result<u64> {
    Ok(image.metadata()?.blocks() * 512)
}

/// A file system that the guest fills, reads back, empties and trims; the host's checker finds it whole.
fn assert_a_file_system_is_kept(engine: &str) -> Result {
    let scratch = Scratch::new("disks-fs")?;
    let image = scratch.join("image");
    zeros(&image, 96 * MIB)?;
    tool("mke2fs", &["-q", "-t", "ext4", "-b", "4096"], &image)?;
    let empty = allocated(&image)?;
    let vm = TestVm::new("disks-fs").vcpus(2);
    let vm = vm
        .drive(Drive::new("data", &image).writeback().with("io_engine", engine))
        .boot()?;
    let guest = vm.guest();
    guest.check("mkdir /mnt; mount -t ext4 /dev/vda /mnt")?;
    guest.check(
        "cd /mnt; for i in 1 2 3 4; do mkdir $i; \
         for size in 1 511 4096 70001 3000000 9000000; do head -c $size /dev/urandom >$i/$size & done; wait; done; \
         md5sum */* >/tmp/sums; sync",
    )?;
    guest.check("umount /mnt; mount -t ext4 /dev/vda /mnt; cd /mnt; md5sum -c -s /tmp/sums")?;
    let full = allocated(&image)?;
    assert!(full > empty + 40 * MIB, "{empty} {full}");

    guest.check("cd /mnt; rm -r 2 3 4; sync; fstrim /mnt")?;
    let trimmed = allocated(&image)?;
    assert!(trimmed < full - 30 * MIB, "{full} {trimmed}");
    guest.check("cd /mnt; grep ' 1/' /tmp/sums | md5sum -c -s; cd /; umount /mnt")?;
    guest.assert_no_complaints()?;
    vm.action("SendCtrlAltDel")?;
    vm.wait_exit()?;
    tool("e2fsck", &["-f", "-n"], &image)
}

#[test]
fn a_file_system_is_kept_by_the_synchronous_engine() -> Result {
    assert_a_file_system_is_kept("Sync")
}

#[test]
fn a_file_system_is_kept_by_the_asynchronous_engine() -> Result {
    assert_a_file_system_is_kept("Async")
}

#[test]
fn what_a_guest_discards_and_zeroes_leaves_the_image() -> Result {
    let scratch = Scratch::new("disks-discard")?;
    let image = scratch.file("image", pattern(16 << 20))?;
    let vm = TestVm::new("disks-discard")
        .drive(Drive::new("data", &image))
        .drive(Drive::tools()?)
        .boot()?;
    let guest = vm.guest();
    guest.mount_tools()?;
    let before = allocated(&image)?;
    guest.check("blkdiscard -o 1M -l 8M /dev/vda || blkdiscard -o 1048576 -l 8388608 /dev/vda")?;
    assert_eq!(allocated(&image)?, before - 8 * MIB);
    let mut expected = pattern(16 << 20);
    expected[1 << 20..9 << 20].fill(0);
    assert!(std::fs::read(&image)? == expected);

    let zeroed = |vm: &Vm| -> Result<f64> {
        let count = r#"mayfly_block_write_zeroes_seconds_count{drive="data"}"#;
        Ok(vm.samples()?[count])
    };
    assert_eq!(zeroed(&vm)?, 0.0);
    guest.check(&format!(
        "/tools/blkdiscard -z -o {} -l {MIB} /dev/vda && echo 3 >/proc/sys/vm/drop_caches && \
         dd if=/dev/vda bs=1M skip=10 count=1 | cmp -n {MIB} - /dev/zero",
        10 * MIB
    ))?;
    assert!(zeroed(&vm)? > 0.0, "zeros came as writes");
    expected[10 << 20..11 << 20].fill(0);
    assert!(std::fs::read(&image)? == expected);
    assert_eq!(
        guest.check("cat /sys/block/vda/queue/discard_max_bytes")?,
        "1073741824"
    );
    assert_eq!(
        guest.check("cat /sys/block/vda/queue/write_zeroes_max_bytes")?,
        "16777216"
    );
    guest.assert_no_complaints()
}

#[test]
fn a_guest_sees_its_disk_grow_and_shrink() -> Result {
    let scratch = Scratch::new("disks-size")?;
    let (image, other) = (
        scratch.file("image", pattern(1 << 20))?,
        scratch.file("other", pattern(3 << 20))?,
    );
    for engine in ["Sync", "Async"] {
        let vm = TestVm::new("disks-size");
        let vm = vm
            .drive(Drive::new("data", &image).with("io_engine", engine))
            .boot()?;
        let guest = vm.guest();
        let file = File::options().write(true).open(&image)?;
        let sees = |size: u64| {
            let wait = format!(
                "until [ $(cat /sys/block/vda/size) = {} ]; do usleep 20000; done",
                size / 512
            );
            guest.check(&wait).map(drop)
        };
        let patch = |path: &Path| {
            let patch = json!({"drive_id": "data", "path_on_host": path});
            vm.patch("/drives/data", &patch)?.success().map(drop)
        };
        for size in [5 * MIB, 2 * MIB] {
            file.set_len(size)?;
            patch(&image)?;
            sees(size)?;
        }
        patch(&other)?;
        sees(3 * MIB)?;
        guest
            .check("echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vda bs=1M 2>/dev/null | md5sum >/tmp/sum")?;
        let sum = Command::new("md5sum").arg(&other).output()?.stdout;
        let sum = String::from_utf8(sum)?;
        assert_eq!(guest.check("cut -c-32 /tmp/sum")?, sum[..32]);
        file.set_len(MIB)?;
        guest.assert_no_complaints()?;
    }
    Ok(())
}

/// Copies pieces of the disk `in` to the disk `out`, eight at a time and in odd sizes, until there is a file `/tmp/stop`; then
/// all of it once more.
const LOAD: &str = "
copy() { dd if=/dev/vdb of=/dev/vda bs=$1 skip=$2 seek=$2 count=$3 conv=notrunc,fsync 2>/dev/null || echo failed >/tmp/failed; }
while [ ! -e /tmp/stop ]; do
    copy 512 7 500 & copy 4k 100 300 & copy 68k 9 20 & copy 1M 2 5 & copy 4k 2000 64 & copy 12k 900 50 & copy 512 30000 99 &
    copy 256k 40 9 & wait
    echo 1 >/proc/sys/vm/drop_caches
    dd if=/dev/zero of=/dev/vda bs=64k count=256 conv=notrunc,fsync 2>/dev/null
done
dd if=/dev/vdb of=/dev/vda bs=64k conv=fsync 2>/dev/null && cmp /dev/vda /dev/vdb && echo same >/tmp/result
[ -e /tmp/failed ] && echo failed >/tmp/result";

/// Work that overlaps is paused, resumed, limited and let go, and nothing is lost.
fn assert_interrupted_work_is_whole(engine: &str) -> Result {
    let scratch = Scratch::new("disks-load")?;
    let content = pattern(16 << 20);
    let (out, input) = (scratch.join("out"), scratch.file("in", &content)?);
    zeros(&out, 16 * MIB)?;
    let vm = TestVm::new("disks-load").vcpus(2);
    let vm = vm
        .drive(Drive::new("out", &out).writeback().with("io_engine", engine))
        .drive(Drive::new("in", &input).read_only().with("io_engine", engine))
        .boot()?;
    let guest = vm.guest();
    guest.check(&format!(
        "cat >/tmp/load <<'END'\n{LOAD}\nEND\nsh /tmp/load </dev/null >/dev/null 2>&1 &"
    ))?;
    for ops in [40, 0, 1000, 0] {
        thread::sleep(Duration::from_millis(500));
        vm.pause()?;
        let before = std::fs::read(&out)?;
        thread::sleep(Duration::from_millis(300));
        assert!(std::fs::read(&out)? == before, "a paused machine has written");
        vm.resume()?;
        for id in ["out", "in"] {
            let limiter = json!({"ops": {"size": ops, "refill_time": 1000}});
            let patch = json!({"drive_id": id, "rate_limiter": limiter});
            vm.patch(&format!("/drives/{id}"), &patch)?.success()?;
        }
    }
    let wait = "touch /tmp/stop; until [ -e /tmp/result ]; do usleep 100000; done; cat /tmp/result";
    assert_eq!(guest.check(wait)?, "same");
    assert!(
        std::fs::read(&out)? == content,
        "the disk differs from what was written"
    );
    guest.assert_no_complaints()
}

#[test]
fn interrupted_work_is_whole_with_the_synchronous_engine() -> Result {
    assert_interrupted_work_is_whole("Sync")
}

#[test]
fn interrupted_work_is_whole_with_the_asynchronous_engine() -> Result {
    assert_interrupted_work_is_whole("Async")
}
