//! Copy-on-write images under Linux: what it writes is in the image, as others read it.

use std::fs;
use std::path::Path;
use std::process::Command;

use mayfly_tests::{
    Drive, Failure, GuestImage, Result, Scratch, TestVm, Vm, check_qcow2, create_qcow2, pattern, qemu_img,
    read_qcow2,
};
use serde_json::json;

const MIB: usize = 1 << 20;

fn cow(id: &str, image: &Path) -> Drive {
    Drive::new(id, image)
        .writeback()
        .with("format", "qcow2")
        .with("backing", "allow")
}

fn path(file: &Path) -> &str {
    file.to_str().unwrap_or_default()
}

/// Checks the file system in an image.
fn fsck(image: &Path) -> Result {
    let raw = image.with_extension("raw");
    qemu_img(["convert", "-f", "qcow2", "-O", "raw", path(image), path(&raw)])?;
    let output = Command::new("e2fsck").arg("-fn").arg(&raw).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(Failure::new(String::from_utf8_lossy(&output.stdout).into_owned()))
}

#[test]
fn guests_boot_from_clones_of_one_root_disk() -> Result {
    let scratch = Scratch::new("clone-root")?;
    let base = scratch.join("rootfs.raw");
    fs::copy(GuestImage::Rootfs.path()?, &base)?;
    let before = fs::read(&base)?;
    let mut machines = Vec::new();
    for name in ["one", "two"] {
        let clone = scratch.join(format!("{name}.qcow2"));
        create_qcow2(&clone, Some(&base), "")?;
        let vm = TestVm::new(name).drive(cow("root", &clone).root()).boot()?;
        vm.guest().check(&format!("echo I am {name} > /name && sync"))?;
        machines.push((vm, clone, name));
    }
    // A machine that is gone from one moment to the next leaves a file system that its journal repairs.
    for (vm, _, name) in &machines {
        assert_eq!(vm.guest().check("cat /name")?, format!("I am {name}"));
        vm.signal(libc::SIGKILL)?;
        vm.wait_exit()?;
    }
    for (vm, clone, name) in machines {
        drop(vm);
        check_qcow2(&clone)?;
        let content = read_qcow2(&clone)?;
        let text = format!("I am {name}\n");
        assert!(
            content.windows(text.len()).any(|part| part == text.as_bytes()),
            "{name} wrote nothing"
        );
    }
    assert!(fs::read(&base)? == before, "the base was changed");
    Ok(())
}

