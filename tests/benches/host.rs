//! The host's side of `make bench`: boots one guest whose init is the bench `guest`, serves as its network peer, and prints
//! a line `NAME VALUE` per figure.
//!
//! usage: host CASE MAYFLY KERNEL INITRD, where CASE is boot, boot-mmio, memory, block, block-async, net or queues. Needs
//! /dev/kvm and, for the last two, root. The clock is the host's; an instruction-counted host makes the figures repeatable.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Instant;

use mayfly_tests::{Failure, Result, Scratch, Tap};
use serde_json::{Value, json};

const HOST: Ipv4Addr = Ipv4Addr::new(172, 30, 99, 1);
const SINK: u16 = 7001;
const SOURCE: u16 = 7002;
const ECHO: u16 = 7003;
const TAP: &str = "mayfly-bench";
const MEMORY_MIB: u64 = 128;
const DISK_BYTES: usize = 64 << 20;

fn main() -> Result {
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with("--"))
        .collect();
    let [case, mayfly, kernel, initrd] = &words[..] else {
        println!("usage: host CASE MAYFLY KERNEL INITRD; `make bench` calls it");
        return Ok(());
    };
    let bench = Bench {
        case,
        mayfly,
        kernel,
        initrd,
    };
    let figures = if case == "queues" {
        compare(bench.measure(1)?, bench.measure(2)?)
    } else {
        bench.measure(1)?
    };
    for (name, value) in figures {
        println!("{name} {value:.2}");
    }
    Ok(())
}

type Figures = Vec<(String, f64)>;

/// What devices do with one queue, with two, and how many times as fast two are.
fn compare(one: Figures, two: Figures) -> Figures {
    let ratio = |((name, one), (_, two)): ((String, f64), (String, f64))| {
        let short = name.rsplit_once('_').map_or("", |(short, _)| short);
        let ratio = (format!("{short}_ratio"), one / two);
        [(format!("{name}_1"), one), (format!("{name}_2"), two), ratio]
    };
    one.into_iter().zip(two).flat_map(ratio).collect()
}

struct Bench<'a> {
    case: &'a str,
    mayfly: &'a str,
    kernel: &'a str,
    initrd: &'a str,
}

impl Bench<'_> {
    /// The figures of a guest, whose devices have so many queues.
    fn measure(&self, queues: u16) -> Result<Figures> {
        let (case, scratch) = (self.case, Scratch::new("bench")?);
        let mut config = self.config();
        // Lives until the monitor has ended.
        let _tap = match case {
            "net" | "queues" => {
                config["network-interfaces"] =
                    json!([{ "iface_id": "eth0", "host_dev_name": TAP, "queues": queues }]);
                let create = if queues > 1 {
                    Tap::create_multi_queue
                } else {
                    Tap::create
                };
                let tap = create(TAP, HOST)?;
                // Whoever listens outlives the tap, and is there for the next guest.
                if queues == 1 {
                    serve_network()?;
                }
                Some(tap)
            }
            _ => None,
        };
        if matches!(case, "block" | "block-async" | "queues") {
            // Written, so that reading it reads pages and not holes.
            let disk = scratch.file("disk", vec![0x5a; DISK_BYTES])?;
            config["drives"] = json!([{
                "drive_id": "disk", "path_on_host": disk, "is_root_device": false, "is_read_only": false,
                "cache_type": "Writeback", "queues": queues,
                "io_engine": if case == "block-async" { "Async" } else { "Sync" },
            }]);
        }
        let file = scratch.file("config.json", config.to_string())?;
        let mut monitor = Command::new(self.mayfly);
        monitor
            .args(["--no-api", "--level", "Error", "--config-file"])
            .arg(&file);
        monitor.args((case == "boot-mmio").then_some("--no-pci"));
        let boot = case.starts_with("boot");
        let of_boot = |name: &str| matches!(name, "init_ms" | "total_ms" | "outside_ms");
        let mut figures = run(monitor)?;
        figures.retain(|(name, _)| of_boot(name) == boot);
        Ok(figures)
    }

    fn config(&self) -> Value {
        let several = if self.case == "queues" { 2 } else { 1 };
        json!({
            "boot-source": {
                "kernel_image_path": self.kernel,
                "initrd_path": self.initrd,
                "boot_args": format!(
                    "console=ttyS0 quiet reboot=k panic=-1 mitigations=off rdinit=/bench bench={}", self.case
                ),
            },
            "machine-config": { "vcpu_count": several, "mem_size_mib": MEMORY_MIB, "io_threads": several },
            "drives": [],
        })
    }
}

