//! A vsock device whose driver does anything, while programs of the host come, talk and go: nothing panics, and no byte
//! reaches a program that the guest has not sent.
#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::LazyLock;

use arbitrary::Arbitrary;
use devices::virtio::vsock::packet::{HEADER_LEN, HOST_CID, Header, Op as Packet};
use devices::virtio::vsock::{Config, RX, TX};
use libfuzzer_sys::fuzz_target;
use mayfly_fuzz::driver::{DATA, HEADERS, Machine, Op, piece};

const CID: u32 = 3;
/// The port of the host where a program listens.
const PORT: u32 = 80;
/// The first port that the device gives to programs which connect.
const FIRST_PORT: u32 = 1 << 30;
/// Programs at a time.
const PROGRAMS: usize = 16;

#[derive(Arbitrary, Debug)]
enum Step {
    Driver(Op),
    /// A packet that is nearly right.
    Send {
        op: u8,
        host: u8,
        guest: u8,
        flags: u8,
        credit: (u32, u32),
        payload: u16,
        /// What the header says less what there is.
        lie: i8,
    },
    /// Room for what comes, in pieces of these offsets and lengths.
    Receive(Vec<(u16, u16)>, bool),
    /// A program connects and says this.
    Connect(Greeting),
    /// A program sends so many bytes, closes a direction, or leaves.
    Write(u8, u16),
    Close(u8, bool),
    Leave(u8),
}

#[derive(Arbitrary, Debug)]
enum Greeting {
    Port(u8),
    Noise(Vec<u8>),
}

/// The folder of the sockets.
static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = std::env::temp_dir().join(format!("mayfly-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("the temporary folder can be written");
    folder
});

static LISTENER: LazyLock<UnixListener> = LazyLock::new(|| {
    let path = FOLDER.join(format!("v_{PORT}"));
    // One of an earlier process with this id.
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(path).expect("the folder is ours");
    listener.set_nonblocking(true).expect("a socket can be non-blocking");
    listener
});

/// The programs of the host, and how much they may receive.
#[derive(Default)]
struct Programs {
    streams: Vec<UnixStream>,
    received: u64,
}

impl Programs {
    fn add(&mut self, stream: UnixStream) {
        stream.set_nonblocking(true).expect("a socket can be non-blocking");
        if self.streams.len() < PROGRAMS {
            self.streams.push(stream);
        }
    }

    fn with(&mut self, index: u8, act: impl FnOnce(&mut UnixStream)) {
        let count = self.streams.len().max(1);
        if let Some(stream) = self.streams.get_mut(usize::from(index) % count) {
            act(stream);
        }
    }

    /// Takes what there is.
    fn read(&mut self) {
        while let Ok((stream, _)) = LISTENER.accept() {
            self.add(stream);
        }
        let mut bytes = [0; 4096];
        for stream in &mut self.streams {
            while let Ok(count) = stream.read(&mut bytes)
                && count > 0
            {
                let greeting = bytes.starts_with(b"OK ");
                self.received += if greeting { 0 } else { count as u64 };
            }
        }
    }
}

fn ports(host: u8, guest: u8) -> (u32, u32) {
    let host = u32::from(host % 8);
    let host = if host < 2 { PORT + host } else { FIRST_PORT + host - 2 };
    (host, u32::from(guest % 4))
}

fn connect(greeting: &Greeting, path: &PathBuf, programs: &mut Programs) {
    let Ok(mut stream) = UnixStream::connect(path) else { return };
    let said = match greeting {
        Greeting::Port(port) => stream.write_all(format!("CONNECT {}\n", port % 4).as_bytes()),
        Greeting::Noise(bytes) => stream.write_all(&bytes[..bytes.len().min(64)]),
    };
    said.expect("a few bytes fit");
    programs.add(stream);
}

fn run(machine: &mut Machine<'_>, step: &Step, programs: &mut Programs, path: &PathBuf) {
    match step {
        Step::Driver(op) => machine.run(op),
        Step::Send {
            op,
            host,
            guest,
            flags,
            credit,
            payload,
            lie,
        } => {
            let (dst_port, src_port) = ports(*host, *guest);
            let is_data = u16::from(*op % 10) == Packet::Data as u16;
            let len = if is_data { u32::from(*payload) } else { 0 };
            let header = Header {
                src_cid: CID.into(),
                dst_cid: HOST_CID,
                src_port,
                dst_port,
                len: len.saturating_add_signed((*lie).into()),
                socket_type: 1,
                op: (*op % 10).into(),
                flags: (*flags).into(),
                buf_alloc: credit.0,
                fwd_cnt: credit.1,
            };
            machine.write(HEADERS, &header.to_bytes());
            let chain = [piece(HEADERS, HEADER_LEN as u32, false), piece(DATA, len, false)];
            machine.offer(TX as u8, &chain, false);
            machine.kick(TX as u8);
        }
        Step::Receive(pieces, indirect) => {
            let data = pieces
                .iter()
                .take(8)
                .map(|&(offset, len)| piece(DATA + u64::from(offset), len.into(), true));
            let chain: Vec<_> = std::iter::once(piece(HEADERS + 64, HEADER_LEN as u32, true))
                .chain(data)
                .collect();
            machine.offer(RX as u8, &chain, *indirect);
            machine.kick(RX as u8);
        }
        Step::Connect(greeting) => connect(greeting, path, programs),
        Step::Write(index, count) => programs.with(*index, |stream| {
            // A full socket takes nothing.
            let _ = stream.write(&vec![1; usize::from(*count)]);
        }),
        Step::Close(index, write) => programs.with(*index, |stream| {
            let way = if *write { Shutdown::Write } else { Shutdown::Read };
            // It may have left by itself.
            let _ = stream.shutdown(way);
        }),
        Step::Leave(index) => {
            let count = programs.streams.len().max(1);
            if usize::from(*index) % count < programs.streams.len() {
                programs.streams.swap_remove(usize::from(*index) % count);
            }
        }
    }
}

fuzz_target!(|input: (u64, Vec<Step>)| {
    let (features, steps) = input;
    LazyLock::force(&LISTENER);
    let path = FOLDER.join("v");
    let config = Config {
        vsock_id: None,
        guest_cid: CID,
        uds_path: path.clone(),
    };
    let device = config.build().expect("the last device has taken its socket along");
    let mem = mayfly_fuzz::memory();
    let mut machine = Machine::new(&mem, Box::new(device), features);
    let mut programs = Programs::default();
    for step in &steps {
        run(&mut machine, step, &mut programs, &path);
        machine.ready();
        programs.read();
    }
    let sent = machine.slot().metrics()["tx_bytes_count"].as_u64();
    assert!(Some(programs.received) <= sent, "bytes that nobody has sent");
});
