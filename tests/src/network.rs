//! Guests on a network with the host: [`Subnet`] has the addresses, [`Server`] is the host's end of a connection, and
//! [`Network`] a machine with what it takes to compare what went through its card.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::{Drive, Failure, GUEST_TIMEOUT, Net, Result, Scratch, Tap, TestVm, Vm, pattern, wait_until};

/// The network `10.77.NUMBER.0/24`. The host has its first address and a guest its second.
#[derive(Clone, Copy, Debug)]
pub struct Subnet(pub u8);

impl Subnet {
    /// The host's address.
    pub fn host(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self.0, 1)
    }

    /// The guest's address.
    pub fn guest(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self.0, 2)
    }

    /// A tap that gives the host its address.
    pub fn tap(self) -> Result<Tap> {
        Tap::create(&format!("mftest{}", self.0), self.host())
    }

    /// The same, as `ip tuntap add ... multi_queue` makes it.
    pub fn multi_queue_tap(self) -> Result<Tap> {
        Tap::create_multi_queue(&format!("mftest{}", self.0), self.host())
    }

    /// The kernel's argument that gives the guest's `eth0` its address.
    pub fn boot_arg(self) -> String {
        format!("mayfly.ip={}/24", self.guest())
    }
}

/// A server of the host for one connection, which ends with it.
#[derive(Debug)]
pub struct Server<T> {
    port: u16,
    thread: JoinHandle<io::Result<T>>,
}

impl<T: Send + 'static> Server<T> {
    /// Listens at `address`, and does `work` on the connection that comes.
    pub fn start(
        address: Ipv4Addr,
        work: impl FnOnce(TcpStream) -> io::Result<T> + Send + 'static,
    ) -> Result<Self> {
        let listener = TcpListener::bind((address, 0))?;
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        let thread = thread::spawn(move || work(accept(&listener)?));
        Ok(Self { port, thread })
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Waits for its end; returns what came of the work.
    pub fn join(self) -> Result<T> {
        let done = self.thread.join();
        Ok(done.map_err(|_| Failure::new("the server panicked"))??)
    }
}

/// Takes one connection before the deadline.
fn accept(listener: &TcpListener) -> io::Result<TcpStream> {
    let deadline = Instant::now() + GUEST_TIMEOUT;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(GUEST_TIMEOUT))?;
                return Ok(stream);
            }
            Err(e) if e.kind() != ErrorKind::WouldBlock => return Err(e),
            Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(10)),
            Err(_) => return Err(io::Error::new(ErrorKind::TimedOut, "the guest did not connect")),
        }
    }
}

/// Receives all that comes.
pub fn receive(mut stream: TcpStream) -> io::Result<Vec<u8>> {
    let mut received = Vec::new();
    stream.read_to_end(&mut received)?;
    Ok(received)
}

/// Sends a pattern of `amount` bytes, and stays until the other end has taken it.
pub fn give(mut stream: TcpStream, amount: usize) -> io::Result<()> {
    stream.write_all(&pattern(amount))?;
    stream.shutdown(Shutdown::Write)?;
    receive(stream).map(drop)
}

/// A machine with the card `net0` on a tap. Its disk `/dev/vda` holds a pattern of [`Network::AMOUNT`] bytes.
pub struct Network {
    /// The machine.
    pub vm: Vm,
    /// Its tap.
    pub tap: Tap,
    subnet: Subnet,
    _scratch: Scratch,
}

impl Network {
    /// Bytes that each transfer moves.
    pub const AMOUNT: usize = 2 << 20;

    /// Boots a machine on a tap of `subnet`, with what the test has to say about its card and about the rest.
    pub fn boot(
        name: &str,
        subnet: Subnet,
        card: impl FnOnce(Net) -> Net,
        machine: impl FnOnce(TestVm) -> TestVm,
    ) -> Result<Self> {
        let tap = subnet.tap()?;
        let vm = TestVm::new(name).net(card(Net::new("net0", &tap)));
        Self::boot_on(machine(vm), tap, subnet)
    }

