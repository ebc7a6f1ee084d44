//! Vsock: real programs of a real guest talk to this process, through the sockets of the monitor.
//!
//! `MAYFLY_VSOCK_MIB=1024 tests/run-tests.sh --guest vsock` moves more data than usual: 1 GiB each way.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mayfly_tests::{
    Drive, Failure, GUEST_TIMEOUT, Guest, HOST_TIMEOUT, Result, Scratch, TestVm, Vm, stream, wait_until,
};
use serde_json::json;

/// Bytes that bulk transfers move each way; more when MAYFLY_VSOCK_MIB says so.
const BULK_MIB: u64 = 64;
/// Connections at once.
const MANY: u64 = 200;
const MIB: u64 = 1 << 20;
/// The guest's end of all connections.
const PEER: &str = "/run/vsock_peer";

/// A machine with the socket `v` in the folder, and [`PEER`] in its guest.
struct Machine {
    vm: Vm,
    scratch: Scratch,
}

fn boot(name: &str, customize: impl FnOnce(TestVm) -> TestVm) -> Result<Machine> {
    let scratch = Scratch::new("vsock")?;
    let mut program = std::fs::read(env!("CARGO_BIN_EXE_vsock_peer"))?;
    // Disks have whole sectors.
    program.resize(program.len().next_multiple_of(512), 0);
    let disk = scratch.file("peer", program)?;
    let vm = TestVm::new(name)
        // Linux 6.1 needs 64 KiB in one piece for each large packet, which small guests may not find.
        .mem_mib(256)
        .drive(Drive::new("peer", disk).read_only())
        .section("vsock", json!({"guest_cid": 42, "uds_path": scratch.join("v")}));
    let vm = customize(vm).boot()?;
    vm.guest()
        .check(&format!("cat /dev/vda >{PEER} && chmod +x {PEER}"))?;
    Ok(Machine { vm, scratch })
}

fn deadline() -> Instant {
    Instant::now() + GUEST_TIMEOUT
}

fn with_timeouts(stream: UnixStream) -> Result<UnixStream> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(GUEST_TIMEOUT))?;
    stream.set_write_timeout(Some(GUEST_TIMEOUT))?;
    Ok(stream)
}

