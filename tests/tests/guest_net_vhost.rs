//! A guest whose frames the host's kernel moves (vhost-net).

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::thread::{self, JoinHandle};

use mayfly_tests::{
    Drive, Failure, GUEST_TIMEOUT, Net, Result, Scratch, Tap, TestVm, Vm, pattern, wait_until,
};
use serde_json::{Value, json};

/// Bytes sent each way, which the guest finds on its disk.
const AMOUNT: usize = 4 << 20;
const MAC: &str = "06:00:0a:51:00:02";

/// A machine with a card on vhost-net, on the network `10.81.NUMBER.0/24` of a tap; the guest has an address of the next
/// network too.
struct Network {
    vm: Vm,
    number: u8,
    scratch: Scratch,
    _tap: Tap,
}

fn host(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 81, number, 1)
}

fn tap(number: u8) -> Result<Tap> {
    Tap::create(&format!("mfvhost{number}"), host(number))
}

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

fn boot(name: &str, number: u8, customize: impl FnOnce(TestVm) -> TestVm) -> Result<Network> {
    require_vhost()?;
    let tap = tap(number)?;
    let scratch = Scratch::new(name)?;
    let disk = scratch.file("disk", pattern(AMOUNT))?;
    let net = Net::new("net0", &tap).with("guest_mac", MAC).with("vhost", true);
    let vm = TestVm::new(name)
        .net(net)
        .drive(Drive::new("data", disk).read_only())
        .boot_arg(&format!("mayfly.ip=10.81.{number}.2/24"));
    let vm = customize(vm).boot()?;
    let network = Network {
        vm,
        number,
        scratch,
        _tap: tap,
    };
    network.add_second_address()?;
    Ok(network)
}

/// A server for one connection; its port is returned.
fn serve<T: Send + 'static>(
    address: Ipv4Addr,
    work: impl FnOnce(TcpStream) -> std::io::Result<T> + Send + 'static,
) -> Result<(u16, JoinHandle<std::io::Result<T>>)> {
    let listener = TcpListener::bind((address, 0))?;
    let port = listener.local_addr()?.port();
    let server = thread::spawn(move || {
        let (stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(GUEST_TIMEOUT))?;
        work(stream)
    });
    Ok((port, server))
}

fn joined<T>(server: JoinHandle<std::io::Result<T>>) -> Result<T> {
    Ok(server.join().map_err(|_| Failure::new("the server panicked"))??)
}

impl Network {
    fn add_second_address(&self) -> Result {
        let second = format!("ip addr add 10.81.{}.2/24 dev eth0", self.number + 1);
        self.vm.guest().check(&second).map(drop)
    }

    /// The guest sends its disk to the host, and fetches the same from it.
    fn assert_tcp_works(&self, number: u8) -> Result {
        let address = host(number);
        let (port, server) = serve(address, |mut stream| {
            let mut received = Vec::new();
            stream.read_to_end(&mut received)?;
            Ok(received)
        })?;
        let guest = self.vm.guest();
        guest.check(&format!("timeout 100 nc {address} {port} </dev/vda"))?;
        let received = joined(server)?;
        assert!(
            received == pattern(AMOUNT),
            "{} bytes came, or not the same",
            received.len()
        );

        let (port, server) = serve(address, |mut stream| stream.write_all(&pattern(AMOUNT)))?;
        guest.check(&format!(
            "timeout 100 nc {address} {port} </dev/null | cmp - /dev/vda"
        ))?;
        joined(server)
    }

    fn patch(&self, key: &str, value: &str) -> Result {
        let body = json!({"iface_id": "net0", key: value});
        self.vm
            .patch("/network-interfaces/net0", &body)?
            .success()
            .map(drop)
    }

    fn await_carrier(&self, carrier: &str) -> Result {
        wait_until(&format!("carrier {carrier}"), GUEST_TIMEOUT, || {
            let seen = self.vm.guest().check("cat /sys/class/net/eth0/carrier");
            seen.is_ok_and(|seen| seen == carrier)
        })
    }

    fn reaches_host(&self) -> Result<bool> {
        let ping = format!("ping -c 1 -W 1 {}", host(self.number));
        Ok(self.vm.guest().run(&ping)?.code == 0)
    }

    /// What Mayfly would have moved by itself.
    fn assert_mayfly_moved_nothing(&self) -> Result {
        let counted = [
            "tx_bytes_count",
            "rx_bytes_count",
            "event_fails",
            "activate_fails",
        ];
        for name in counted {
            assert_eq!(self.vm.counted("net", name)?, 0, "{name}");
        }
        Ok(())
    }
}

#[test]
fn tcp_works_both_ways_on_pci() -> Result {
    let network = boot("vhost-pci", 1, |vm| vm.vcpus(2))?;
    network.assert_tcp_works(1)?;
    let card = network
        .vm
        .guest()
        .check("cat /sys/class/net/eth0/address /sys/class/net/eth0/carrier")?;
    assert_eq!(card, format!("{MAC}\n1"));
    network.assert_mayfly_moved_nothing()
}

#[test]
fn tcp_works_both_ways_on_mmio() -> Result {
    let network = boot("vhost-mmio", 3, TestVm::mmio)?;
    network.assert_tcp_works(3)?;
    network.assert_mayfly_moved_nothing()
}

#[test]
fn frames_pass_only_while_machine_and_link_say_so() -> Result {
    let network = boot("vhost-stops", 5, |vm| vm)?;
    network.vm.pause()?;
    network.vm.resume()?;
    network.assert_tcp_works(5)?;

    network.patch("link_state", "down")?;
    network.await_carrier("0")?;
    assert!(!network.reaches_host()?);
    network.vm.pause()?;
    network.patch("link_state", "up")?;
    network.vm.resume()?;
    network.await_carrier("1")?;
    network.assert_tcp_works(5)?;

    let other = tap(6)?;
    network.patch("host_dev_name", other.name())?;
    network.assert_tcp_works(6)?;
    network.assert_mayfly_moved_nothing()
}

#[test]
fn a_driver_that_comes_again_finds_the_card_as_it_was() -> Result {
    let network = boot("vhost-reset", 7, |vm| vm)?;
    network.assert_tcp_works(7)?;
    network.vm.guest().check(
        "device=$(basename $(readlink -f /sys/class/net/eth0/device)) && cd /sys/bus/virtio/drivers/virtio_net && \
         echo $device >unbind && ! [ -e /sys/class/net/eth0 ] && echo $device >bind && \
         ip addr add 10.81.7.2/24 dev eth0 && ip link set eth0 up",
    )?;
    network.assert_tcp_works(7)?;
    network.assert_mayfly_moved_nothing()
}

#[test]
fn memory_comes_and_goes_while_frames_pass() -> Result {
    let network = boot("vhost-memory", 9, |vm| vm.vcpus(2))?;
    let vm = &network.vm;
    let file = network.scratch.file("pmem", pattern(AMOUNT))?;
    let pmem: Value = json!({"id": "hot", "path_on_host": file});
    vm.put("/pmem/hot", &pmem)?.success()?;
    vm.guest()
        .check("n=0; until [ -b /dev/pmem0 ]; do n=$((n + 1)); [ $n -lt 300 ] || exit 1; sleep 0.1; done")?;
    network.assert_tcp_works(9)?;
    vm.request("DELETE", "/pmem/hot", r#"{"timeout_ms": 20000}"#)?
        .success()?;
    network.assert_tcp_works(9)?;
    network.assert_mayfly_moved_nothing()
}
