//! Network cards with several pairs of queues: TCP in several streams at once, on several io threads.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};

use mayfly_tests::network::{Network, Server, Subnet, assert_received, receive};
use mayfly_tests::{Net, Result, Tap, TestVm, Vm, pattern};
use serde_json::json;

/// The end of a stream, which waits for what happens meanwhile.
const REST: usize = 64 << 10;

/// A machine with a card of so many pairs of queues, and two io threads.
fn boot(number: u8, queues: u8, customize: impl FnOnce(TestVm) -> TestVm) -> Result<Network> {
    let subnet = Subnet(number);
    let tap = subnet.multi_queue_tap()?;
    let card = Net::new("net0", &tap)
        .with("queues", queues)
        .with("guest_mac", "06:00:0a:4d:00:02");
    let vm = TestVm::new("net-queues")
        .machine("io_threads", json!(2))
        .net(card);
    Network::boot_on(customize(vm), tap, subnet)
}

/// How many pairs the guest's driver uses of its card.
fn pairs(vm: &Vm) -> Result<String> {
    vm.guest().check("ls /sys/class/net/eth0/queues | grep -c tx-")
}

/// Sends the pattern, but the rest of it only when the guest says so.
fn give_in_two(mut stream: TcpStream) -> io::Result<()> {
    let content = pattern(Network::AMOUNT);
    let (first, rest) = content.split_at(content.len() - REST);
    stream.write_all(first)?;
    stream.read_exact(&mut [0])?;
    stream.write_all(rest)?;
    stream.shutdown(Shutdown::Write)?;
    receive(stream).map(drop)
}

/// Streams run in both directions from two CPUs, `meanwhile` happens, and all arrives as it was sent.
fn assert_streams(network: &Network, meanwhile: impl FnOnce() -> Result) -> Result {
    let (host, guest) = (network.subnet().host(), network.vm.guest());
    let sources = [
        Server::start(host, give_in_two)?,
        Server::start(host, give_in_two)?,
    ];
    let sinks = [Server::start(host, receive)?, Server::start(host, receive)?];
    guest.check("rm -f /tmp/over /tmp/failed")?;
    for (cpu, (source, sink)) in sources.iter().zip(&sinks).enumerate() {
        guest.check(&format!(
            "over() {{ until [ -e /tmp/over ]; do usleep 100000; done; }}; cpu=$(({cpu} % $(nproc)))
             (over; echo) | taskset -c $cpu nc {host} {} | cmp - /dev/vda || touch /tmp/failed &
             (dd if=/dev/vda bs={REST} count={count} 2>/dev/null; over; dd if=/dev/vda bs={REST} skip={count} 2>/dev/null) | \
             taskset -c $cpu nc {host} {} || touch /tmp/failed &",
            source.port(),
            sink.port(),
            count = Network::AMOUNT / REST - 1,
        ))?;
    }
    meanwhile()?;
    guest.check("touch /tmp/over; wait; [ ! -e /tmp/failed ]")?;
    sources.into_iter().try_for_each(Server::join)?;
    for sink in sinks {
        assert_received(&sink.join()?);
    }
    Ok(())
}

/// The interrupts of the card's queues, each of a vector.
fn assert_every_queue_interrupts(vm: &Vm) -> Result {
    let lines = vm
        .guest()
        .check("grep -E 'virtio[0-9]*-(in|out)put' /proc/interrupts")?;
    assert_eq!(lines.lines().count(), 4, "{lines}");
    for line in lines.lines().filter(|line| line.contains("input")) {
        let counts = line.split_whitespace().skip(1).take(2);
        assert!(counts.into_iter().any(|count| count != "0"), "{lines}");
    }
    Ok(())
}

#[test]
fn a_card_with_two_pairs_uses_both_of_them() -> Result {
    let network = boot(90, 2, |vm| vm.vcpus(2))?;
    let vm = &network.vm;
    assert_eq!(pairs(vm)?, "2");
    let before = vm.wakeups()?;
    assert_streams(&network, || Ok(()))?;
    assert_every_queue_interrupts(vm)?;
    for ((id, name), sleeps) in vm.wakeups()? {
        assert!(
            !name.starts_with("io ") || sleeps > before[&(id, name.clone())],
            "thread {name} did nothing"
        );
    }
    let moved = u64::try_from(2 * Network::AMOUNT)?;
    assert!(vm.counted("net", "tx_bytes_count")? > moved && vm.counted("net", "rx_bytes_count")? > moved);
    assert_eq!(vm.counted("net", "tx_fails")? + vm.counted("net", "rx_fails")?, 0);
    assert_the_driver_comes_and_goes_under_load(&network)
}

