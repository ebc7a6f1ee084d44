//! Files as memory of the guest, compared byte for byte on the host.

use std::path::PathBuf;

use mayfly_tests::{GuestImage, Pmem, Result, Scratch, TestVm, Vm, pattern, zeros};

const MIB: usize = 1 << 20;
/// The size of the first device: not a multiple of 2 MiB, so that it has a tail without a file.
const ODD: usize = 5 * MIB + 1000;

/// A machine with a writable device (pmem0), a read-only one full of bytes (pmem1), and their files.
struct Memory {
    vm: Vm,
    out: PathBuf,
    input: PathBuf,
    content: Vec<u8>,
    _scratch: Scratch,
}

fn boot(vm: TestVm) -> Result<Memory> {
    let scratch = Scratch::new("pmem")?;
    let content = pattern(ODD);
    let (out, input) = (scratch.join("out"), scratch.file("in", &content)?);
    zeros(&out, u64::try_from(ODD)?)?;
    let vm = vm
        .pmem(Pmem::new("out", &out))
        .pmem(Pmem::new("in", &input).read_only())
        .boot()?;
    Ok(Memory {
        vm,
        out,
        input,
        content,
        _scratch: scratch,
    })
}

fn assert_memory_works(memory: &Memory) -> Result {
    let guest = memory.vm.guest();
    let size = 6 * MIB;
    assert_eq!(
        guest.check("blockdev --getsize64 /dev/pmem0; blockdev --getsize64 /dev/pmem1")?,
        format!("{size}\n{size}")
    );
    let before = memory.vm.counted("pmem", "queue_event_count")?;

    guest.check("dd if=/dev/pmem1 of=/dev/pmem0 bs=1M conv=fsync && cmp /dev/pmem0 /dev/pmem1")?;

    assert!(
        std::fs::read(&memory.out)? == memory.content,
        "the file differs from what was written"
    );
    assert!(memory.vm.counted("pmem", "queue_event_count")? > before);
    assert_eq!(memory.vm.counted("pmem_out", "event_fails")?, 0);

    let write = "printf hello | dd of=/dev/pmem1 bs=5 conv=notrunc,fsync";
    assert_ne!(
        guest.run(write)?.code,
        0,
        "a flush of a read-only device succeeds"
    );
    guest.check("echo 3 >/proc/sys/vm/drop_caches; cmp /dev/pmem0 /dev/pmem1")?;
    assert!(
        std::fs::read(&memory.input)? == memory.content,
        "a read-only file was written"
    );
    Ok(())
}

#[test]
fn files_on_pci_are_read_and_written_and_flushed() -> Result {
    assert_memory_works(&boot(TestVm::new("pmem-pci"))?)
}

#[test]
fn files_on_mmio_are_read_and_written_and_flushed() -> Result {
    assert_memory_works(&boot(TestVm::new("pmem-mmio").mmio().config_file())?)
}

#[test]
fn a_root_device_is_root_and_keeps_what_is_written() -> Result {
    let scratch = Scratch::new("pmem-root")?;
    let image = scratch.join("rootfs.ext4");
    std::fs::copy(GuestImage::Rootfs.path()?, &image)?;
    let vm = TestVm::new("pmem-root")
        .pmem(Pmem::new("rootfs", &image).root())
        .boot()?;
    let guest = vm.guest();
    assert!(guest.check("cat /proc/cmdline")?.contains("root=/dev/pmem0 rw"));
    let root = guest.check("grep ' / ' /proc/mounts")?;
    assert!(root.contains("/dev/pmem0 / ext4 rw"), "{root}");

    let words = "a sentence that is nowhere else on this disk";
    guest.check(&format!("echo {words} >/kept && sync"))?;
    guest.run_last("poweroff")?;
    assert_eq!(vm.wait_exit()?, 0);
    let disk = std::fs::read(&image)?;
    assert!(disk.windows(words.len()).any(|part| part == words.as_bytes()));
    Ok(())
}

#[test]
fn a_file_system_can_be_mounted_with_dax() -> Result {
    let scratch = Scratch::new("pmem-dax")?;
    let image = scratch.join("image");
    std::fs::copy(GuestImage::Rootfs.path()?, &image)?;
    let vm = TestVm::new("pmem-dax").pmem(Pmem::new("image", &image)).boot()?;
    let guest = vm.guest();
    guest.check("mkdir /mnt && mount -t ext4 -o dax /dev/pmem0 /mnt")?;
    let mounted = guest.check("grep ' /mnt ' /proc/mounts")?;
    assert!(mounted.contains("dax=always"), "{mounted}");

    let words = "another sentence that is nowhere else";
    guest.check(&format!("echo {words} >/mnt/kept && sync"))?;
    let disk = std::fs::read(&image)?;
    assert!(disk.windows(words.len()).any(|part| part == words.as_bytes()));
    guest.check("umount /mnt && mount -t ext4 -o ro /dev/pmem0 /mnt && grep -q another /mnt/kept")?;
    Ok(())
}