impl Machine {
    fn guest(&self) -> Guest<'_> {
        self.vm.guest()
    }

    /// Lets the guest's program run in the background; [`Machine::finished`] waits for it.
    fn spawn(&self, args: &str) -> Result {
        self.guest().check(&format!(
            "({PEER} {args} >/run/peer.out 2>&1; echo $? >/run/peer.code) >/dev/null 2>&1 &"
        ))?;
        Ok(())
    }

    /// Waits for the end of the guest's program, which must have gone well.
    fn finished(&self) -> Result {
        let wait = "while [ ! -e /run/peer.code ]; do sleep 0.1; done; cat /run/peer.out /run/peer.code; rm /run/peer.code";
        assert_eq!(self.guest().check(wait)?, "0");
        Ok(())
    }

    /// One attempt to reach a port of the guest; none when nobody listens.
    fn try_connect(&self, port: u32) -> Result<Option<UnixStream>> {
        let mut stream = with_timeouts(UnixStream::connect(self.scratch.join("v"))?)?;
        writeln!(stream, "CONNECT {port}")?;
        let mut line = Vec::new();
        let mut byte = [0];
        while stream.read(&mut byte)? == 1 {
            line.push(byte[0]);
            if byte == *b"\n" {
                let line = String::from_utf8(line)?;
                let host = line
                    .strip_prefix("OK ")
                    .and_then(|rest| rest.trim_end().parse::<u32>().ok());
                assert!(host.is_some(), "{line:?}");
                return Ok(Some(stream));
            }
        }
        assert!(line.is_empty(), "{line:?}");
        Ok(None)
    }

    /// Connects to a port of the guest, where the program may still be starting.
    fn connect(&self, port: u32) -> Result<UnixStream> {
        let deadline = deadline();
        loop {
            if let Some(stream) = self.try_connect(port)? {
                return Ok(stream);
            }
            if Instant::now() > deadline {
                return Err(self
                    .vm
                    .failure(&format!("nobody listens to port {port} of the guest")));
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn path_of(&self, port: u32) -> PathBuf {
        self.scratch.join(format!("v_{port}"))
    }

    /// Takes `count` connections of the guest to `port`.
    fn accept(
        &self,
        port: u32,
        count: u64,
    ) -> Result<JoinHandle<std::result::Result<Vec<UnixStream>, String>>> {
        let path = self.path_of(port);
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        Ok(thread::spawn(move || {
            let streams = (0..count).map(|_| accept_one(&listener)).collect::<Result<_>>();
            std::fs::remove_file(path).map_err(|e| e.to_string())?;
            streams.map_err(|failure| failure.to_string())
        }))
    }

    fn accept_one(&self, port: u32, args: &str) -> Result<UnixStream> {
        let accepting = self.accept(port, 1)?;
        self.spawn(&format!("connect {port} 1 {args}"))?;
        joined(accepting)?
            .pop()
            .ok_or_else(|| Failure::new("no connection"))
    }

    /// Adds to a failure what the guest's program and the monitor have said.
    fn explained(&self, result: Result) -> Result {
        result.map_err(|failure| {
            let said = self.guest().run("cat /run/peer.out; dmesg | tail -n 20");
            let said = said.map_or_else(|failure| failure.to_string(), |output| output.stdout);
            self.vm.failure(&format!("{failure}; the guest says: {said}"))
        })
    }

    fn counter(&self, name: &str) -> Result<u64> {
        self.vm.counted("vsock", name)
    }
}

fn accept_one(listener: &UnixListener) -> Result<UnixStream> {
    let deadline = deadline();
    loop {
        match listener.accept() {
            Ok((stream, _)) => return with_timeouts(stream),
            Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(5)),
            Err(error) => return Err(Failure::new(format!("the guest did not connect: {error}"))),
        }
    }
}

fn joined<T>(thread: JoinHandle<std::result::Result<T, String>>) -> Result<T> {
    let result = thread.join().unwrap_or_else(|_| Err("a thread panicked".into()));
    result.map_err(Failure::new)
}

/// Both directions at once, each closed by itself.
fn assert_echo(machine: &Machine) -> Result {
    machine.spawn("listen 5000 1 echo")?;
    let mut near = machine.connect(5000)?;
    let mut writer = near.try_clone()?;
    let sending = thread::spawn(move || stream::send(&mut writer, 3 * MIB + 1).map_err(|f| f.to_string()));
    stream::take(&mut near, 3 * MIB + 1)?;
    joined(sending)?;
    machine.finished()
}

/// The host sends and closes its direction, and waits for the guest to close the other one, and the other way round.
fn assert_bulk(machine: &Machine, bytes: u64) -> Result {
    machine.spawn(&format!("listen 5001 1 take {bytes}"))?;
    let mut near = machine.connect(5001)?;
    let started = Instant::now();
    stream::send(&mut near, bytes)?;
    stream::take(&mut near, 0)?;
    let to_guest = started.elapsed();
    machine.finished()?;

    let mut near = machine.accept_one(5002, &format!("send {bytes}"))?;
    let started = Instant::now();
    machine.explained(stream::take(&mut near, bytes))?;
    let to_host = started.elapsed();
    stream::send(&mut near, 0)?;
    machine.finished()?;
    let mib = bytes / MIB;
    println!("vsock: {mib} MiB to the guest in {to_guest:?}, to the host in {to_host:?}");
    Ok(())
}

/// All connections are there before the first is used.
fn assert_many(machine: &Machine) -> Result {
    machine.spawn(&format!("listen 5003 {MANY} echo"))?;
    let mut streams = vec![machine.connect(5003)?];
    for _ in 1..MANY {
        streams.push(machine.connect(5003)?);
    }
    for (number, near) in (0..).zip(&mut streams) {
        stream::ping(near, number)?;
    }
    drop(streams);
    machine.finished()?;

    let accepting = machine.accept(5004, MANY)?;
    machine.spawn(&format!("connect 5004 {MANY} ping"))?;
    let echoes = joined(accepting)?.into_iter().map(|mut near| {
        thread::spawn(move || {
            let mut number = [0; 8];
            let echoed = near
                .read_exact(&mut number)
                .and_then(|()| near.write_all(&number));
            stream::hold(&mut near);
            echoed.map_err(|error| error.to_string())
        })
    });
    for echo in echoes.collect::<Vec<_>>() {
        joined(echo)?;
    }
    machine.finished()
}

/// Ports where nobody listens.
fn assert_refusals(machine: &Machine) -> Result {
    assert!(machine.try_connect(4999)?.is_none());
    let refused = machine.guest().run(&format!("{PEER} connect 4999 1 hold"))?;
    assert_eq!(refused.code, 1);
    assert!(refused.stdout.contains("Connection reset by peer"), "{refused:?}");
    let elsewhere = UnixListener::bind(machine.path_of(4998))?;
    drop(elsewhere);
    assert_eq!(
        machine.guest().run(&format!("{PEER} connect 4998 1 hold"))?.code,
        1
    );
    Ok(())
}

/// Either end dies while data is on its way, in either direction.
fn assert_deaths(machine: &Machine) -> Result {
    let endless = u64::MAX;
    let kill = "killall -9 vsock_peer";
    machine.spawn("listen 5005 1 hold")?;
    let mut near = machine.connect(5005)?;
    let sending = thread::spawn(move || stream::send(&mut near, endless).map_err(|f| f.to_string()));
    machine.guest().check(kill)?;
    assert!(joined(sending).is_err());
    machine
        .guest()
        .check("while [ ! -e /run/peer.code ]; do sleep 0.1; done; rm /run/peer.code")?;

    let mut near = machine.accept_one(5006, &format!("send {endless}"))?;
    near.read_exact(&mut vec![0; 100_000])?;
    machine.guest().check(kill)?;
    stream::hold(&mut near);
    machine
        .guest()
        .check("while [ ! -e /run/peer.code ]; do sleep 0.1; done; rm /run/peer.code")?;

    machine.spawn("listen 5007 1 hold")?;
    let mut near = machine.connect(5007)?;
    near.write_all(&[1; 100_000])?;
    drop(near);
    machine.finished()?;

    let mut near = machine.accept_one(5008, &format!("send {endless}"))?;
    near.read_exact(&mut vec![0; 100_000])?;
    drop(near);
    let end = "while [ ! -e /run/peer.code ]; do sleep 0.1; done; cat /run/peer.out; rm /run/peer.code";
    let complaint = machine.guest().check(end)?;
    assert!(
        complaint.contains("Broken pipe") || complaint.contains("reset"),
        "{complaint}"
    );
    Ok(())
}

/// What comes while the machine is paused is served when it goes on.
fn assert_pause(machine: &Machine) -> Result {
    machine.spawn("listen 5010 2 echo")?;
    let mut first = machine.connect(5010)?;
    machine.vm.pause()?;
    let mut second = UnixStream::connect(machine.scratch.join("v"))?;
    second.write_all(b"CONNECT 5010\n")?;
    second.set_nonblocking(true)?;
    assert!(
        second
            .read(&mut [0])
            .is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    );
    first.write_all(&7u64.to_le_bytes())?;
    machine.vm.resume()?;
    let mut second = with_timeouts(second)?;
    second.read_exact(&mut [0; "OK 1073741824\n".len()])?;
    stream::ping(&mut second, 8)?;
    let mut answer = [0; 8];
    first.read_exact(&mut answer)?;
    assert_eq!(answer, 7u64.to_le_bytes());
    drop((first, second));
    machine.finished()
}

/// A driver that lets go of the device resets it: what is open ends, and the device can be used again.
fn assert_the_driver_comes_and_goes(machine: &Machine) -> Result {
    machine.spawn("listen 5011 1 hold")?;
    let mut near = machine.connect(5011)?;
    machine.guest().check(
        "cd /sys/bus/virtio/drivers/vmw_vsock_virtio_transport; device=$(ls -d virtio*)
         echo $device >unbind; [ ! -e $device ]; echo $device >bind; [ -e $device ]",
    )?;
    stream::hold(&mut near);
    machine.finished()?;
    assert_echo(machine)
}

/// Open connections cost nothing while nothing is sent.
fn assert_idle(machine: &Machine) -> Result {
    machine.spawn("listen 5009 20 hold")?;
    let streams = (0..20)
        .map(|_| machine.connect(5009))
        .collect::<Result<Vec<_>>>()?;
    let before = machine.vm.io_ticks()?;
    thread::sleep(Duration::from_secs(3));
    assert_eq!(machine.vm.io_ticks()?, before);
    drop(streams);
    machine.finished()
}

fn assert_counters(machine: &Machine, bulk: u64) -> Result {
    let added = machine.counter("conns_added")?;
    assert!(added >= 2 * MANY, "{added}");
    // The guest's last packets may still be on their way.
    wait_until("the end of all connections", HOST_TIMEOUT, || {
        machine
            .counter("conns_removed")
            .is_ok_and(|removed| removed == added)
    })?;
    let bytes = ["rx_bytes_count", "tx_bytes_count"].map(|name| machine.counter(name));
    assert!(
        bytes
            .iter()
            .all(|count| matches!(count, Ok(count) if *count > bulk)),
        "{bytes:?}"
    );
    for fails in [
        "tx_queue_event_fails",
        "rx_queue_event_fails",
        "ev_queue_event_fails",
        "activate_fails",
    ] {
        assert_eq!(machine.counter(fails)?, 0, "{fails}");
    }
    Ok(())
}

fn bulk_bytes() -> Result<u64> {
    Ok(match std::env::var("MAYFLY_VSOCK_MIB") {
        Ok(mib) => mib.parse::<u64>()? * MIB,
        Err(_) => BULK_MIB * MIB,
    })
}

#[test]
fn streams_work_both_ways_on_pci() -> Result {
    let bulk = bulk_bytes()?;
    let machine = boot("vsock-pci", |vm| vm.vcpus(2))?;
    assert_echo(&machine)?;
    assert_refusals(&machine)?;
    assert_bulk(&machine, bulk)?;
    assert_many(&machine)?;
    assert_idle(&machine)?;
    assert_deaths(&machine)?;
    assert_echo(&machine)?;
    assert_counters(&machine, bulk)
}

#[test]
fn streams_work_both_ways_on_mmio() -> Result {
    let machine = boot("vsock-mmio", TestVm::mmio)?;
    assert_echo(&machine)?;
    assert_bulk(&machine, 4 * MIB)?;
    assert_pause(&machine)?;
    assert_the_driver_comes_and_goes(&machine)?;
    machine.guest().run_last("poweroff")?;
    assert_eq!(machine.vm.wait_exit()?, 0);
    assert!(!machine.scratch.join("v").exists());
    Ok(())
}