/// Runs the monitor; gives the guest's figures, and what the process took beside the guest.
fn run(mut monitor: Command) -> Result<Figures> {
    let started = Instant::now();
    let mut child = monitor.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let figures = watch_console(&mut child);
    let status = child.wait()?;
    let total_ms = started.elapsed().as_secs_f64() * 1e3;
    if !status.success() {
        return Err(Failure::new(format!("the monitor ended with {status}")));
    }
    let (mut figures, end_ms) = figures?;
    figures.extend([
        ("total_ms".into(), total_ms),
        ("outside_ms".into(), total_ms - end_ms),
    ]);
    Ok(figures)
}

/// Collects the guest's figures until its console closes, and its uptime at its end.
fn watch_console(child: &mut Child) -> Result<(Figures, f64)> {
    let console = child.stdout.take().expect("the console is piped");
    let (mut figures, mut end_ms, mut seen) = (Figures::new(), None, Vec::new());
    for line in BufReader::new(console).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).trim().to_owned();
        match line
            .strip_prefix("@bench ")
            .and_then(|figure| figure.split_once(' '))
        {
            Some(("idle", _)) => figures.push(("private_dirty_kb".into(), private_dirty_kb(child.id())?)),
            Some(("end_ms", value)) => end_ms = Some(value.parse()?),
            Some((name, value)) => figures.push((name.into(), value.parse()?)),
            None => seen.push(line),
        }
    }
    let end_ms = end_ms.ok_or_else(|| {
        Failure::new(format!(
            "the guest did not finish; its console:\n{}",
            seen.join("\n")
        ))
    })?;
    Ok((figures, end_ms))
}

/// A part of a process's address space.
struct Mapping {
    start: u64,
    end: u64,
    /// It may be guest RAM: anonymous, or the kernel image that is mapped over RAM.
    maybe_ram: bool,
    private_dirty_kb: f64,
}

/// The monitor's private dirty memory without the guest's RAM, in KiB.
fn private_dirty_kb(pid: u32) -> Result<f64> {
    let mappings = mappings(pid)?;
    let ram = guest_ram(&mappings)
        .ok_or_else(|| Failure::new("the guest's RAM was not found among the monitor's mappings"))?;
    Ok(mappings
        .iter()
        .filter(|m| m.end <= ram.0 || m.start >= ram.1)
        .map(|m| m.private_dirty_kb)
        .sum())
}

fn mappings(pid: u32) -> Result<Vec<Mapping>> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in fs::read_to_string(format!("/proc/{pid}/smaps"))?.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let Some((start, end)) = words.first().and_then(|word| word.split_once('-')) {
            let path = words.get(5).copied().unwrap_or_default();
            mappings.push(Mapping {
                start: u64::from_str_radix(start, 16)?,
                end: u64::from_str_radix(end, 16)?,
                maybe_ram: path.is_empty() || path.ends_with("vmlinux"),
                private_dirty_kb: 0.0,
            });
        } else if let (Some(last), ["Private_Dirty:", kb, _]) = (mappings.last_mut(), &words[..]) {
            last.private_dirty_kb = kb.parse()?;
        }
    }
    Ok(mappings)
}

/// Start and end of the guest's RAM: the largest mapping and what adjoins it, just as long as the guest's RAM is.
fn guest_ram(mappings: &[Mapping]) -> Option<(u64, u64)> {
    let ram = MEMORY_MIB << 20;
    let candidates = || mappings.iter().filter(|m| m.maybe_ram);
    let largest = candidates().max_by_key(|m| m.end - m.start)?;
    let (mut start, mut end) = (largest.start, largest.end);
    for mapping in candidates().rev().filter(|m| m.end <= largest.start) {
        if mapping.end == start && end - mapping.start <= ram {
            start = mapping.start;
        }
    }
    for mapping in candidates().filter(|m| m.start >= largest.end) {
        if mapping.start == end && mapping.end - start <= ram {
            end = mapping.end;
        }
    }
    (end - start == ram).then_some((start, end))
}

/// What is done with a client until it goes away.
type Service = fn(TcpStream) -> std::io::Result<()>;

/// Serves guests on the tap: swallows, sends without end, and echoes.
fn serve_network() -> Result {
    let services: [(u16, Service); 3] = [(SINK, sink), (SOURCE, source), (ECHO, echo)];
    for (port, service) in services {
        let listener = TcpListener::bind((HOST, port))?;
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                // A client that goes away ends its service.
                thread::spawn(move || _ = service(client));
            }
        });
    }
    Ok(())
}

fn sink(mut client: TcpStream) -> std::io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    while client.read(&mut buffer)? > 0 {}
    client.write_all(&[1])
}

fn source(mut client: TcpStream) -> std::io::Result<()> {
    let buffer = vec![0x6d; 64 << 10];
    loop {
        client.write_all(&buffer)?;
    }
}

fn echo(mut client: TcpStream) -> std::io::Result<()> {
    client.set_nodelay(true)?;
    let mut buffer = [0; 64];
    loop {
        match client.read(&mut buffer)? {
            0 => return Ok(()),
            count => client.write_all(&buffer[..count])?,
        }
    }
}