/// Makes a file system on a disk that comes and goes.
fn assert_a_disk_comes_and_goes(vm: &Vm, scratch: &Scratch) -> Result {
    let image = scratch.join("hot.qcow2");
    create_qcow2(&image, None, "32M")?;
    let config = json!({"drive_id": "hot", "path_on_host": image, "is_root_device": false, "cache_type": "Writeback",
        "format": "qcow2"});
    vm.put("/drives/hot", &config)?.success()?;
    let guest = vm.guest();
    let name = guest.disk("hot")?;
    guest.check(&format!(
        "mkdir -p /hot && mke2fs /dev/{name} && mount -t ext4 /dev/{name} /hot"
    ))?;
    guest.check("cp /dev/vda /hot/copy && sync && echo 3 > /proc/sys/vm/drop_caches")?;
    guest.check("cmp /hot/copy /dev/vda")?;
    guest.check("rm /hot/copy && echo kept > /hot/kept && umount /hot")?;
    vm.request("DELETE", "/drives/hot", r#"{"timeout_ms": 20000}"#)?
        .success()?;
    check_qcow2(&image)?;
    fsck(&image)
}

#[test]
fn a_guest_reads_and_writes_images_of_all_kinds() -> Result {
    let scratch = Scratch::new("kinds")?;
    let content = pattern(2 * MIB);
    let zeros = vec![b'z'; 2 * MIB];
    let raw = scratch.file("raw", [&content[..], &zeros[..]].concat())?;
    let (packed, kept) = (scratch.join("packed.qcow2"), scratch.join("kept.qcow2"));
    qemu_img(["convert", "-c", "-O", "qcow2", path(&raw), path(&packed)])?;
    qemu_img(["convert", "-O", "qcow2", path(&raw), path(&kept)])?;
    qemu_img(["snapshot", "-c", "before", path(&kept)])?;
    let vm = TestVm::new("kinds")
        .drive(cow("packed", &packed))
        .drive(cow("kept", &kept))
        .boot()?;
    vm.guest().check("cmp /dev/vda /dev/vdb")?;
    // Single sectors in clusters that are compressed, or that a snapshot has too.
    vm.guest().check(
        "for disk in vda vdb; do for at in 3 700 5000 8000; do \
         echo written at $at | dd of=/dev/$disk bs=512 seek=$at conv=sync,notrunc; done; done; sync; \
         echo 3 > /proc/sys/vm/drop_caches; cmp /dev/vda /dev/vdb",
    )?;
    assert_a_disk_comes_and_goes(&vm, &scratch)?;
    vm.pause()?;
    drop(vm);
    let mut expected = fs::read(&raw)?;
    for at in [3, 700, 5000, 8000] {
        let mut sector = format!("written at {at}\n").into_bytes();
        sector.resize(512, 0);
        expected[at * 512..(at + 1) * 512].copy_from_slice(&sector);
    }
    for image in [&packed, &kept] {
        check_qcow2(image)?;
        assert!(
            read_qcow2(image)? == expected,
            "{} is not what was written",
            image.display()
        );
    }
    qemu_img(["snapshot", "-a", "before", path(&kept)])?;
    check_qcow2(&kept)?;
    assert!(read_qcow2(&kept)? == fs::read(&raw)?, "the snapshot was changed");
    Ok(())
}

#[test]
fn an_image_is_whole_when_a_busy_machine_is_killed() -> Result {
    let scratch = Scratch::new("killed")?;
    let image = scratch.join("busy.qcow2");
    create_qcow2(&image, None, "32M")?;
    for (round, cache_type) in ["Writeback", "Unsafe"].into_iter().enumerate() {
        let drive = cow("busy", &image).with("cache_type", cache_type);
        let vm = TestVm::new("killed").drive(drive).boot()?;
        // The first megabyte is on the disk before the rest is in danger.
        let guest = vm.guest();
        guest.check(&format!(
            "yes safe{round} | head -c 1048576 > /safe; dd if=/safe of=/dev/vda bs=64k conv=fsync,notrunc"
        ))?;
        guest.check(
            "(while :; do dd if=/dev/zero of=/dev/vda bs=4k seek=300 count=4000 conv=notrunc; done) \
             </dev/null >/dev/null 2>&1 & sleep 1",
        )?;
        vm.signal(libc::SIGKILL)?;
        drop(vm);
        check_qcow2(&image)?;
        let text = format!("safe{round}\n").repeat(MIB / 6 + 1);
        assert!(
            read_qcow2(&image)?[..MIB] == text.as_bytes()[..MIB],
            "what was flushed is gone"
        );
    }
    Ok(())
}

/// Moves the drive of a machine to another image.
fn swap(vm: &Vm, image: &Path) -> Result {
    let patch = json!({"drive_id": "disk", "path_on_host": image});
    vm.patch("/drives/disk", &patch)?.success().map(drop)
}

/// Waits until the guest sees the size of the new image, and lets it forget what it read of the old one.
fn await_size(vm: &Vm, mib: usize) -> Result {
    vm.guest()
        .check(&format!(
            "n=0; until [ $(cat /sys/block/vda/size) = {} ]; do n=$((n + 1)); [ $n -lt 300 ] || exit 1; sleep 0.1; done; \
             echo 3 >/proc/sys/vm/drop_caches",
            mib * 2048
        ))
        .map(drop)
}

/// Writes a word into the sector at a MiB of the disk.
fn write_word(vm: &Vm, word: &str, mib: usize) -> Result {
    let dd = format!(
        "dd of=/dev/vda bs=512 seek={} conv=sync,notrunc,fsync",
        mib * 2048
    );
    vm.guest().check(&format!("echo {word} | {dd}")).map(drop)
}

/// The word in the sector at a MiB of the disk, if any.
fn read_word(vm: &Vm, mib: usize) -> Result<String> {
    let dd = format!("dd if=/dev/vda bs=512 skip={} count=1 2>/dev/null", mib * 2048);
    vm.guest().check(&format!("{dd} | tr -d '\\0'"))
}

fn assert_a_running_guest_follows_its_drive(engine: &str) -> Result {
    let scratch = Scratch::new("follow")?;
    let [one, two, top] = ["one", "two", "top"].map(|name| scratch.join(format!("{name}.qcow2")));
    create_qcow2(&one, None, "8M")?;
    create_qcow2(&two, None, "16M")?;
    let vm = TestVm::new("follow")
        .drive(cow("disk", &one).with("io_engine", engine))
        .boot()?;
    write_word(&vm, "first", 7)?;

    swap(&vm, &two)?;
    await_size(&vm, 16)?;
    assert_eq!(read_word(&vm, 7)?, "");
    write_word(&vm, "second", 15)?;
    // Nobody has it now.
    qemu_img(["resize", "-q", "-f", "qcow2", path(&one), "24M"])?;
    swap(&vm, &one)?;
    await_size(&vm, 24)?;
    assert_eq!(read_word(&vm, 7)?, "first");
    write_word(&vm, "grown", 23)?;

    // An image that the machine has grows by another one on top of it.
    vm.pause()?;
    qemu_img([
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        path(&one),
        "-F",
        "qcow2",
        path(&top),
        "32M",
    ])?;
    swap(&vm, &top)?;
    vm.resume()?;
    await_size(&vm, 32)?;
    write_word(&vm, "third", 31)?;
    for (word, mib) in [("first", 7), ("grown", 23), ("third", 31)] {
        assert_eq!(read_word(&vm, mib)?, word);
    }
    vm.guest().assert_no_complaints()?;
    drop(vm);

    let has = |image: &Path, word: &str, mib: usize| -> Result<bool> {
        check_qcow2(image)?;
        Ok(read_qcow2(image)?[mib * MIB..].starts_with(format!("{word}\n").as_bytes()))
    };
    assert!(has(&two, "second", 15)? && has(&one, "grown", 23)? && has(&top, "third", 31)?);
    Ok(())
}

#[test]
fn a_running_guest_follows_its_drive_to_other_images() -> Result {
    assert_a_running_guest_follows_its_drive("Sync")
}

#[test]
fn a_running_guest_follows_its_drive_with_the_asynchronous_engine() -> Result {
    assert_a_running_guest_follows_its_drive("Async")
}
