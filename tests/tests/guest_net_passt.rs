//! A guest whose network is passt, run by an ordinary user: no tap, and no privilege on the host.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use mayfly_tests::{
    Drive, Failure, GUEST_TIMEOUT, HOST_TIMEOUT, Net, Result, Scratch, Tap, TestVm, Vm, pattern, wait_until,
};
use serde_json::json;

/// Bytes that go each way.
const AMOUNT: usize = 2 << 20;
/// The user `nobody`, as whom passt runs.
const NOBODY: u32 = 65534;
/// The router of the guest. Passt takes what goes there for the host itself.
const ROUTER: &str = "192.0.2.254";
const DHCP: &str = r#"cat >/tmp/dhcp <<'END'
#!/bin/sh
[ "$1" = bound ] || exit 0
ip link set eth0 mtu 65520
ip addr add "$ip/$mask" dev eth0
ip route add default via "$router"
END
chmod +x /tmp/dhcp && ip link set eth0 up && udhcpc -i eth0 -n -q -s /tmp/dhcp"#;

/// The host has one default route, so there is one guest at a time.
static HOST: Mutex<()> = Mutex::new(());

/// A running passt.
struct Passt(Child);

impl Passt {
    /// Starts it in a folder that its user can write to, and waits until it listens.
    fn start(folder: &Scratch) -> Result<Self> {
        let socket = folder.join("passt.sock");
        // What a passt before has left.
        let _ = std::fs::remove_file(&socket);
        let log = std::fs::File::create(folder.join("passt.log"))?;
        let child = Command::new("passt")
            .arg("--foreground")
            .arg("--stderr")
            .args(["--gateway", ROUTER, "--socket"])
            .arg(&socket)
            .uid(NOBODY)
            .gid(NOBODY)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn();
        let child = child.map_err(|e| Failure::new(format!("cannot run passt (package passt): {e}")))?;
        let passt = Self(child);
        wait_until("passt's socket", HOST_TIMEOUT, || socket.exists())
            .map_err(|e| Failure::new(format!("{e}; passt says: {}", log_of(folder))))?;
        Ok(passt)
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        // It may have ended before.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn log_of(folder: &Scratch) -> String {
    std::fs::read_to_string(folder.join("passt.log")).unwrap_or_default()
}

/// A guest on passt, and what passt needs: an interface of the host with a default route.
struct Network {
    vm: Vm,
    passt: Option<Passt>,
    scratch: Scratch,
    _uplink: Tap,
    _host: MutexGuard<'static, ()>,
}

fn boot(name: &str, card: impl FnOnce(Net) -> Net) -> Result<Network> {
    let host = HOST.lock().unwrap_or_else(PoisonError::into_inner);
    let uplink = Tap::create("mfpasst", Ipv4Addr::new(192, 0, 2, 1))?;
    let route = Command::new("ip")
        .args(["route", "add", "default", "via", ROUTER, "dev", "mfpasst"])
        .status()?;
    assert!(
        route.success(),
        "the host has a default route already: run this in the lab"
    );
    let scratch = Scratch::new(name)?;
    scratch.open_to_all()?;
    let disk = scratch.file("disk", pattern(AMOUNT))?;
    let passt = Passt::start(&scratch)?;
    let net = Net::unnamed("net0")
        .with("guest_mac", "06:00:c0:00:02:02")
        .with("backend", "passt")
        .with("socket", scratch.join("passt.sock").display().to_string());
    let vm = TestVm::new(name)
        .net(card(net))
        .drive(Drive::new("data", disk).read_only())
        .section("mmds-config", json!({"network_interfaces": ["net0"]}))
        .config_file()
        .boot()?;
    let network = Network {
        vm,
        passt: Some(passt),
        scratch,
        _uplink: uplink,
        _host: host,
    };
    network.in_guest(DHCP)?;
    Ok(network)
}

/// A server on the host's loopback interface for one connection, at the port that is returned.
fn serve<T: Send + 'static>(
    work: impl FnOnce(TcpStream) -> std::io::Result<T> + Send + 'static,
) -> Result<(u16, JoinHandle<std::io::Result<T>>)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = listener.local_addr()?.port();
    let server = thread::spawn(move || {
        let (stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(GUEST_TIMEOUT))?;
        work(stream)
    });
    Ok((port, server))
}

