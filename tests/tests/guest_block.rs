//! Disks, compared byte for byte on the host.

use std::path::PathBuf;

use mayfly_tests::{Drive, Result, Scratch, TestVm, Vm, pattern, zeros};
use serde_json::json;

const MIB: usize = 1 << 20;

/// A machine with an empty disk `out` (vda), a read-only one `in` full of bytes (vdb), and their images.
struct Disks {
    vm: Vm,
    out: PathBuf,
    input: PathBuf,
    content: Vec<u8>,
    scratch: Scratch,
}

fn boot(vm: TestVm, len: usize) -> Result<Disks> {
    let scratch = Scratch::new("disks")?;
    let content = pattern(len);
    let (out, input) = (scratch.join("out"), scratch.file("in", &content)?);
    zeros(&out, u64::try_from(len)?)?;
    let vm = vm
        .drive(Drive::new("out", &out).writeback())
        .drive(Drive::new("in", &input).read_only())
        .boot()?;
    Ok(Disks {
        vm,
        out,
        input,
        content,
        scratch,
    })
}

/// What every disk must do, on every transport.
fn assert_disks_work(disks: &Disks) -> Result {
    let guest = disks.vm.guest();
    let len = disks.content.len();
    assert_eq!(guest.check("blockdev --getsize64 /dev/vda")?, len.to_string());
    assert_eq!(guest.check("cat /sys/block/vda/ro /sys/block/vdb/ro")?, "0\n1");
    assert_eq!(
        guest.check("cat /sys/block/vda/serial; echo; cat /sys/block/vdb/serial")?,
        "out\nin"
    );

    // SEG_MAX, RO, BLK_SIZE, FLUSH, DISCARD, WRITE_ZEROES; and what every device offers: INDIRECT_DESC, EVENT_IDX,
    // VERSION_1.
    let features = |disk| guest.features(&format!("/sys/block/{disk}/device"));
    assert_eq!(features("vda")?, [2, 6, 9, 13, 14, 28, 29, 32]);
    assert_eq!(features("vdb")?, [2, 5, 6, 28, 29, 32]);

    guest.check("dd if=/dev/vdb of=/dev/vda bs=1M conv=fsync && cmp /dev/vda /dev/vdb")?;
    assert!(
        std::fs::read(&disks.out)? == disks.content,
        "the disk differs from what was written"
    );

    assert_ne!(guest.run("echo x | dd of=/dev/vdb conv=notrunc,fsync")?.code, 0);
    assert!(
        std::fs::read(&disks.input)? == disks.content,
        "a read-only disk was written"
    );
    Ok(())
}

#[test]
fn disks_on_pci_read_and_write_and_flush() -> Result {
    let disks = boot(TestVm::new("block-pci"), 64 * MIB)?;
    assert!(
        disks
            .vm
            .guest()
            .check("ls -l /sys/block/vda")?
            .contains("/pci0000:00/")
    );
    assert_disks_work(&disks)?;
    assert_unaligned_writes(&disks)?;
    assert_flushes(&disks)?;
    assert_a_swapped_image_is_seen(&disks)
}

#[test]
fn disks_on_mmio_read_and_write_and_flush() -> Result {
    let disks = boot(TestVm::new("block-mmio").mmio().vcpus(2), 8 * MIB)?;
    let guest = disks.vm.guest();
    assert!(!guest.check("ls -l /sys/block/vda")?.contains("pci"));
    assert_eq!(guest.run("ls /sys/bus/pci/devices")?.stdout, "");
    let line = guest.check("cat /proc/cmdline")?;
    let places = "pci=off virtio_mmio.device=4K@0xc0001000:5 virtio_mmio.device=4K@0xc0002000:6";
    assert!(line.contains(places), "{line}");
    assert_disks_work(&disks)?;
    assert_a_swapped_image_is_seen(&disks)
}

#[test]
fn a_kernel_told_not_to_use_pci_gets_mmio() -> Result {
    let disks = boot(TestVm::new("block-pci-off").boot_arg("pci=off"), MIB)?;
    assert_disks_work(&disks)
}

