//! A guest whose cable is pulled and plugged in again, and whose card is moved to another tap.

use mayfly_tests::network::{Network, Subnet, assert_guest_fetches_in};
use mayfly_tests::{Net, Result, Tap, TestVm};
use serde_json::json;

const MAC: &str = "06:00:0a:4d:28:02";

fn boot(name: &str, number: u8, machine: impl FnOnce(TestVm) -> TestVm) -> Result<Network> {
    let card = |net: Net| net.with("guest_mac", MAC).with("link_state", "up");
    Network::boot(name, Subnet(number), card, machine)
}

/// Frames that the host has got from a tap and given to it.
fn frames(tap: &Tap) -> Result<[u64; 2]> {
    let read = |name: &str| -> Result<u64> {
        let path = format!("/sys/class/net/{}/statistics/{name}_packets", tap.name());
        Ok(std::fs::read_to_string(path)?.trim().parse()?)
    };
    Ok([read("rx")?, read("tx")?])
}

fn assert_a_pulled_cable_is_seen_and_passes_nothing(network: &Network) -> Result {
    network.await_carrier(1)?;
    network.assert_guest_fetches()?;
    network.patch("link_state", "down")?;
    network.await_carrier(0)?;
    let before = frames(&network.tap)?;
    assert!(!network.guest_reaches_host()?);
    assert_eq!(frames(&network.tap)?, before);

    network.patch("link_state", "up")?;
    network.await_carrier(1)?;
    network.assert_guest_fetches()
}

#[test]
fn a_link_goes_down_and_up_on_pci() -> Result {
    let network = boot("link-pci", 40, |vm| vm.vcpus(2))?;
    assert_a_pulled_cable_is_seen_and_passes_nothing(&network)
}

#[test]
fn a_link_goes_down_and_up_on_mmio() -> Result {
    let network = boot("link-mmio", 41, TestVm::mmio)?;
    assert_a_pulled_cable_is_seen_and_passes_nothing(&network)
}

#[test]
fn a_guest_is_on_a_tap_that_the_monitor_inherited() -> Result {
    let subnet = Subnet(42);
    let tap = subnet.tap()?;
    let vm = TestVm::new("inherited")
        .inherit(tap.open()?, 50)
        .net(Net::unnamed("net0").with("host_fd", 50));
    Network::boot_on(vm, tap, subnet)?.assert_guest_fetches()
}

#[test]
fn a_card_moves_to_another_tap_unnoticed_by_its_guest() -> Result {
    let network = boot("link-move", 43, |vm| vm)?;
    let subnet = Subnet(44);
    let new = subnet.tap()?;
    let guest = network.vm.guest();
    guest.check(&format!("ip addr add {}/24 dev eth0", subnet.guest()))?;
    network.assert_guest_fetches()?;
    let changes = guest.check("cat /sys/class/net/eth0/carrier_changes")?;
    network.patch("host_dev_name", new.name())?;
    assert_guest_fetches_in(&network.vm, subnet)?;
    assert!(frames(&new)?[0] > 0);

    // A tap that is not there can be made, one that is no tap cannot be used.
    let refused = json!({"iface_id": "net0", "host_dev_name": "lo"});
    network
        .vm
        .patch("/network-interfaces/net0", &refused)?
        .assert_refused(&["'lo' is not a single-queue tap"]);
    assert_guest_fetches_in(&network.vm, subnet)?;

    network.patch("host_dev_name", network.tap.name())?;
    network.assert_guest_fetches()?;
    assert_eq!(guest.check("cat /sys/class/net/eth0/address")?, MAC);
    assert_eq!(guest.check("cat /sys/class/net/eth0/carrier_changes")?, changes);
    Ok(())
}
