//! Disks that `qemu-storage-daemon` serves (Debian: qemu-system-common).

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use mayfly_tests::{
    Drive, Failure, GUEST_TIMEOUT, HOST_TIMEOUT, HostSetting, Result, Scratch, TestVm, Vm, pattern,
    wait_until, zeros,
};
use serde_json::json;

const MIB: usize = 1 << 20;

/// The daemon with one raw image, exported on a socket. It is killed when dropped.
struct Backend {
    scratch: Scratch,
    queues: u32,
    daemon: Child,
}

impl Backend {
    fn start(content: &[u8], queues: u32) -> Result<Self> {
        let scratch = Scratch::new("vhost-user")?;
        scratch.file("image", content)?;
        let daemon = spawn(&scratch, queues)?;
        Ok(Self {
            scratch,
            queues,
            daemon,
        })
    }

    fn socket(&self) -> PathBuf {
        self.scratch.join("socket")
    }

    fn image(&self) -> Result<Vec<u8>> {
        Ok(std::fs::read(self.scratch.join("image"))?)
    }

    fn kill(&mut self) -> Result {
        self.daemon.kill()?;
        self.daemon.wait()?;
        // What a killed process leaves behind.
        Ok(std::fs::remove_file(self.socket())?)
    }

    fn start_again(&mut self) -> Result {
        self.daemon = spawn(&self.scratch, self.queues)?;
        Ok(())
    }

