//! A guest whose cable is pulled and plugged in again, and whose card is moved to another tap.

use std::net::{Ipv4Addr, TcpListener};
use std::thread;

use mayfly_tests::{Drive, GUEST_TIMEOUT, Net, Result, Scratch, Tap, TestVm, Vm, pattern, wait_until};
use serde_json::json;

/// Bytes that the guest finds on its disk and fetches from the host.
const AMOUNT: usize = 1 << 20;
const MAC: &str = "06:00:0a:50:00:02";

/// A machine on the network `10.80.NUMBER.0/24` of a tap; the guest has an address of the next network too.
struct Network {
    vm: Vm,
    number: u8,
    _scratch: Scratch,
}

fn tap(number: u8) -> Result<Tap> {
    Tap::create(&format!("mflink{number}"), host(number))
}

fn host(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 80, number, 1)
}

fn boot(name: &str, number: u8, customize: impl FnOnce(TestVm) -> TestVm) -> Result<(Network, Tap)> {
    let tap = tap(number)?;
    let scratch = Scratch::new(name)?;
    let disk = scratch.file("disk", pattern(AMOUNT))?;
    let vm = TestVm::new(name)
        .net(
            Net::new("net0", &tap)
                .with("guest_mac", MAC)
                .with("link_state", "up"),
        )
        .drive(Drive::new("data", disk).read_only())
        .boot_arg(&format!("mayfly.ip=10.80.{number}.2/24"));
    let vm = customize(vm).boot()?;
    vm.guest()
        .check(&format!("ip addr add 10.80.{}.2/24 dev eth0", number + 1))?;
    let network = Network {
        vm,
        number,
        _scratch: scratch,
    };
    Ok((network, tap))
}

impl Network {
    fn patch(&self, key: &str, value: &str) -> Result {
        let body = json!({"iface_id": "net0", key: value});
        self.vm
            .patch("/network-interfaces/net0", &body)?
            .success()
            .map(drop)
    }

    /// Waits until the guest sees this carrier.
    fn await_carrier(&self, carrier: u8) -> Result {
        let seen = || self.vm.guest().check("cat /sys/class/net/eth0/carrier");
        wait_until(&format!("carrier {carrier}"), GUEST_TIMEOUT, || {
            seen().is_ok_and(|seen| seen == carrier.to_string())
        })
    }

    /// The guest fetches what is on its disk from a server at the host's address in network `number`.
    fn assert_guest_fetches(&self, number: u8) -> Result {
        let listener = TcpListener::bind((host(number), 0))?;
        let port = listener.local_addr()?.port();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept()?;
            std::io::Write::write_all(&mut stream, &pattern(AMOUNT))
        });
        let address = host(number);
        self.vm
            .guest()
            .check(&format!("nc {address} {port} </dev/null | cmp - /dev/vda"))?;
        Ok(server
            .join()
            .unwrap_or_else(|_| Err(std::io::ErrorKind::Other.into()))?)
    }

    fn reaches_host(&self) -> Result<bool> {
        let ping = format!("ping -c 1 -W 1 {}", host(self.number));
        Ok(self.vm.guest().run(&ping)?.code == 0)
    }
}

/// Frames that the host has got from a tap and given to it.
fn frames(tap: &Tap) -> Result<[u64; 2]> {
    let read = |name: &str| -> Result<u64> {
        let path = format!("/sys/class/net/{}/statistics/{name}_packets", tap.name());
        Ok(std::fs::read_to_string(path)?.trim().parse()?)
    };
    Ok([read("rx")?, read("tx")?])
}

fn assert_a_pulled_cable_is_seen_and_passes_nothing(network: &Network, tap: &Tap) -> Result {
    network.await_carrier(1)?;
    network.assert_guest_fetches(network.number)?;
    network.patch("link_state", "down")?;
    network.await_carrier(0)?;
    let before = frames(tap)?;
    assert!(!network.reaches_host()?);
    assert_eq!(frames(tap)?, before);

    network.patch("link_state", "up")?;
    network.await_carrier(1)?;
    network.assert_guest_fetches(network.number)
}

#[test]
fn a_link_goes_down_and_up_on_pci() -> Result {
    let (network, tap) = boot("link-pci", 1, |vm| vm.vcpus(2))?;
    assert_a_pulled_cable_is_seen_and_passes_nothing(&network, &tap)
}

#[test]
fn a_link_goes_down_and_up_on_mmio() -> Result {
    let (network, tap) = boot("link-mmio", 3, TestVm::mmio)?;
    assert_a_pulled_cable_is_seen_and_passes_nothing(&network, &tap)
}

#[test]
fn a_guest_is_on_a_tap_that_the_monitor_inherited() -> Result {
    let tap = tap(8)?;
    let scratch = Scratch::new("inherited")?;
    let disk = scratch.file("disk", pattern(AMOUNT))?;
    let vm = TestVm::new("inherited")
        .inherit(tap.open()?, 50)
        .net(Net::unnamed("net0").with("host_fd", 50))
        .drive(Drive::new("data", disk).read_only())
        .boot_arg("mayfly.ip=10.80.8.2/24")
        .boot()?;
    let network = Network {
        vm,
        number: 8,
        _scratch: scratch,
    };
    network.assert_guest_fetches(8)
}

#[test]
fn a_card_moves_to_another_tap_unnoticed_by_its_guest() -> Result {
    let (network, old) = boot("link-move", 5, |vm| vm)?;
    let new = tap(6)?;
    network.assert_guest_fetches(5)?;
    let guest = network.vm.guest();
    let changes = guest.check("cat /sys/class/net/eth0/carrier_changes")?;
    network.patch("host_dev_name", new.name())?;
    network.assert_guest_fetches(6)?;
    assert!(frames(&new)?[0] > 0);

    // A tap that is not there can be made, one that is no tap cannot be used.
    let refused = json!({"iface_id": "net0", "host_dev_name": "lo"});
    network
        .vm
        .patch("/network-interfaces/net0", &refused)?
        .assert_refused(&["'lo' is not a single-queue tap"]);
    network.assert_guest_fetches(6)?;

    network.patch("host_dev_name", old.name())?;
    network.assert_guest_fetches(5)?;
    assert_eq!(guest.check("cat /sys/class/net/eth0/address")?, MAC);
    assert_eq!(guest.check("cat /sys/class/net/eth0/carrier_changes")?, changes);
    Ok(())
}
