//! A guest whose network is passt: it and the monitor are an ordinary user's, with no tap and no privilege on the host.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use mayfly_tests::network::{Network, Server, assert_received, await_carrier, give, receive};
use mayfly_tests::{
    Drive, Failure, HOST_TIMEOUT, Net, Result, Scratch, Tap, TestVm, Vm, pattern, wait_until,
};
use serde_json::json;

/// The user `nobody`, as whom passt and the monitor run.
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
struct Machine {
    vm: Vm,
    passt: Option<Passt>,
    scratch: Scratch,
    _uplink: Tap,
    _host: MutexGuard<'static, ()>,
}

/// The card, on the passt in this folder.
fn card(id: &str, folder: &Scratch) -> Net {
    Net::unnamed(id)
        .with("guest_mac", "06:00:c0:00:02:02")
        .with("backend", "passt")
        .with("socket", folder.join("passt.sock").display().to_string())
}

/// Boots a machine that has the card from the start.
fn boot(name: &str, customize: impl FnOnce(Net) -> Net) -> Result<Machine> {
    let machine = boot_with(name, |vm, folder| {
        vm.net(customize(card("net0", folder)))
            .section("mmds-config", json!({"network_interfaces": ["net0"]}))
    })?;
    machine.in_guest(DHCP)?;
    Ok(machine)
}

fn boot_with(name: &str, machine: impl FnOnce(TestVm, &Scratch) -> TestVm) -> Result<Machine> {
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
    let disk = scratch.file("disk", pattern(Network::AMOUNT))?;
    let passt = Passt::start(&scratch)?;
    let vm = TestVm::new(name)
        .user(NOBODY)
        .drive(Drive::new("data", disk).read_only())
        .config_file();
    let vm = machine(vm, &scratch).boot()?;
    assert_has_no_rights(&vm)?;
    Ok(Machine {
        vm,
        passt: Some(passt),
        scratch,
        _uplink: uplink,
        _host: host,
    })
}

/// The monitor is the user's, with no capability.
fn assert_has_no_rights(vm: &Vm) -> Result {
    let status = std::fs::read_to_string(format!("/proc/{}/status", vm.pid()))?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_default().split_whitespace().collect::<Vec<_>>()
    };
    assert_eq!(field("Uid:"), ["65534"; 4]);
    assert_eq!(field("Gid:"), ["65534"; 4]);
    assert!(field("Groups:").is_empty(), "{status}");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(field(set), ["0000000000000000"], "{set}");
    }
    Ok(())
}

/// Answers a request of HTTP with the pattern.
fn give_by_http(mut stream: TcpStream) -> std::io::Result<()> {
    let mut line = String::new();
    let mut reader = BufReader::new(stream.try_clone()?);
    while line != "\r\n" {
        line.clear();
        reader.read_line(&mut line)?;
    }
    let amount = Network::AMOUNT;
    write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {amount}\r\n\r\n")?;
    give(stream, amount)
}

impl Machine {
    /// Runs a script in the guest; a failure shows what passt says.
    fn in_guest(&self, script: &str) -> Result<String> {
        let result = self.vm.guest().check(script);
        result.map_err(|e| Failure::new(format!("{e}\npasst says: {}", log_of(&self.scratch))))
    }

    fn assert_guest_and_host_talk(&self) -> Result {
        let server = Server::start(Ipv4Addr::LOCALHOST, give_by_http)?;
        let port = server.port();
        self.in_guest(&format!(
            "timeout 100 wget -q -O /tmp/got http://{ROUTER}:{port}/ && cmp /tmp/got /dev/vda"
        ))?;
        server.join()?;

        let server = Server::start(Ipv4Addr::LOCALHOST, receive)?;
        let port = server.port();
        self.in_guest(&format!("timeout 100 nc {ROUTER} {port} </dev/vda"))?;
        assert_received(&server.join()?);
        Ok(())
    }
}

#[test]
fn a_guest_gets_its_address_and_data_from_passt() -> Result {
    let machine = boot("passt", |net| net.with("mtu", 65520))?;
    machine.assert_guest_and_host_talk()?;
    let address = machine.in_guest("ip -4 addr show dev eth0")?;
    assert!(address.contains("192.0.2.1/24"), "{address}");
    let vm = &machine.vm;
    assert!(vm.counted("net", "tx_bytes_count")? > u64::try_from(Network::AMOUNT)?);
    assert!(vm.counted("net", "rx_bytes_count")? > u64::try_from(Network::AMOUNT)?);
    assert_eq!(
        (vm.counted("net", "tx_fails")?, vm.counted("net", "rx_fails")?),
        (0, 0)
    );

    vm.put("/mmds", &json!({"name": "value"}))?.success()?;
    let metadata = "ip route add 169.254.169.254 dev eth0 && wget -q -O - http://169.254.169.254/name";
    assert_eq!(machine.in_guest(metadata)?, "value");

    // Limits hold for this backend too.
    let limit = json!({"bandwidth": {"size": 65536, "refill_time": 100}});
    let body = json!({"iface_id": "net0", "rx_rate_limiter": limit, "tx_rate_limiter": limit});
    vm.patch("/network-interfaces/net0", &body)?.success()?;
    machine.assert_guest_and_host_talk()?;
    assert!(vm.counted("net", "rx_rate_limiter_throttled")? > 0);
    Ok(())
}

#[test]
fn the_carrier_goes_with_passt_and_comes_back_with_it() -> Result {
    let mut machine = boot("passt-dies", |net| net)?;
    machine.passt = None;
    await_carrier(&machine.vm, 0)?;

    machine.passt = Some(Passt::start(&machine.scratch)?);
    await_carrier(&machine.vm, 1)?;
    machine.assert_guest_and_host_talk()
}

#[test]
fn a_card_that_comes_later_gets_its_address_and_data_from_passt() -> Result {
    let machine = boot_with("passt-hot", |vm, _| vm)?;
    let hot = card("hot", &machine.scratch).into_json();
    machine.vm.put("/network-interfaces/hot", &hot)?.success()?;
    machine.in_guest(&format!(
        "n=0; until [ -e /sys/class/net/eth0 ]; do n=$((n + 1)); [ $n -lt 300 ] || exit 1; sleep 0.1; done\n{DHCP}"
    ))?;
    machine.assert_guest_and_host_talk()?;
    for name in ["tx_bytes_count", "rx_bytes_count"] {
        let bytes = machine.vm.counted("net_hot", name)?;
        assert!(bytes > u64::try_from(Network::AMOUNT)?, "{name}: {bytes}");
    }
    machine
        .vm
        .request("DELETE", "/network-interfaces/hot", r#"{"timeout_ms": 20000}"#)?
        .success()?;
    machine.in_guest("! [ -e /sys/class/net/eth0 ]").map(drop)
}
