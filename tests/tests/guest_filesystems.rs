//! File systems on disks that come and go: made, filled, checked and compared by the guest, and checked by the host, with
//! every format and engine.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use mayfly_tests::{
    Drive, LoopDevice, Result, Scratch, TestVm, Vm, check_qcow2, create_qcow2, pattern, qemu_img, read_qcow2,
    zeros,
};
use serde_json::Value;

const MIB: usize = 1 << 20;

fn plug(vm: &Vm, drive: &Drive) -> Result<String> {
    vm.put("/drives/hot", &drive.clone().into_json())?.success()?;
    vm.guest().disk("hot")
}

fn unplug(vm: &Vm) -> Result {
    vm.request("DELETE", "/drives/hot", r#"{"timeout_ms": 20000}"#)?
        .success()
        .map(drop)
}

/// Makes and fills a file system on a disk, which comes again afterwards, possibly with another engine.
fn assert_a_file_system_is_kept(vm: &Vm, first: &Drive, second: &Drive) -> Result {
    let guest = vm.guest();
    let name = plug(vm, first)?;
    guest.check(&format!(
        "/tools/mke2fs -q -t ext4 -E lazy_itable_init=0 /dev/{name} && mount -t ext4 /dev/{name} /mnt"
    ))?;
    guest.check(
        "cd /mnt && mkdir many && for n in 1 2 3 4 5 6 7 8 9; do head -c $((n * n * 3001)) /tmp/content >many/$n & done; wait; \
         cp /tmp/content whole && md5sum whole many/* >/tmp/sums && md5sum <whole | cmp - /tmp/sum && rm many/4 && cd / \
         && umount /mnt",
    )?;
    guest.check(&format!("/tools/e2fsck -f -n /dev/{name}"))?;
    unplug(vm)?;

    let name = plug(vm, second)?;
    guest.check(&format!(
        "/tools/e2fsck -f -n /dev/{name} && mount -t ext4 /dev/{name} /mnt"
    ))?;
    guest.check(
        "cd /mnt && grep -v many/4 /tmp/sums | md5sum -c -s && cmp whole /tmp/content && cd / && umount /mnt",
    )?;
    unplug(vm)?;
    guest.assert_no_complaints()
}

/// A machine with the content of the files, and the programs to make file systems.
fn machine(scratch: &Scratch) -> Result<Vm> {
    let content = scratch.file("content", pattern(6 * MIB))?;
    let vm = TestVm::new("filesystems")
        .vcpus(2)
        .drive(Drive::new("content", content).read_only())
        .drive(Drive::tools()?)
        .boot()?;
    let guest = vm.guest();
    guest.mount_tools()?;
    let name = guest.disk("content")?;
    guest.check(&format!(
        "mkdir /mnt; cp /dev/{name} /tmp/content && md5sum </tmp/content >/tmp/sum"
    ))?;
    Ok(vm)
}

fn fsck(image: &Path) -> Result {
    let output = Command::new("e2fsck")
        .args(["-f", "-n"])
        .arg(image)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .output()?;
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
    Ok(())
}

fn hot(image: &Path, engine: &str) -> Drive {
    Drive::new("hot", image).writeback().with("io_engine", engine)
}

#[test]
fn raw_disks_with_either_engine_keep_a_file_system() -> Result {
    let scratch = Scratch::new("filesystems")?;
    let vm = machine(&scratch)?;
    for (first, second) in [("Sync", "Async"), ("Async", "Sync")] {
        let image = scratch.join(first);
        zeros(&image, 32 << 20)?;
        assert_a_file_system_is_kept(&vm, &hot(&image, first), &hot(&image, second))?;
        fsck(&image)?;
    }
    Ok(())
}

#[test]
fn qcow2_disks_with_either_engine_keep_a_file_system() -> Result {
    let scratch = Scratch::new("filesystems")?;
    let vm = machine(&scratch)?;
    let (image, raw) = (scratch.join("image.qcow2"), scratch.join("image.raw"));
    create_qcow2(&image, None, "32M")?;
    let drive = hot(&image, "Sync").with("format", "qcow2");
    let other = hot(&image, "Async").with("format", "qcow2");
    for (first, second) in [(&drive, &other), (&other, &drive.clone().with("queues", 2))] {
        assert_a_file_system_is_kept(&vm, first, second)?;
    }
    check_qcow2(&image)?;
    let words = ["convert", "-f", "qcow2", "-O", "raw"].map(OsStr::new);
    qemu_img(words.into_iter().chain([image.as_os_str(), raw.as_os_str()]))?;
    fsck(&raw)?;
    assert_an_image_lets_go(&vm, &drive, &image)
}

/// Clusters of an image that are in use.
fn clusters(image: &Path) -> Result<u64> {
    let words = ["check", "--output=json"].map(OsStr::new);
    let report: Value = serde_json::from_str(&qemu_img(words.into_iter().chain([image.as_os_str()]))?)?;
    Ok(report["allocated-clusters"].as_u64().unwrap_or_default())
}

/// The file system on an image is trimmed, and then all of it is made zeros.
fn assert_an_image_lets_go(vm: &Vm, drive: &Drive, image: &Path) -> Result {
    let guest = vm.guest();
    let count = |kind: &str| -> Result<f64> {
        let name = format!(r#"mayfly_block_{kind}_seconds_count{{drive="hot"}}"#);
        Ok(vm.samples()?[&name])
    };
    let before = clusters(image)?;
    let name = plug(vm, drive)?;
    guest.check(&format!(
        "mount -t ext4 /dev/{name} /mnt && rm /mnt/whole && sync && fstrim /mnt && umount /mnt && \
         /tools/e2fsck -f -n /dev/{name}"
    ))?;
    assert!(count("discard")? > 0.0, "nothing was discarded");
    unplug(vm)?;
    let trimmed = clusters(image)?;
    // Clusters are of 64 KiB, and some hold more than the file.
    assert!(trimmed + 80 < before, "{before} {trimmed}");

    let name = plug(vm, drive)?;
    let zeroed = count("write_zeroes")?;
    guest.check(&format!(
        "/tools/blkdiscard -z /dev/{name} && echo 3 >/proc/sys/vm/drop_caches && cmp -n {} /dev/{name} /dev/zero",
        32 * MIB
    ))?;
    assert!(count("write_zeroes")? > zeroed, "zeros came as writes");
    unplug(vm)?;
    check_qcow2(image)?;
    assert!(read_qcow2(image)?.iter().all(|byte| *byte == 0));
    guest.assert_no_complaints()
}

#[test]
fn block_devices_keep_a_file_system_past_the_page_cache() -> Result {
    let scratch = Scratch::new("filesystems")?;
    let vm = machine(&scratch)?;
    let file = scratch.join("file");
    zeros(&file, 32 << 20)?;
    let device = LoopDevice::new(&file, 512)?;
    let direct = |engine| hot(device.path(), engine).with("direct", true);
    assert_a_file_system_is_kept(&vm, &direct("Sync"), &direct("Async"))?;
    fsck(device.path())
}
