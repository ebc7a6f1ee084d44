//! A guest whose frames the host's kernel moves (vhost-net).

use std::path::Path;
use std::process::Command;

use mayfly_tests::network::{Network, Subnet};
use mayfly_tests::{Failure, Net, Result, Scratch, TestVm, pattern};
use serde_json::{Value, json};

const MAC: &str = "06:00:0a:4d:32:02";

/// Sees to it that the kernel has vhost-net.
fn require_vhost() -> Result {
    if !Path::new("/dev/vhost-net").exists() {
        // What the exit code says is seen below.
        let _ = Command::new("modprobe").arg("vhost_net").status();
    }
    if Path::new("/dev/vhost-net").exists() {
        return Ok(());
    }
    Err(Failure::new("there is no /dev/vhost-net: modprobe vhost_net"))
}

fn boot(name: &str, number: u8, machine: impl FnOnce(TestVm) -> TestVm) -> Result<Network> {
    require_vhost()?;
    let card = |net: Net| net.with("guest_mac", MAC).with("vhost", true);
    Network::boot(name, Subnet(number), card, machine)
}

fn assert_tcp_works(network: &Network) -> Result {
    network.assert_guest_sends()?;
    network.assert_guest_fetches()
}

/// What Mayfly would have moved by itself.
fn assert_mayfly_moved_nothing(network: &Network) -> Result {
    let counted = [
        "tx_bytes_count",
        "rx_bytes_count",
        "event_fails",
        "activate_fails",
    ];
    for name in counted {
        assert_eq!(network.vm.counted("net", name)?, 0, "{name}");
    }
    Ok(())
}

#[test]
fn tcp_works_both_ways_on_pci() -> Result {
    let network = boot("vhost-pci", 50, |vm| vm.vcpus(2))?;
    assert_tcp_works(&network)?;
    let card = network
        .vm
        .guest()
        .check("cat /sys/class/net/eth0/address /sys/class/net/eth0/carrier")?;
    assert_eq!(card, format!("{MAC}\n1"));
    assert_mayfly_moved_nothing(&network)
}

#[test]
fn tcp_works_both_ways_on_mmio() -> Result {
    let network = boot("vhost-mmio", 51, TestVm::mmio)?;
    assert_tcp_works(&network)?;
    assert_mayfly_moved_nothing(&network)
}

#[test]
fn frames_pass_only_while_machine_and_link_say_so() -> Result {
    let network = boot("vhost-stops", 52, |vm| vm)?;
    network.vm.pause()?;
    network.vm.resume()?;
    assert_tcp_works(&network)?;

    network.patch("link_state", "down")?;
    network.await_carrier(0)?;
    assert!(!network.guest_reaches_host()?);
    network.vm.pause()?;
    network.patch("link_state", "up")?;
    network.vm.resume()?;
    network.await_carrier(1)?;
    assert_tcp_works(&network)?;

    let other = Subnet(53);
    let tap = other.tap()?;
    let second = format!("ip addr add {}/24 dev eth0", other.guest());
    network.vm.guest().check(&second)?;
    network.patch("host_dev_name", tap.name())?;
    network.assert_guest_sends_in(other)?;
    network.assert_guest_fetches_in(other)?;
    assert_mayfly_moved_nothing(&network)
}

#[test]
fn a_driver_that_comes_again_finds_the_card_as_it_was() -> Result {
    let network = boot("vhost-reset", 54, |vm| vm)?;
    assert_tcp_works(&network)?;
    network.vm.guest().check(&format!(
        "device=$(basename $(readlink -f /sys/class/net/eth0/device)) && cd /sys/bus/virtio/drivers/virtio_net && \
         echo $device >unbind && ! [ -e /sys/class/net/eth0 ] && echo $device >bind && \
         ip addr add {}/24 dev eth0 && ip link set eth0 up",
        network.subnet().guest()
    ))?;
    assert_tcp_works(&network)?;
    assert_mayfly_moved_nothing(&network)
}

#[test]
fn memory_comes_and_goes_while_frames_pass() -> Result {
    let network = boot("vhost-memory", 55, |vm| vm.vcpus(2))?;
    let vm = &network.vm;
    let scratch = Scratch::new("vhost-memory")?;
    let file = scratch.file("pmem", pattern(Network::AMOUNT))?;
    let pmem: Value = json!({"id": "hot", "path_on_host": file});
    vm.put("/pmem/hot", &pmem)?.success()?;
    vm.guest()
        .check("n=0; until [ -b /dev/pmem0 ]; do n=$((n + 1)); [ $n -lt 300 ] || exit 1; sleep 0.1; done")?;
    assert_tcp_works(&network)?;
    vm.request("DELETE", "/pmem/hot", r#"{"timeout_ms": 20000}"#)?
        .success()?;
    assert_tcp_works(&network)?;
    assert_mayfly_moved_nothing(&network)
}