    /// Boots a machine that has its card on `tap` already.
    pub fn boot_on(vm: TestVm, tap: Tap, subnet: Subnet) -> Result<Self> {
        let scratch = Scratch::new("network")?;
        let disk = scratch.file("disk", pattern(Self::AMOUNT))?;
        let vm = vm
            .drive(Drive::new("data", disk).read_only())
            .boot_arg(&subnet.boot_arg());
        Ok(Self {
            vm: vm.boot()?,
            tap,
            subnet,
            _scratch: scratch,
        })
    }

    /// Its network.
    pub fn subnet(&self) -> Subnet {
        self.subnet
    }

    /// The guest sends its disk to a server of the host.
    pub fn assert_guest_sends(&self) -> Result {
        assert_guest_sends_in(&self.vm, self.subnet)
    }

    /// The guest fetches what is on its disk from a server of the host.
    pub fn assert_guest_fetches(&self) -> Result {
        assert_guest_fetches_in(&self.vm, self.subnet)
    }

    /// Whether a ping finds the host.
    pub fn guest_reaches_host(&self) -> Result<bool> {
        let ping = format!("ping -c 1 -W 1 {}", self.subnet.host());
        Ok(self.vm.guest().run(&ping)?.code == 0)
    }

    /// Changes a setting of the card.
    pub fn patch(&self, key: &str, value: &str) -> Result {
        let patch = json!({"iface_id": "net0", key: value});
        let answer = self.vm.patch("/network-interfaces/net0", &patch)?;
        answer.success().map(drop)
    }

    /// Waits until the guest sees this carrier.
    pub fn await_carrier(&self, carrier: u8) -> Result {
        await_carrier(&self.vm, carrier)
    }
}

/// Attaches a card on a tap of `subnet` to a running machine, with what the test has to say about it, and gives the guest,
/// which has no other card, its address there.
pub fn plug(vm: &Vm, id: &str, subnet: Subnet, card: impl FnOnce(Net) -> Net) -> Result<Tap> {
    let tap = subnet.tap()?;
    let card = card(Net::new(id, &tap)).into_json();
    vm.put(&format!("/network-interfaces/{id}"), &card)?.success()?;
    let guest = subnet.guest();
    vm.guest().check(&format!(
        "n=0; until [ -e /sys/class/net/eth0 ]; do n=$((n + 1)); [ $n -lt 300 ] || exit 1; sleep 0.1; done; \
         ip addr add {guest}/24 dev eth0 && ip link set eth0 up"
    ))?;
    Ok(tap)
}

/// A guest sends its disk, which is like that of a [`Network`], to a server of the host in a network that both are in.
pub fn assert_guest_sends_in(vm: &Vm, subnet: Subnet) -> Result {
    let host = subnet.host();
    let server = Server::start(host, receive)?;
    let send = format!("timeout 100 nc {host} {} </dev/vda", server.port());
    vm.guest().check(&send)?;
    assert_received(&server.join()?);
    Ok(())
}

/// The guest fetches what is on its disk from a server of the host.
pub fn assert_guest_fetches_in(vm: &Vm, subnet: Subnet) -> Result {
    let host = subnet.host();
    let server = Server::start(host, |stream| give(stream, Network::AMOUNT))?;
    let fetch = format!(
        "timeout 100 nc {host} {} </dev/null | cmp - /dev/vda",
        server.port()
    );
    vm.guest().check(&fetch)?;
    server.join()
}

/// Waits until the guest of `vm` sees this carrier of its `eth0`.
pub fn await_carrier(vm: &Vm, carrier: u8) -> Result {
    wait_until(&format!("carrier {carrier}"), GUEST_TIMEOUT, || {
        let seen = vm.guest().check("cat /sys/class/net/eth0/carrier");
        seen.is_ok_and(|seen| seen == carrier.to_string())
    })
}

/// Asserts that these bytes are the pattern on the disk of a [`Network`].
pub fn assert_received(received: &[u8]) {
    assert!(
        received == pattern(Network::AMOUNT),
        "{} bytes came, or not the same",
        received.len()
    );
}
