//! The guest's side of `make bench`: the first program of a guest that has busybox and the virtio modules. It does what
//! `bench=CASE` on the kernel command line says, prints a line `@bench NAME VALUE` per figure on the console, and reboots.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::Command;
use std::time::{Duration, Instant};

/// The host's end of the tap, and its services there.
const HOST: &str = "172.30.99.1";
const GUEST: &str = "172.30.99.2";
const SINK: u16 = 7001;
const SOURCE: u16 = 7002;
const ECHO: u16 = 7003;

const MIB: usize = 1 << 20;
const SEQUENTIAL_BYTES: usize = 48 * MIB;
const SEQUENTIAL_CHUNK: usize = 256 << 10;
const RANDOM_OPS: u32 = 1500;
const FLUSHES: u32 = 200;
const NET_BYTES: usize = 40 * MIB;
const ROUND_TRIPS: u32 = 800;

fn main() {
    report("init_ms", uptime_ms());
    for (kind, place) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        busybox(&["mount", "-t", kind, kind, place]);
    }
    let command_line = fs::read_to_string("/proc/cmdline").expect("/proc is mounted");
    let case = command_line
        .split_whitespace()
        .find_map(|word| word.strip_prefix("bench="));
    match case {
        Some("memory") => {
            // The host measures the monitor now.
            report("idle", 0.0);
            std::thread::sleep(Duration::from_secs(3));
        }
        Some("block" | "block-async") => block().expect("the disk works"),
        Some("net") => net().expect("the network works"),
        Some("queues") => queues().expect("disk and network work"),
        _ => {}
    }
    report("end_ms", uptime_ms());
    // SAFETY: it takes no pointer and does not return; nothing is mounted that would need a sync.
    unsafe { libc::reboot(libc::RB_AUTOBOOT) };
}

fn report(name: &str, value: f64) {
    println!("@bench {name} {value:.2}");
}

fn uptime_ms() -> f64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes to a timespec that outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    Duration::new(
        now.tv_sec.unsigned_abs(),
        u32::try_from(now.tv_nsec).expect("less than a second"),
    )
    .as_secs_f64()
        * 1e3
}

fn busybox(words: &[&str]) {
    let status = Command::new("/bin/busybox").args(words).status();
    assert!(
        status.is_ok_and(|status| status.success()),
        "busybox {words:?} failed"
    );
}

fn load_modules(names: &[&str]) {
    busybox(&[&["modprobe", "-a", "virtio_pci", "virtio_mmio"], names].concat());
}

/// Reports how long `work` takes: per operation in microseconds, or in all in milliseconds.
fn measure(name: &str, operations: Option<u32>, work: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let started = Instant::now();
    work()?;
    let time = started.elapsed().as_secs_f64();
    report(
        name,
        operations.map_or(time * 1e3, |count| time * 1e6 / f64::from(count)),
    );
    Ok(())
}

/// Reads and writes past the page cache.
fn block() -> io::Result<()> {
    load_modules(&["virtio_blk"]);
    let disk = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open("/dev/vda")?;
    let mut memory = vec![0x6d; SEQUENTIAL_CHUNK + 4096];
    let aligned = memory.as_ptr().align_offset(4096);
    let chunk = &mut memory[aligned..][..SEQUENTIAL_CHUNK];
    measure("seq_read_ms", None, || {
        sequential(|at| disk.read_exact_at(chunk, at))
    })?;
    measure("seq_write_ms", None, || {
        sequential(|at| disk.write_all_at(chunk, at))
    })?;
    let page = &mut chunk[..4096];
    measure("rand_read_us", Some(RANDOM_OPS), || {
        random(|at| disk.read_exact_at(page, at))
    })?;
    measure("rand_write_us", Some(RANDOM_OPS), || {
        random(|at| disk.write_all_at(page, at))
    })?;
    measure("flush_us", Some(FLUSHES), || flushes(&disk, page))
}

fn sequential(mut request: impl FnMut(u64) -> io::Result<()>) -> io::Result<()> {
    (0..SEQUENTIAL_BYTES as u64)
        .step_by(SEQUENTIAL_CHUNK)
        .try_for_each(&mut request)
}

