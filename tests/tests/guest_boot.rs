//! Each way into a Linux guest: the kernel formats, the root disks, the config file.

use mayfly_tests::{Drive, Guest, GuestImage, Result, Scratch, TestVm, without_pvh_note};

/// What Linux calls the boot loader when it was entered by PVH.
const PVH_LOADER: &str = "176";

fn boot_loader(guest: &Guest) -> Result<String> {
    guest.check("cat /proc/sys/kernel/bootloader_type")
}

#[test]
fn a_vmlinux_with_a_pvh_note_boots_by_it() -> Result {
    let vm = TestVm::new("pvh").boot()?;
    assert_eq!(boot_loader(&vm.guest())?, PVH_LOADER);
    assert!(vm.guest().check("dmesg")?.contains("Hypervisor detected: KVM"));
    Ok(())
}

#[test]
fn a_vmlinux_without_a_pvh_note_boots_by_the_64_bit_entry() -> Result {
    let scratch = Scratch::new("linux64")?;
    let kernel = scratch.join("vmlinux");
    without_pvh_note(&GuestImage::Vmlinux.path()?, &kernel)?;
    let vm = TestVm::new("linux64")
        .kernel(&kernel)
        .initrd(GuestImage::Initramfs.path()?)
        .boot()?;
    assert_ne!(boot_loader(&vm.guest())?, PVH_LOADER);
    assert_eq!(vm.guest().check("nproc")?, "1");
    Ok(())
}

#[test]
fn a_bzimage_boots() -> Result {
    let vm = TestVm::new("bzimage")
        .kernel(GuestImage::BzImage.path()?)
        .initrd(GuestImage::Initramfs.path()?);
    let vm = vm.vcpus(2).boot()?;
    assert_ne!(boot_loader(&vm.guest())?, PVH_LOADER);
    assert_eq!(vm.guest().check("nproc")?, "2");
    Ok(())
}

#[test]
fn a_root_disk_is_root_and_keeps_what_is_written() -> Result {
    let scratch = Scratch::new("root")?;
    let image = scratch.join("rootfs.ext4");
    std::fs::copy(GuestImage::Rootfs.path()?, &image)?;
    let vm = TestVm::new("root")
        .drive(Drive::new("rootfs", &image).root().writeback())
        .boot()?;
    let guest = vm.guest();
    assert!(guest.check("cat /proc/cmdline")?.contains("root=/dev/vda rw"));
    assert!(
        guest
            .check("grep ' / ' /proc/mounts")?
            .contains("/dev/vda / ext4 rw")
    );
    let words = "a sentence that is nowhere else on this disk";
    guest.check(&format!("echo {words} >/kept && sync"))?;
    guest.run_last("poweroff")?;
    assert_eq!(vm.wait_exit()?, 0);
    let disk = std::fs::read(&image)?;
    assert!(disk.windows(words.len()).any(|part| part == words.as_bytes()));
    Ok(())
}

/// The root image as the only partition of a disk with an MBR, whose signature is 0x6d617966.
fn partitioned_root() -> Result<Vec<u8>> {
    let rootfs = std::fs::read(GuestImage::Rootfs.path()?)?;
    let sectors = u32::try_from(rootfs.len() / 512)?;
    let mut disk = vec![0; 1 << 20];
    disk[440..444].copy_from_slice(&0x6d61_7966_u32.to_le_bytes());
    // The one entry: type Linux, from 1 MiB on.
    disk[450] = 0x83;
    disk[454..458].copy_from_slice(&2048_u32.to_le_bytes());
    disk[458..462].copy_from_slice(&sectors.to_le_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk.extend(rootfs);
    Ok(disk)
}

#[test]
fn a_partition_is_root_by_its_uuid_and_read_only_if_the_disk_is() -> Result {
    let scratch = Scratch::new("partuuid")?;
    let image = scratch.file("disk", partitioned_root()?)?;
    let drive = Drive::new("rootfs", &image)
        .root()
        .read_only()
        .with("partuuid", "6d617966-01");
    let vm = TestVm::new("partuuid").drive(drive).boot()?;
    assert!(
        vm.guest()
            .check("cat /proc/cmdline")?
            .contains("root=PARTUUID=6d617966-01 ro")
    );
    assert!(
        vm.guest()
            .check("grep ' / ' /proc/mounts")?
            .contains("/dev/vda1 / ext4 ro")
    );
    Ok(())
}

#[test]
fn a_config_file_without_an_api_boots_too() -> Result {
    let vm = TestVm::new("file")
        .vcpus(2)
        .entropy()
        .config_file_without_api()
        .boot()?;
    assert_eq!(
        vm.guest()
            .check("nproc; cat /sys/class/misc/hw_random/rng_current")?,
        "2\nvirtio_rng.0"
    );
    vm.guest().run_last("reboot")?;
    assert_eq!(vm.wait_exit()?, 0);
    Ok(())
}
