//! Network cards: real TCP between a guest and this process, through a tap.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use mayfly_tests::{Drive, Failure, GUEST_TIMEOUT, Guest, Net, Result, Scratch, Tap, TestVm, Vm, pattern};

/// Bytes sent each way, which the guest finds on its disk.
const AMOUNT: usize = 4 << 20;

/// A machine with a card on a tap, both with addresses of the network `10.77.NUMBER.0/24`.
struct Network {
    vm: Vm,
    tap: Tap,
    number: u8,
    _scratch: Scratch,
}

fn boot(name: &str, number: u8, customize: impl FnOnce(TestVm) -> TestVm) -> Result<Network> {
    let tap = Tap::create(&format!("mftest{number}"), Ipv4Addr::new(10, 77, number, 1))?;
    let scratch = Scratch::new("net")?;
    let disk = scratch.file("disk", pattern(AMOUNT))?;
    let net = Net::new("net0", &tap)
        .with("guest_mac", "06:00:0a:4d:00:02")
        .with("mtu", 1400);
    let vm = TestVm::new(name)
        .net(net)
        .drive(Drive::new("data", disk).read_only());
    let vm = customize(vm.boot_arg(&format!("mayfly.ip=10.77.{number}.2/24"))).boot()?;
    Ok(Network {
        vm,
        tap,
        number,
        _scratch: scratch,
    })
}

impl Network {
    fn host(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self.number, 1)
    }

    fn guest_address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self.number, 2)
    }

    /// Connects to a server in the guest that may still be starting.
    fn connect(&self, port: u16) -> Result<TcpStream> {
        let deadline = Instant::now() + GUEST_TIMEOUT;
        loop {
            match TcpStream::connect_timeout(&(self.guest_address(), port).into(), Duration::from_secs(5)) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(GUEST_TIMEOUT))?;
                    return Ok(stream);
                }
                Err(e) if Instant::now() > deadline => {
                    return Err(self.vm.failure(&format!("cannot connect to the guest: {e}")));
                }
                Err(_) => thread::sleep(Duration::from_millis(100)),
            }
        }
    }
}

/// Takes one connection before the deadline.
fn accept(listener: &TcpListener) -> Result<TcpStream> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + GUEST_TIMEOUT;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(GUEST_TIMEOUT))?;
                return Ok(stream);
            }
            Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(10)),
            Err(e) => return Err(Failure::new(format!("the guest did not connect: {e}"))),
        }
    }
}

fn joined<T>(thread: thread::JoinHandle<Result<T>>) -> Result<T> {
    thread
        .join()
        .unwrap_or_else(|_| Err(Failure::new("the thread of the other side panicked")))
}

/// The guest sends its disk to a server of ours.
fn assert_guest_sends(network: &Network) -> Result {
    let listener = TcpListener::bind((network.host(), 0))?;
    let port = listener.local_addr()?.port();
    let server = thread::spawn(move || {
        let mut received = Vec::new();
        accept(&listener)?.read_to_end(&mut received)?;
        Ok(received)
    });
    network
        .vm
        .guest()
        .check(&format!("nc {} {port} </dev/vda", network.host()))?;
    let received = joined(server)?;
    assert!(
        received == pattern(AMOUNT),
        "{} bytes came, or not the same",
        received.len()
    );
    Ok(())
}

/// The guest fetches what is on its disk from a server of ours.
fn assert_guest_receives(network: &Network) -> Result {
    let listener = TcpListener::bind((network.host(), 0))?;
    let port = listener.local_addr()?.port();
    let server = thread::spawn(move || {
        let mut stream = accept(&listener)?;
        stream.write_all(&pattern(AMOUNT))?;
        stream.shutdown(Shutdown::Write)?;
        // Until the guest has taken all of it.
        stream.read_to_end(&mut Vec::new())?;
        Ok(())
    });
    network.vm.guest().check(&format!(
        "nc {} {port} </dev/null | cmp - /dev/vda",
        network.host()
    ))?;
    joined(server)
}

/// We connect to a server in the guest, which sends back what it gets: both directions at once.
fn assert_host_reaches_guest(network: &Network) -> Result {
    network
        .vm
        .guest()
        .check("nc -l -p 5000 -e cat </dev/null >/dev/null 2>&1 &")?;
    let mut stream = network.connect(5000)?;
    let mut writer = stream.try_clone()?;
    let sender = thread::spawn(move || {
        writer.write_all(&pattern(AMOUNT))?;
        Ok(writer.shutdown(Shutdown::Write)?)
    });
    let mut echoed = Vec::new();
    stream.read_to_end(&mut echoed)?;
    joined(sender)?;
    assert!(
        echoed == pattern(AMOUNT),
        "{} bytes came back, or not the same",
        echoed.len()
    );
    Ok(())
}

fn assert_card_is_as_configured(guest: &Guest) -> Result {
    let card =
        guest.check("cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu /sys/class/net/eth0/carrier")?;
    assert_eq!(card, "06:00:0a:4d:00:02\n1400\n1");
    Ok(())
}

fn assert_traffic_is_counted(network: &Network) -> Result {
    let vm = &network.vm;
    // Each way the file went twice.
    let amount = 2 * u64::try_from(AMOUNT)?;
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
    assert_guest_sends(&network)?;
    assert_guest_receives(&network)?;
    assert_host_reaches_guest(&network)?;
    assert_traffic_is_counted(&network)?;
    assert_the_tap_outlives_the_machine(network)
}

#[test]
fn tcp_works_both_ways_on_mmio() -> Result {
    let network = boot("net-mmio", 2, TestVm::mmio)?;
    assert_card_is_as_configured(&network.vm.guest())?;
    assert_guest_sends(&network)?;
    assert_guest_receives(&network)?;
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
fn a_tap_made_by_the_monitor_goes_with_it() -> Result {
    let vm = TestVm::new("net-own").net(Net::on("net0", "mftest3")).boot()?;
    assert!(Tap::exists("mftest3"));
    assert!(vm.guest().check("cat /sys/class/net/eth0/address")?.len() == 17);
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
    assert!(failed.is_err());
    assert!(!Tap::exists("mftest4"));
    Ok(())
}