/// Answers a request of HTTP with the pattern.
fn give(mut stream: TcpStream) -> std::io::Result<()> {
    let mut line = String::new();
    let mut reader = BufReader::new(stream.try_clone()?);
    while line != "\r\n" {
        line.clear();
        reader.read_line(&mut line)?;
    }
    write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {AMOUNT}\r\n\r\n")?;
    stream.write_all(&pattern(AMOUNT))
}

fn take(mut stream: TcpStream) -> std::io::Result<Vec<u8>> {
    let mut received = Vec::new();
    stream.read_to_end(&mut received)?;
    Ok(received)
}

fn joined<T>(server: JoinHandle<std::io::Result<T>>) -> Result<T> {
    Ok(server.join().map_err(|_| Failure::new("the server panicked"))??)
}

impl Network {
    /// Runs a script in the guest; a failure shows what passt says.
    fn in_guest(&self, script: &str) -> Result<String> {
        let result = self.vm.guest().check(script);
        result.map_err(|e| Failure::new(format!("{e}\npasst says: {}", log_of(&self.scratch))))
    }

    fn assert_guest_and_host_talk(&self) -> Result {
        let (port, server) = serve(give)?;
        self.in_guest(&format!(
            "timeout 100 wget -q -O /tmp/got http://{ROUTER}:{port}/ && cmp /tmp/got /dev/vda"
        ))?;
        joined(server)?;

        let (port, server) = serve(take)?;
        self.in_guest(&format!("timeout 100 nc {ROUTER} {port} </dev/vda"))?;
        let received = joined(server)?;
        assert!(
            received == pattern(AMOUNT),
            "{} bytes came, or not the same",
            received.len()
        );
        Ok(())
    }

    fn await_carrier(&self, carrier: &str) -> Result {
        wait_until(&format!("carrier {carrier}"), GUEST_TIMEOUT, || {
            let seen = self.vm.guest().check("cat /sys/class/net/eth0/carrier");
            seen.is_ok_and(|seen| seen == carrier)
        })
    }
}

#[test]
fn a_guest_gets_its_address_and_data_from_passt() -> Result {
    let network = boot("passt", |net| net.with("mtu", 65520))?;
    network.assert_guest_and_host_talk()?;
    let address = network.in_guest("ip -4 addr show dev eth0")?;
    assert!(address.contains("192.0.2.1/24"), "{address}");
    let vm = &network.vm;
    assert!(vm.counted("net", "tx_bytes_count")? > u64::try_from(AMOUNT)?);
    assert!(vm.counted("net", "rx_bytes_count")? > u64::try_from(AMOUNT)?);
    assert_eq!(
        (vm.counted("net", "tx_fails")?, vm.counted("net", "rx_fails")?),
        (0, 0)
    );

    vm.put("/mmds", &json!({"name": "value"}))?.success()?;
    let metadata = "ip route add 169.254.169.254 dev eth0 && wget -q -O - http://169.254.169.254/name";
    assert_eq!(network.in_guest(metadata)?, "value");

    // Limits hold for this backend too.
    let limit = json!({"bandwidth": {"size": 65536, "refill_time": 100}});
    let body = json!({"iface_id": "net0", "rx_rate_limiter": limit, "tx_rate_limiter": limit});
    vm.patch("/network-interfaces/net0", &body)?.success()?;
    network.assert_guest_and_host_talk()?;
    assert!(vm.counted("net", "rx_rate_limiter_throttled")? > 0);
    Ok(())
}

#[test]
fn the_carrier_goes_with_passt_and_comes_back_with_it() -> Result {
    let mut network = boot("passt-dies", |net| net)?;
    network.passt = None;
    network.await_carrier("0")?;

    network.passt = Some(Passt::start(&network.scratch)?);
    network.await_carrier("1")?;
    network.assert_guest_and_host_talk()
}
