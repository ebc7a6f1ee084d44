//! Drives on block devices of the host: what a guest reads, writes, discards and zeroes is there, and it follows their size.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use mayfly_tests::{Drive, Guest, LoopDevice, Result, Scratch, TestVm, Vm, pattern};
use serde_json::json;

const MIB: usize = 1 << 20;

/// Bytes that a file takes on the host's disk.
fn allocated(file: &Path) -> Result<usize> {
    Ok(usize::try_from(fs::metadata(file)?.blocks() * 512)?)
}

fn sees(guest: &Guest, disk: &str, size: usize) -> Result {
    let sectors = size / 512;
    guest
        .check(&format!(
            "n=0; until [ $(cat /sys/block/{disk}/size) = {sectors} ]; do n=$((n + 1)); [ $n -lt 300 ] || exit 1; sleep 0.1; done"
        ))
        .map(drop)
}

/// Writes, discards and zeroes parts of a disk whose content was `expected`, and changes that accordingly.
fn change(guest: &Guest, disk: &str, expected: &mut [u8]) -> Result {
    guest.check(&format!(
        "yes written | head -c 1000000 >/tmp/text; dd if=/tmp/text of=/dev/{disk} bs=64k seek=16 conv=notrunc,fsync \
         && /tools/blkdiscard -o {} -l {} /dev/{disk} && /tools/blkdiscard -z -o {} -l {} /dev/{disk} && sync",
        2 * MIB,
        2 * MIB,
        5 * MIB + 512,
        MIB,
    ))?;
    for (place, text) in expected[MIB..MIB + 1_000_000]
        .iter_mut()
        .zip(b"written\n".iter().cycle())
    {
        *place = *text;
    }
    expected[2 * MIB..4 * MIB].fill(0);
    expected[5 * MIB + 512..6 * MIB + 512].fill(0);
    Ok(())
}

/// A drive is asked to open its device anew, after that has grown.
fn grow(vm: &Vm, device: &LoopDevice, file: &Path, size: usize) -> Result {
    File::options()
        .write(true)
        .open(file)?
        .set_len(u64::try_from(size)?)?;
    device.follow_size()?;
    let patch = json!({"drive_id": "disk", "path_on_host": device.path()});
    vm.patch("/drives/disk", &patch)?.success().map(drop)
}

fn assert_a_block_device_is_used(engine: &str, direct: bool) -> Result {
    let scratch = Scratch::new("block-device")?;
    let mut expected = pattern(8 * MIB);
    let file = scratch.file("file", &expected)?;
    let device = LoopDevice::new(&file, 512)?;
    let drive = Drive::new("disk", device.path()).writeback();
    let vm = TestVm::new("block-device")
        .drive(Drive::tools()?)
        .drive(drive.with("io_engine", engine).with("direct", direct))
        .boot()?;
    let guest = vm.guest();
    guest.mount_tools()?;
    let disk = guest.disk("disk")?;
    sees(&guest, &disk, 8 * MIB)?;

    let before = allocated(&file)?;
    change(&guest, &disk, &mut expected)?;
    assert!(
        allocated(&file)? <= before - 2 * MIB,
        "what was discarded still takes space"
    );
    assert!(
        fs::read(&file)? == expected,
        "the device does not hold what was written"
    );

    grow(&vm, &device, &file, 12 * MIB)?;
    sees(&guest, &disk, 12 * MIB)?;
    guest.check(&format!(
        "echo at the end | dd of=/dev/{disk} bs=512 seek=$((12 * 2048 - 1)) conv=sync,notrunc,fsync \
         && echo 3 >/proc/sys/vm/drop_caches && md5sum </dev/{disk} >/tmp/sum"
    ))?;
    expected.resize(12 * MIB, 0);
    expected[12 * MIB - 512..][..11].copy_from_slice(b"at the end\n");
    assert!(
        fs::read(&file)? == expected,
        "what was written behind the old end is not there"
    );
    let copy = scratch.file("copy", &expected)?;
    let sum = std::process::Command::new("md5sum").arg(copy).output()?.stdout;
    assert_eq!(
        guest.check("cut -c-32 /tmp/sum")?.as_bytes(),
        &sum[..32],
        "the guest reads something else"
    );
    guest.assert_no_complaints()
}

#[test]
fn a_block_device_is_used_through_the_page_cache() -> Result {
    assert_a_block_device_is_used("Sync", false)
}

#[test]
fn a_block_device_is_used_past_the_page_cache() -> Result {
    assert_a_block_device_is_used("Sync", true)
}

#[test]
fn requests_for_a_block_device_overlap_through_the_page_cache() -> Result {
    assert_a_block_device_is_used("Async", false)
}

#[test]
fn requests_for_a_block_device_overlap_past_the_page_cache() -> Result {
    assert_a_block_device_is_used("Async", true)
}