/// Pages of the disk's first part in an order that is the same every time (xorshift).
fn random(mut request: impl FnMut(u64) -> io::Result<()>) -> io::Result<()> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for _ in 0..RANDOM_OPS {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        request(state % (SEQUENTIAL_BYTES as u64 / 4096) * 4096)?;
    }
    Ok(())
}

fn flushes(disk: &File, page: &[u8]) -> io::Result<()> {
    for index in 0..FLUSHES {
        disk.write_all_at(page, u64::from(index) * 4096)?;
        disk.sync_all()?;
    }
    Ok(())
}

fn send(sink: &mut TcpStream, buffer: &[u8], bytes: usize) -> io::Result<()> {
    for _ in 0..bytes / buffer.len() {
        sink.write_all(buffer)?;
    }
    // The host answers when it has everything.
    sink.shutdown(Shutdown::Write)?;
    sink.read_exact(&mut [0])
}

fn receive(source: &mut TcpStream, buffer: &mut [u8], bytes: usize) -> io::Result<()> {
    let mut left = bytes;
    while left > 0 {
        let space = left.min(buffer.len());
        left -= match source.read(&mut buffer[..space])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => count,
        };
    }
    Ok(())
}

fn bring_network_up() {
    load_modules(&["virtio_net"]);
    busybox(&["ifconfig", "lo", "127.0.0.1"]);
    busybox(&["ifconfig", "eth0", GUEST, "netmask", "255.255.255.0", "up"]);
}

/// Sends, receives, and plays ping-pong over TCP.
fn net() -> io::Result<()> {
    bring_network_up();
    let mut buffer = vec![0x6d; 64 << 10];
    let mut sink = connect(SINK)?;
    measure("tx_ms", None, || send(&mut sink, &buffer, NET_BYTES))?;
    let mut source = connect(SOURCE)?;
    measure("rx_ms", None, || receive(&mut source, &mut buffer, NET_BYTES))?;
    let mut echo = connect(ECHO)?;
    echo.set_nodelay(true)?;
    measure("round_trip_us", Some(ROUND_TRIPS), || {
        (0..ROUND_TRIPS).try_for_each(|_| {
            echo.write_all(&[1])?;
            echo.read_exact(&mut [0])
        })
    })
}

/// What both CPUs do at once: read from the disk, send, and receive.
fn queues() -> io::Result<()> {
    load_modules(&["virtio_blk"]);
    bring_network_up();
    measure("both_read_us", Some(2 * RANDOM_OPS), || {
        on_both_cpus(|| {
            let disk = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_DIRECT)
                .open("/dev/vda")?;
            let mut memory = vec![0; 2 * 4096];
            let aligned = memory.as_ptr().align_offset(4096);
            let page = &mut memory[aligned..][..4096];
            random(|at| disk.read_exact_at(page, at))
        })
    })?;
    measure("both_tx_ms", None, || {
        on_both_cpus(|| send(&mut connect(SINK)?, &[0x6d; 64 << 10], NET_BYTES / 2))
    })?;
    measure("both_rx_ms", None, || {
        on_both_cpus(|| receive(&mut connect(SOURCE)?, &mut [0; 64 << 10], NET_BYTES / 2))
    })
}

/// Does the same on two CPUs at once.
fn on_both_cpus(work: impl Fn() -> io::Result<()> + Sync) -> io::Result<()> {
    let pinned = |cpu: usize| {
        // SAFETY: a set of CPUs is plain bits, of which all zero is valid; the kernel reads it during the call.
        let moved = unsafe {
            let mut cpus: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(cpu, &mut cpus);
            libc::sched_setaffinity(0, size_of_val(&cpus), &cpus)
        };
        assert_eq!(moved, 0, "there is no CPU {cpu}");
        work()
    };
    std::thread::scope(|scope| {
        let threads = [0, 1].map(|cpu| scope.spawn(move || pinned(cpu)));
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().expect("the work does not panic"))
    })
}

fn connect(port: u16) -> io::Result<TcpStream> {
    TcpStream::connect((HOST, port))
}
