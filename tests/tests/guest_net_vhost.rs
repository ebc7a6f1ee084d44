//! A guest whose frames the host's kernel moves (vhost-net).

use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use mayfly_tests::network::{Network, Subnet, assert_guest_fetches_in, assert_guest_sends_in, plug};
use mayfly_tests::virtio_mmio::AVAIL;
use mayfly_tests::{
    Drive, Failure, GUEST_TIMEOUT, Net, Result, Scratch, Tap, TestVm, TinyKernel, Vm, pattern, wait_until,
};
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
    assert_nothing_counted(&network.vm, "net")
}

fn assert_nothing_counted(vm: &Vm, group: &str) -> Result {
    let counted = [
        "tx_bytes_count",
        "rx_bytes_count",
        "event_fails",
        "activate_fails",
    ];
    for name in counted {
        assert_eq!(vm.counted(group, name)?, 0, "{name}");
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
fn a_card_that_comes_later_carries_tcp_each_time() -> Result {
    require_vhost()?;
    let (scratch, subnet) = (Scratch::new("vhost-hot")?, Subnet(57));
    let disk = scratch.file("disk", pattern(Network::AMOUNT))?;
    let vm = TestVm::new("vhost-hot")
        .vcpus(2)
        .drive(Drive::new("data", disk).read_only())
        .boot()?;
    for _ in 0..2 {
        let _tap = plug(&vm, "hot", subnet, |card| card.with("vhost", true))?;
        assert_guest_sends_in(&vm, subnet)?;
        assert_guest_fetches_in(&vm, subnet)?;
        assert_nothing_counted(&vm, "net_hot")?;
        vm.request("DELETE", "/network-interfaces/hot", r#"{"timeout_ms": 20000}"#)?
            .success()?;
        vm.guest().check("! [ -e /sys/class/net/eth0 ]")?;
    }
    Ok(())
}

/// Datagrams that came for a port where nobody listens.
fn stray_datagrams(network: &Network) -> Result<String> {
    let counters = network.vm.guest().check("grep ^Udp: /proc/net/snmp")?;
    let values = counters.lines().last().unwrap_or_default();
    Ok(values.split(' ').nth(2).unwrap_or_default().to_owned())
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
    let stray = stray_datagrams(&network)?;
    let socket = UdpSocket::bind((network.subnet().host(), 0))?;
    socket.send_to(b"lost", (network.subnet().guest(), 9))?;
    network.vm.pause()?;
    network.patch("link_state", "up")?;
    network.vm.resume()?;
    network.await_carrier(1)?;
    assert_tcp_works(&network)?;
    assert_eq!(stray_datagrams(&network)?, stray);
    socket.send_to(b"found", (network.subnet().guest(), 9))?;
    wait_until("a datagram", GUEST_TIMEOUT, || {
        stray_datagrams(&network).is_ok_and(|now| now != stray)
    })?;

    let other = Subnet(53);
    let tap = other.tap()?;
    let second = format!("ip addr add {}/24 dev eth0", other.guest());
    network.vm.guest().check(&second)?;
    network.patch("host_dev_name", tap.name())?;
    assert_guest_sends_in(&network.vm, other)?;
    assert_guest_fetches_in(&network.vm, other)?;
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
    let plug = || -> Result {
        vm.put("/pmem/hot", &pmem)?.success()?;
        let appears =
            "n=0; until [ -b /dev/pmem0 ]; do n=$((n + 1)); [ $n -lt 300 ] || exit 1; sleep 0.1; done";
        vm.guest().check(appears).map(drop)
    };
    let unplug = || -> Result {
        let answer = vm.request("DELETE", "/pmem/hot", r#"{"timeout_ms": 20000}"#)?;
        answer.success().map(drop)
    };
    plug()?;
    assert_tcp_works(&network)?;
    unplug()?;
    assert_tcp_works(&network)?;
    assert_mayfly_moved_nothing(&network)?;

    // A card without a driver holds nothing that has gone.
    let is_mapped = || -> Result<bool> {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", vm.pid()))?;
        Ok(maps.contains(&file.display().to_string()))
    };
    plug()?;
    vm.guest().check(
        "device=$(basename $(readlink -f /sys/class/net/eth0/device)) && \
         echo $device >/sys/bus/virtio/drivers/virtio_net/unbind",
    )?;
    assert!(is_mapped()?);
    unplug()?;
    assert!(!is_mapped()?);
    Ok(())
}

/// Entries of each queue, and where the rings are.
const SIZE: u32 = 64;
const RINGS: [u32; 2] = [0x20_0000, 0x21_0000];

/// A driver that offers receive buffers, and at a key breaks the transmit queue: its index runs far ahead.
fn breaking_driver() -> TinyKernel {
    let [rx, tx] = RINGS;
    TinyKernel::new()
        .print("up\n")
        .agree()
        .set_queue(0, SIZE, rx)
        .set_queue(1, SIZE, tx)
        // One writable buffer, offered as often as the ring has entries.
        .store(rx, 0x30_0000)
        .store(rx + 8, 0x1000)
        .store(rx + 12, 2)
        .store(rx + AVAIL, SIZE << 16)
        .set_driver_ok()
        .kick(0)
        .wait_for_key()
        .store(tx + AVAIL, 1000 << 16)
        .kick(1)
        .print("broken\n")
        .halt()
}

/// A counter of what the host has sent by a tap.
fn sent(tap: &Tap, what: &str) -> Result<u64> {
    let path = format!("/sys/class/net/{}/statistics/tx_{what}", tap.name());
    Ok(std::fs::read_to_string(path)?.trim().parse()?)
}

#[test]
fn an_error_of_one_queue_stops_the_other_too() -> Result {
    require_vhost()?;
    let (scratch, subnet) = (Scratch::new("vhost-broken")?, Subnet(56));
    let tap = subnet.tap()?;
    let vm = TestVm::new("vhost-broken")
        .kernel(breaking_driver().write(&scratch)?)
        .mmio()
        .net(Net::new("net0", &tap).with("vhost", true))
        .start()?;
    let socket = UdpSocket::bind((subnet.host(), 0))?;
    socket.set_broadcast(true)?;
    let [a, b, c, _] = subnet.host().octets();
    let send = || socket.send_to(b"to all", (Ipv4Addr::new(a, b, c, 255), 9));
    send()?;
    wait_until("a frame for the guest", GUEST_TIMEOUT, || {
        sent(&tap, "packets").is_ok_and(|count| count > 0)
    })?;

    let mut events = vm.events()?;
    events.wait_for("subscribed")?;
    vm.type_in(b"x")?;
    let event = events.wait_for("device_needs_reset")?;
    assert_eq!(event["id"], "net0");
    assert!(vm.console().wait_for("broken\n", Instant::now() + GUEST_TIMEOUT));
    // The tap fills up, as nobody takes what it has.
    let taken = sent(&tap, "packets")?;
    wait_until("a full tap", GUEST_TIMEOUT, || {
        let is_sent = (0..100).all(|_| send().is_ok());
        is_sent && sent(&tap, "dropped").is_ok_and(|count| count > 0)
    })?;
    assert_eq!(sent(&tap, "packets")?, taken);
    assert_eq!(vm.counted("net", "event_fails")?, 1);
    Ok(())
}
