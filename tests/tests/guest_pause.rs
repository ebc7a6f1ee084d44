//! Pause and resume of a busy guest: nothing happens in between, and nothing is lost.

use std::thread;
use std::time::{Duration, Instant};

use mayfly_tests::{Drive, Guest, Result, Scratch, TestVm, pattern, zeros};

/// How long a paused machine is watched.
const PAUSE: Duration = Duration::from_secs(4);

/// The guest's monotonic clock in seconds.
fn uptime(guest: &Guest) -> Result<f64> {
    Ok(guest.check("cut -d' ' -f1 /proc/uptime")?.parse()?)
}

#[test]
fn the_guests_clock_stops_while_it_is_paused() -> Result {
    let vm = TestVm::new("pause-clock").vcpus(2).boot()?;
    let guest = vm.guest();
    let lines: usize = guest.check("dmesg | wc -l")?.parse()?;
    let (host_before, guest_before) = (Instant::now(), uptime(&guest)?);
    vm.pause()?;
    thread::sleep(PAUSE);
    vm.resume()?;
    let (guest_passed, host_passed) = (
        uptime(&guest)? - guest_before,
        host_before.elapsed().as_secs_f64(),
    );
    assert!(
        guest_passed >= 0.0,
        "the guest's clock went back by {guest_passed} s"
    );
    assert!(
        guest_passed < host_passed - PAUSE.as_secs_f64() + 0.5,
        "guest {guest_passed} s, host {host_passed} s"
    );
    let complaints = format!(
        "dmesg | tail -n +{} | grep -iE 'stall|lockup|unstable|skew'",
        lines + 1
    );
    assert_eq!(guest.run(&complaints)?.stdout, "");
    Ok(())
}

/// Copies the disk `in` to the disk `out` block by block, again and again, until there is a file `/tmp/stop`.
const LOAD: &str = "
while [ ! -e /tmp/stop ]; do
    dd if=/dev/vdb of=/dev/vda bs=64k conv=fsync 2>/dev/null || { echo failed >/tmp/result; exit; }
    dd if=/dev/zero of=/dev/vda bs=64k count=256 conv=fsync 2>/dev/null
done
dd if=/dev/vdb of=/dev/vda bs=64k conv=fsync 2>/dev/null && cmp /dev/vda /dev/vdb && echo same >/tmp/result";

#[test]
fn a_guest_that_writes_is_paused_and_resumed_without_loss() -> Result {
    let scratch = Scratch::new("pause")?;
    let content = pattern(16 << 20);
    let (out, input) = (scratch.join("out"), scratch.file("in", &content)?);
    zeros(&out, 16 << 20)?;
    let vm = TestVm::new("pause-load").vcpus(2);
    let vm = vm
        .drive(Drive::new("out", &out).writeback())
        .drive(Drive::new("in", &input).read_only())
        .boot()?;
    let guest = vm.guest();
    guest.check(&format!(
        "cat >/tmp/load <<'END'\n{LOAD}\nEND\nsh /tmp/load </dev/null >/dev/null 2>&1 &"
    ))?;

    for _ in 0..5 {
        thread::sleep(Duration::from_millis(700));
        vm.pause()?;
        let before = std::fs::read(&out)?;
        thread::sleep(Duration::from_millis(700));
        assert!(
            std::fs::read(&out)? == before,
            "a paused machine has written to its disk"
        );
        vm.resume()?;
    }

    let result =
        guest.check("touch /tmp/stop; until [ -e /tmp/result ]; do usleep 100000; done; cat /tmp/result")?;
    assert_eq!(result, "same");
    assert!(
        std::fs::read(&out)? == content,
        "the disk differs from what was written"
    );
    assert_eq!(
        guest.run("dmesg | grep -E 'I/O error|stall|lockup|BUG'")?.stdout,
        ""
    );
    Ok(())
}

#[test]
fn a_paused_guest_answers_the_api_and_sleeps_through_input() -> Result {
    let vm = TestVm::new("pause-api").boot()?;
    vm.pause()?;
    assert_eq!(vm.get("/")?.json()?["state"], "Paused");
    vm.action("FlushMetrics")?;
    vm.get("/vm/config")?.success()?;
    vm.resume()?;
    assert_eq!(vm.guest().check("echo awake")?, "awake");
    vm.pause()?;
    vm.signal(libc::SIGTERM)?;
    assert_eq!(vm.wait_exit()?, -libc::SIGTERM);
    Ok(())
}