#[test]
fn a_guest_without_messages_gets_its_interrupts_by_lines() -> Result {
    let disks = boot(TestVm::new("block-intx").boot_arg("pci=nomsi"), MIB)?;
    let guest = disks.vm.guest();
    let interrupts = guest.check("grep virtio /proc/interrupts")?;
    assert!(interrupts.contains("IO-APIC"), "{interrupts}");
    assert!(!interrupts.contains("MSI"), "{interrupts}");
    assert_disks_work(&disks)?;
    assert_a_swapped_image_is_seen(&disks)
}

/// Small writes at odd places change just what they say.
fn assert_unaligned_writes(disks: &Disks) -> Result {
    let mut expected = std::fs::read(&disks.out)?;
    for at in [0, 511, 4095, 1_000_003, expected.len() - 5] {
        disks.vm.guest().check(&format!(
            "printf hello | dd of=/dev/vda bs=1 seek={at} conv=notrunc,fsync"
        ))?;
        expected[at..at + 5].copy_from_slice(b"hello");
    }
    assert!(
        std::fs::read(&disks.out)? == expected,
        "the disk differs from what was written"
    );
    Ok(())
}

/// A disk with a write cache is flushed, one without is not asked to.
fn assert_flushes(disks: &Disks) -> Result {
    let guest = disks.vm.guest();
    assert_eq!(guest.check("cat /sys/block/vda/queue/write_cache")?, "write back");
    let (flushes, written) = (
        disks.vm.counted("block", "flush_count")?,
        disks.vm.counted("block", "write_bytes")?,
    );
    guest.check("dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=notrunc,fsync")?;
    assert!(disks.vm.counted("block", "flush_count")? > flushes);
    assert_eq!(disks.vm.counted("block", "write_bytes")?, written + 4096);
    assert_eq!(disks.vm.counted("block", "invalid_reqs_count")?, 0);
    Ok(())
}

/// Another image behind a disk: the guest sees its size and content, and writes to it.
fn assert_a_swapped_image_is_seen(disks: &Disks) -> Result {
    let content = pattern(3 * MIB + 512).split_off(512);
    let other = disks.scratch.file("other", &content)?;
    disks
        .vm
        .patch("/drives/out", &json!({"drive_id": "out", "path_on_host": other}))?
        .success()?;

    let guest = disks.vm.guest();
    let wait = "n=0; until [ $(blockdev --getsize64 /dev/vda) = 3145728 ] || [ $n = 50 ]; do usleep 100000; n=$((n+1)); done";
    assert_eq!(
        guest.check(&format!("{wait}; blockdev --getsize64 /dev/vda"))?,
        content.len().to_string()
    );
    guest.check("echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vda of=/tmp/copy bs=1M; dd if=/tmp/copy of=/dev/vda bs=1M conv=fsync")?;
    assert!(
        std::fs::read(&other)? == content,
        "the new image differs from what was read and written back"
    );
    guest.check("printf swapped | dd of=/dev/vda conv=notrunc,fsync")?;
    assert!(std::fs::read(&other)?.starts_with(b"swapped"));
    Ok(())
}

#[test]
fn an_image_with_a_tail_is_a_disk_without_it() -> Result {
    let scratch = Scratch::new("tail")?;
    let image = scratch.file("image", pattern(4096 + 100))?;
    let vm = TestVm::new("tail").drive(Drive::new("tail", &image)).boot()?;
    assert_eq!(vm.guest().check("blockdev --getsize64 /dev/vda")?, "4096");
    assert_eq!(
        vm.guest().check("cat /sys/block/vda/queue/write_cache")?,
        "write through"
    );
    vm.guest()
        .check("dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=notrunc,fsync")?;
    let expected = [vec![0; 4096], pattern(4096 + 100).split_off(4096)].concat();
    assert!(std::fs::read(&image)? == expected, "the tail was changed");
    Ok(())
}