/// A driver that is unbound resets the card, while frames are on their way on both loops.
fn assert_the_driver_comes_and_goes_under_load(network: &Network) -> Result {
    let (host, address) = (network.subnet().host(), network.subnet().guest());
    network.vm.guest().check(&format!(
        "for cpu in 0 1; do taskset -c $cpu ping -A -s 1400 -w 2 {host} >/dev/null 2>&1 & done
         device=$(basename $(readlink /sys/class/net/eth0/device)); cd /sys/bus/virtio/drivers/virtio_net
         for round in 1 2 3; do echo $device >unbind; [ ! -e /sys/class/net/eth0 ]; echo $device >bind
         n=0; until [ -e /sys/class/net/eth0 ] || [ $n = 50 ]; do usleep 100000; n=$((n+1)); done
         ip link set eth0 up; ip addr add {address}/24 dev eth0; done; wait"
    ))?;
    assert_eq!(pairs(&network.vm)?, "2");
    assert_streams(network, || Ok(()))?;
    assert_eq!(network.vm.counted("net", "activate_fails")?, 0);
    Ok(())
}

/// The link goes and comes, the card moves away and back, and the machine rests, while streams run.
fn assert_streams_survive_changes(network: &Network, other: &Tap) -> Result {
    assert_streams(network, || {
        for _ in 0..3 {
            network.patch("link_state", "down")?;
            network.patch("link_state", "up")?;
            network.patch("host_dev_name", other.name())?;
            network.patch("host_dev_name", network.tap.name())?;
            network.vm.pause()?;
            network.patch("link_state", "down")?;
            network.patch("link_state", "up")?;
            network.vm.resume()?;
        }
        Ok(())
    })?;
    assert_eq!(pairs(&network.vm)?, "2");
    assert_eq!(network.vm.counted("net", "event_fails")?, 0);
    Ok(())
}

#[test]
fn streams_on_both_pairs_survive_moves_and_a_link_that_flips_on_pci() -> Result {
    let (network, other) = (boot(91, 2, |vm| vm.vcpus(2))?, Subnet(92).multi_queue_tap()?);
    assert_streams_survive_changes(&network, &other)
}

#[test]
fn streams_on_both_pairs_survive_moves_and_a_link_that_flips_on_mmio() -> Result {
    let (network, other) = (
        boot(93, 2, |vm| vm.mmio().vcpus(2))?,
        Subnet(94).multi_queue_tap()?,
    );
    assert_streams_survive_changes(&network, &other)
}

#[test]
fn a_guest_with_one_cpu_uses_one_of_four_pairs() -> Result {
    let network = boot(95, 4, |vm| vm)?;
    assert_eq!(pairs(&network.vm)?, "1");
    assert_streams(&network, || Ok(()))
}

#[test]
fn the_metadata_service_answers_on_both_pairs_of_a_card_that_was_plugged_in() -> Result {
    let network = boot(96, 2, |vm| {
        let mmds = json!({"version": "V1", "network_interfaces": ["net0"]});
        vm.vcpus(2).section("mmds-config", mmds).config_file()
    })?;
    let (vm, other) = (&network.vm, Subnet(97).multi_queue_tap()?);
    vm.put("/mmds", &json!({"key": "value"}))?.success()?;
    vm.guest().check("ip route add 169.254.169.254 dev eth0")?;
    for cpu in [0, 1, 0, 1] {
        let ask = format!("taskset -c {cpu} wget -q -O - http://169.254.169.254/key");
        assert_eq!(vm.guest().check(&ask)?, "value");
    }
    let card = json!({"iface_id": "hot", "host_dev_name": other.name(), "queues": 2});
    vm.put("/network-interfaces/hot", &card)?.success()?;
    vm.guest().check(&format!(
        "n=0; until [ -e /sys/class/net/eth1 ] || [ $n = 100 ]; do usleep 100000; n=$((n+1)); done
         ip link set eth1 up; ip addr add {}/24 dev eth1
         for cpu in 0 1; do taskset -c $cpu ping -c 3 -W 5 {} || exit 1; done",
        Subnet(97).guest(),
        Subnet(97).host()
    ))?;
    assert_eq!(
        vm.guest().check("ls /sys/class/net/eth1/queues | grep -c tx-")?,
        "2"
    );
    vm.request("DELETE", "/network-interfaces/hot", r#"{"timeout_ms": 20000}"#)?
        .success()?;
    assert_eq!(vm.guest().run("[ -e /sys/class/net/eth1 ]")?.code, 1);
    Ok(())
}
