//! What the monitor tells about a real guest's disk, network, interrupts and boot.

use std::net::Ipv4Addr;

use mayfly_tests::{Drive, Net, Result, Scratch, Tap, TestVm, zeros};
use serde_json::json;

const HOST: Ipv4Addr = Ipv4Addr::new(172, 30, 77, 1);

#[test]
fn histograms_have_each_request_of_the_guests_disk() -> Result {
    let scratch = Scratch::new("observe")?;
    let image = scratch.join("disk");
    zeros(&image, 8 << 20)?;
    let vm = TestVm::new("observe")
        .drive(Drive::new("data", &image).writeback())
        .boot()?;
    let before = vm.samples()?;
    vm.guest()
        .check("dd if=/dev/vda of=/dev/null bs=64k count=16 iflag=direct; dd if=/dev/zero of=/dev/vda bs=4k count=8 oflag=direct; sync; blockdev --flushbufs /dev/vda")?;
    let after = vm.samples()?;
    let grown = |name: &str| after[name] - before[name];
    for (kind, least) in [("read", 16.0), ("write", 8.0), ("flush", 0.0)] {
        let count = grown(&format!(r#"mayfly_block_{kind}_count_total{{drive="data"}}"#));
        assert!(count >= least, "{kind}: {count}");
        assert_eq!(
            grown(&format!(r#"mayfly_block_{kind}_seconds_count{{drive="data"}}"#)),
            count
        );
        let all = format!(r#"mayfly_block_{kind}_seconds_bucket{{drive="data",le="+Inf"}}"#);
        assert_eq!(grown(&all), count);
    }
    assert!(grown(r#"mayfly_block_read_seconds_sum{drive="data"}"#) > 0.0);
    assert!(grown("mayfly_interrupts_triggers_total") >= 24.0);
    assert!(after["mayfly_interrupts_config_updates_total"] >= 2.0);
    Ok(())
}

#[test]
fn batches_of_frames_are_timed_in_both_directions() -> Result {
    let tap = Tap::create("mfobserve", HOST)?;
    let vm = TestVm::new("observe")
        .net(Net::new("eth0", &tap))
        .boot_arg("mayfly.ip=172.30.77.2/24")
        .boot()?;
    vm.guest().check("ping -c 5 -W 20 172.30.77.1")?;
    let samples = vm.samples()?;
    for direction in ["rx", "tx"] {
        let batches = samples[&format!(r#"mayfly_net_{direction}_batch_seconds_count{{iface="eth0"}}"#)];
        let frames = samples[&format!(r#"mayfly_net_{direction}_count_total{{iface="eth0"}}"#)];
        assert!(
            (1.0..=frames).contains(&batches),
            "{direction}: {batches} batches of {frames} frames"
        );
    }
    Ok(())
}

#[test]
fn a_life_of_a_guest_is_told_up_to_its_power_off() -> Result {
    let vm = TestVm::new("observe").args(["--boot-timer"]).boot()?;
    let mut events = vm.events()?;
    vm.pause()?;
    vm.resume()?;
    vm.put("/actions", &json!({"action_type": "PowerButton"}))?
        .success()?;
    let names: Vec<_> = events
        .rest()?
        .iter()
        .map(|event| event["event"].as_str().unwrap_or_default().to_owned())
        .collect();
    assert_eq!(
        names,
        ["subscribed", "paused", "resumed", "guest_power_off", "exit"]
    );
    assert_eq!(vm.wait_exit()?, 0);
    Ok(())
}
