//! Network cards: real TCP between a guest and this process, through a tap.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use mayfly_tests::network::{Network, Server, Subnet, assert_received};
use mayfly_tests::{Failure, GUEST_TIMEOUT, Guest, Net, Result, Scratch, Tap, TestVm, pattern};

fn boot(name: &str, number: u8, machine: impl FnOnce(TestVm) -> TestVm) -> Result<Network> {
    let card = |net: Net| net.with("guest_mac", "06:00:0a:4d:00:02").with("mtu", 1400);
    Network::boot(name, Subnet(number), card, machine)
}

/// Connects to a server in the guest that may still be starting.
fn connect(network: &Network, port: u16) -> Result<TcpStream> {
    let deadline = Instant::now() + GUEST_TIMEOUT;
    let address = (network.subnet().guest(), port).into();
    loop {
        match TcpStream::connect_timeout(&address, Duration::from_secs(5)) {
            Ok(stream) => {
                stream.set_read_timeout(Some(GUEST_TIMEOUT))?;
                return Ok(stream);
            }
            Err(e) if Instant::now() > deadline => {
                return Err(network.vm.failure(&format!("cannot connect to the guest: {e}")));
            }
            Err(_) => thread::sleep(Duration::from_millis(100)),
        }
    }
}

/// We connect to a server in the guest, which sends back what it gets: both directions at once.
fn assert_host_reaches_guest(network: &Network) -> Result {
    network
        .vm
        .guest()
        .check("nc -l -p 5000 -e cat </dev/null >/dev/null 2>&1 &")?;
    let mut stream = connect(network, 5000)?;
    let mut writer = stream.try_clone()?;
    let sender = thread::spawn(move || {
        writer.write_all(&pattern(Network::AMOUNT))?;
        writer.shutdown(Shutdown::Write)
    });
    let mut echoed = Vec::new();
    stream.read_to_end(&mut echoed)?;
    sender.join().map_err(|_| Failure::new("the sender panicked"))??;
    assert_received(&echoed);
    Ok(())
}

fn assert_card_is_as_configured(guest: &Guest) -> Result {
    let card =
        guest.check("cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu /sys/class/net/eth0/carrier")?;
    assert_eq!(card, "06:00:0a:4d:00:02\n1400\n1");
    // CSUM, GUEST_CSUM, MTU, MAC; TSO4, TSO6, ECN and UFO of the guest and of the host; MRG_RXBUF, STATUS; and what
    // every device offers: INDIRECT_DESC, EVENT_IDX, VERSION_1. The driver of this kernel does not know USO yet.
    assert_eq!(
        guest.features("/sys/class/net/eth0/device")?,
        [0, 1, 3, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 28, 29, 32]
    );
    Ok(())
}

fn assert_traffic_is_counted(network: &Network) -> Result {
    let vm = &network.vm;
    // Each way the file went twice.
    let amount = 2 * u64::try_from(Network::AMOUNT)?;
    assert!(vm.counted("net", "tx_bytes_count")? > amount);
    assert!(vm.counted("net", "rx_bytes_count")? > amount);
    let failures = ["tx_fails", "rx_fails", "tx_malformed_frames"].map(|name| vm.counted("net", name));
    assert!(
        failures.iter().all(|count| matches!(count, Ok(0))),
        "{failures:?}"
    );
    Ok(())
}

#[test]
fn tcp_works_both_ways_on_pci() -> Result {
    let network = boot("net-pci", 1, |vm| vm.vcpus(2))?;
    assert_card_is_as_configured(&network.vm.guest())?;
    network.assert_guest_sends()?;
    network.assert_guest_fetches()?;
    assert_host_reaches_guest(&network)?;
    assert_traffic_is_counted(&network)?;
    assert_the_tap_outlives_the_machine(network)
}

#[test]
fn tcp_works_both_ways_on_mmio() -> Result {
    let network = boot("net-mmio", 2, TestVm::mmio)?;
    assert_card_is_as_configured(&network.vm.guest())?;
    network.assert_guest_sends()?;
    network.assert_guest_fetches()?;
    assert_host_reaches_guest(&network)
}

/// A tap that was there before stays, and is free again.
fn assert_the_tap_outlives_the_machine(network: Network) -> Result {
    let Network { vm, tap, .. } = network;
    vm.guest().run_last("poweroff")?;
    assert_eq!(vm.wait_exit()?, 0);
    assert!(Tap::exists(tap.name()));
    Ok(())
}

#[test]
fn a_tap_made_by_the_monitor_carries_tcp_and_goes_with_it() -> Result {
    let subnet = Subnet(3);
    let vm = TestVm::new("net-own")
        .net(Net::on("net0", "mftest3"))
        .boot_arg(&subnet.boot_arg())
        .boot()?;
    Tap::set_up("mftest3", subnet.host())?;
    assert!(vm.guest().check("cat /sys/class/net/eth0/address")?.len() == 17);
    let server = Server::start(subnet.host(), |stream| io::copy(&mut &stream, &mut &stream))?;
    vm.guest().check(&format!(
        "seq 100000 >/tmp/sent && timeout 100 nc {} {} </tmp/sent | cmp - /tmp/sent",
        subnet.host(),
        server.port()
    ))?;
    assert_eq!(server.join()?, 588_895);
    vm.guest().run_last("reboot -f")?;
    assert_eq!(vm.wait_exit()?, 0);
    assert!(!Tap::exists("mftest3"));
    Ok(())
}

#[test]
fn a_failed_start_leaves_no_tap() -> Result {
    let scratch = Scratch::new("no-kernel")?;
    let kernel = scratch.file("kernel", "no kernel")?;
    let failed = TestVm::new("net-failed")
        .kernel(kernel)
        .net(Net::on("net0", "mftest4"))
        .start();
    let message = failed
        .err()
        .map(|failure| failure.to_string())
        .unwrap_or_default();
    assert!(
        message.contains("is neither an ELF vmlinux nor a bzImage"),
        "{message}"
    );
    assert!(!Tap::exists("mftest4"));
    Ok(())
}