    fn drive(&self) -> Drive {
        let drive = json!({"drive_id": "remote", "is_root_device": false, "socket": self.socket()});
        Drive::from_json(drive).writeback()
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // It may have been killed already.
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// Starts the daemon, and waits until it listens.
fn spawn(scratch: &Path, queues: u32) -> Result<Child> {
    let [image, socket] = ["image", "socket"].map(|name| scratch.join(name).display().to_string());
    let daemon = Command::new("qemu-storage-daemon")
        .arg(format!(
            "--blockdev=driver=file,node-name=file,filename={image},locking=off"
        ))
        .arg("--blockdev=driver=raw,node-name=disk,file=file")
        .arg(format!(
            "--export=type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues={queues},\
             addr.type=unix,addr.path={socket}"
        ))
        .stdin(Stdio::null())
        .spawn()
        .map_err(|e| Failure::new(format!("qemu-storage-daemon (Debian: qemu-system-common): {e}")))?;
    wait_until("the daemon's socket", HOST_TIMEOUT, || {
        Path::new(&socket).exists()
    })?;
    Ok(daemon)
}

fn boot(backend: &Backend, vm: TestVm) -> Result<Vm> {
    vm.vcpus(2)
        .drive(backend.drive().with("queues", backend.queues))
        .boot()
}

#[test]
fn a_disk_of_another_process_reads_and_writes() -> Result {
    let content = pattern(8 * MIB);
    let backend = Backend::start(&content, 2)?;
    let scratch = Scratch::new("vhost-user-out")?;
    zeros(&scratch.join("out"), 8 << 20)?;
    let vm = boot(
        &backend,
        TestVm::new("vhost-user").drive(Drive::new("out", scratch.join("out"))),
    )?;
    let guest = vm.guest();
    // Drives come in the order of the config: "out" is vda.
    assert_eq!(
        guest.check("blockdev --getsize64 /dev/vdb; ls /sys/block/vdb/mq | wc -l")?,
        "8388608\n2"
    );
    guest.check("dd if=/dev/vdb of=/dev/vda bs=1M conv=fsync && cmp /dev/vda /dev/vdb")?;
    assert!(
        std::fs::read(scratch.join("out"))? == content,
        "the guest read something else"
    );
    guest.check("for cpu in 0 1; do printf hello$cpu | taskset -c $cpu dd of=/dev/vdb bs=4k seek=$cpu conv=notrunc,fsync & done; wait")?;
    let image = backend.image()?;
    assert_eq!(
        (&image[..6], &image[4096..4102]),
        (&b"hello0"[..], &b"hello1"[..])
    );

    vm.pause()?;
    vm.resume()?;
    guest.check("echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vdb of=/dev/null bs=1M")?;
    vm.patch("/drives/remote", &json!({"drive_id": "remote"}))?
        .success()?;
    vm.patch(
        "/drives/remote",
        &json!({"drive_id": "remote", "path_on_host": "/dev/null"}),
    )?
    .assert_refused(&["vhost-user backend"]);
    assert!(vm.counted("vhost_user_remote", "activate_time_us")? > 0);
    assert_eq!(vm.counted("vhost_user_remote", "activate_fails")?, 0);
    Ok(())
}

#[test]
fn a_disk_of_another_process_works_on_mmio() -> Result {
    let content = pattern(4 * MIB);
    let backend = Backend::start(&content, 1)?;
    let vm = boot(&backend, TestVm::new("vhost-user-mmio").mmio())?;
    vm.guest()
        .check("dd if=/dev/vda of=/tmp/copy bs=1M && cmp /tmp/copy /dev/vda")?;
    vm.guest()
        .check("dd if=/dev/zero of=/dev/vda bs=1M count=1 conv=notrunc,fsync")?;
    let expected = [vec![0; MIB], content[MIB..].to_vec()].concat();
    assert!(
        backend.image()? == expected,
        "the image differs from what was written"
    );
    Ok(())
}

#[test]
fn a_backend_that_is_killed_fails_requests_and_serves_them_again_when_it_is_back() -> Result {
    let content = pattern(4 * MIB);
    let mut backend = Backend::start(&content, 1)?;
    let vm = boot(&backend, TestVm::new("vhost-user-kill"))?;
    let guest = vm.guest();
    guest.check("dd if=/dev/vda of=/tmp/copy bs=1M")?;

    backend.kill()?;
    assert_ne!(
        guest
            .run("dd if=/dev/vda of=/dev/null bs=4k count=1 iflag=direct")?
            .code,
        0
    );
    assert_ne!(
        guest
            .run("dd if=/dev/vda of=/dev/null bs=4k count=1 iflag=direct")?
            .code,
        0
    );
    assert_eq!(vm.get("/")?.json()?["state"], "Running");

    backend.start_again()?;
    guest.check(
        "n=0; until dd if=/dev/vda of=/tmp/again bs=1M iflag=direct 2>/dev/null || [ $n = 100 ]; do usleep 200000; n=$((n+1)); done
         cmp /tmp/copy /tmp/again",
    )?;

    // Requests of a reader meet a backend that is gone for a moment only, and wait for it.
    guest.check("(while [ ! -e /tmp/end ]; do dd if=/dev/vda of=/tmp/live bs=64k iflag=direct 2>/dev/null && cmp /tmp/copy /tmp/live || touch /tmp/failed; done; touch /tmp/ended) </dev/null >/dev/null 2>&1 &")?;
    backend.kill()?;
    backend.start_again()?;
    guest.check("dd if=/dev/vda of=/dev/null bs=1M iflag=direct; touch /tmp/end; until [ -e /tmp/ended ]; do usleep 100000; done; [ ! -e /tmp/failed ]")?;
    Ok(())
}

#[test]
fn a_disk_of_another_process_is_plugged_in_when_memory_is_shared() -> Result {
    let (first, second) = (
        Backend::start(&pattern(MIB), 1)?,
        Backend::start(&pattern(2 * MIB), 1)?,
    );
    let vm = boot(&first, TestVm::new("vhost-user-hotplug"))?;
    let drive = json!({"drive_id": "hot", "is_root_device": false, "socket": second.socket()});
    vm.put("/drives/hot", &drive)?.success()?;
    vm.guest().check(
        "n=0; until [ -e /dev/vdb ] || [ $n = 100 ]; do usleep 100000; n=$((n+1)); done
         dd if=/dev/vdb of=/tmp/copy bs=1M && cmp /tmp/copy /dev/vdb && [ $(blockdev --getsize64 /dev/vdb) = 2097152 ]",
    )?;
    vm.request("DELETE", "/drives/hot", "")?.success()?;
    vm.guest()
        .check("dd if=/dev/vda of=/dev/null bs=1M iflag=direct")?;
    Ok(())
}

/// The backend has the memory mapped too, so what the balloon takes has to leave the file behind it.
#[test]
fn the_balloon_gives_shared_memory_back() -> Result {
    let backend = Backend::start(&pattern(MIB), 1)?;
    let balloon = json!({"amount_mib": 0, "deflate_on_oom": false});
    let vm = TestVm::new("vhost-user-balloon").mem_mib(256);
    let vm = boot(&backend, vm.section("balloon", balloon))?;
    vm.use_and_free(128)?;
    let used = vm.resident_bytes()?;
    vm.patch("/balloon", &json!({"amount_mib": 128}))?.success()?;
    wait_until("memory from the guest", GUEST_TIMEOUT, || {
        vm.resident_bytes().is_ok_and(|bytes| bytes + (64 << 20) < used)
    })?;
    vm.guest()
        .check("dd if=/dev/vda of=/dev/null bs=1M iflag=direct")?;
    Ok(())
}

#[test]
fn memory_of_huge_pages_is_shared_with_a_backend() -> Result {
    let _reserved = HostSetting::reserve_huge_pages(64)?;
    let backend = Backend::start(&pattern(MIB), 1)?;
    let vm = TestVm::new("vhost-user-huge").machine("huge_pages", json!("2M"));
    let vm = boot(&backend, vm.mem_mib(128))?;
    vm.guest()
        .check("dd if=/dev/vda of=/dev/null bs=1M iflag=direct")?;
    vm.guest()
        .check("dd if=/dev/zero of=/dev/vda bs=1M count=1 conv=notrunc,fsync")?;
    assert!(backend.image()? == vec![0; MIB]);
    Ok(())
}
