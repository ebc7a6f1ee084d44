//! A disk whose backend answers anything, and comes and goes, while its driver does anything: nothing panics, and the
//! driver sees the queues that the disk has, whatever the backend says.
#![no_main]

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex, MutexGuard};
use std::thread;

use arbitrary::Arbitrary;
use devices::GuestMemory;
use devices::catalog::{DeviceConfig, Services};
use devices::testing::Ledger;
use libfuzzer_sys::fuzz_target;
use mayfly_fuzz::MEMORY;
use mayfly_fuzz::driver::{Machine, Op};
use serde_json::json;
use vm_memory::{FileOffset, GuestAddress};
use vmm_sys_util::signal::block_signal;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use vmm_sys_util::tempfile::TempFile;

/// Queues of the disk.
const QUEUES: u16 = 2;
/// Where the configuration space has their count, in its upper half.
const NUM_QUEUES: u64 = 32;
const NEED_REPLY: u32 = 8;
const SIGPIPE: i32 = 13;

/// What the backend does when something is asked of it.
#[derive(Arbitrary, Debug)]
enum Answer {
    /// What it should.
    Right,
    /// A number.
    Number(u64),
    /// Some bytes, with so many files beside.
    Body(Vec<u8>, u8),
    /// What is no message, behind which it goes.
    Bytes(Vec<u8>),
    /// Something in the channel for its own requests, and then what it should.
    Channel(Vec<u8>),
    /// What it should, and another number that nobody has asked for.
    More(u64),
}

#[derive(Arbitrary, Debug)]
enum Step {
    Driver(Op),
    /// The user has the configuration space read again.
    Update,
}

/// What the backend does next; when that is all it does what it should.
static ANSWERS: Mutex<VecDeque<Answer>> = Mutex::new(VecDeque::new());

/// The socket of the backend, which serves one connection after the other.
static SOCKET: LazyLock<PathBuf> = LazyLock::new(|| {
    let path = PathBuf::from(format!("/dev/shm/mayfly-fuzz-{}.sock", std::process::id()));
    // One of an earlier process with this id.
    let _ = std::fs::remove_file(&path);
    // A backend that has gone ends no monitor, which counts these signals only.
    block_signal(SIGPIPE).expect("there is such a signal");
    let listener = UnixListener::bind(&path).expect("the path is ours");
    thread::spawn(move || listener.incoming().flatten().for_each(|stream| serve(&stream)));
    path
});

fn answers() -> MutexGuard<'static, VecDeque<Answer>> {
    ANSWERS.lock().expect("nothing panics with the lock")
}

/// Does what is asked, until the other end goes or an answer ends it.
fn serve(mut stream: &UnixStream) {
    let mut channel = None;
    let mut header = [0; 12];
    while let Ok((12, file)) = stream.recv_with_fd(&mut header) {
        let [request, flags, size] = [0, 4, 8].map(|at| {
            let bytes = header[at..at + 4].try_into().expect("4 bytes");
            u32::from_ne_bytes(bytes)
        });
        let mut body = vec![0; size as usize];
        if stream.read_exact(&mut body).is_err() {
            return;
        }
        if request == 21 {
            channel = file;
        }
        let right = right(request, flags, &body);
        let answer = answers().pop_front().unwrap_or(Answer::Right);
        match answer {
            Answer::Right => {}
            Answer::Number(number) => {
                send(stream, request, &number.to_ne_bytes(), 0);
                continue;
            }
            Answer::Body(body, files) => {
                send(stream, request, &body, files % 4);
                continue;
            }
            Answer::Bytes(bytes) => {
                // The other end may have gone already.
                let _ = stream.write_all(&bytes);
                return;
            }
            Answer::Channel(bytes) => {
                if let Some(channel) = &mut channel {
                    let _ = File::write(channel, &bytes);
                }
            }
            Answer::More(number) => send(stream, request, &number.to_ne_bytes(), 0),
        }
        if let Some((body, files)) = right {
            send(stream, request, &body, files);
        }
    }
}

/// What a backend with all that is used of the protocol answers to a request, and how many files it has beside.
fn right(request: u32, flags: u32, body: &[u8]) -> Option<(Vec<u8>, u8)> {
    let number = |number: u64| Some((number.to_ne_bytes().to_vec(), 0));
    match request {
        1 => number(1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 1 << 12 | 1 << 9),
        15 => number(1 << 12 | 1 << 9 | 1 << 5 | 1 << 3 | 1),
        17 => number(QUEUES.into()),
        11 | 24 => Some((body.to_vec(), 0)),
        31 => Some((body.to_vec(), 1)),
        _ if flags & NEED_REPLY != 0 => number(0),
        _ => None,
    }
}

fn send(stream: &UnixStream, request: u32, body: &[u8], files: u8) {
    let header = [request, 5, body.len() as u32].map(u32::to_ne_bytes).concat();
    let fds = vec![stream.as_raw_fd(); files.into()];
    // The other end may have gone already.
    let _ = stream.send_with_fds(&[&header[..], body], &fds);
}

/// Memory of the kind that a backend can have.
fn shared_memory() -> GuestMemory {
    let file = TempFile::new_in("/dev/shm".as_ref())
        .expect("there is room in /dev/shm")
        .into_file();
    file.set_len(MEMORY).expect("there is room in /dev/shm");
    GuestMemory::from_ranges_with_files([(GuestAddress(0), MEMORY as usize, Some(FileOffset::new(file, 0)))])
        .expect("the host has memory left")
}

fuzz_target!(|input: (u64, Vec<Answer>, Vec<Step>)| {
    let (features, todo, steps) = input;
    *answers() = todo.into();
    let config = json!({"drive_id": "disk", "is_root_device": false, "socket": *SOCKET, "queues": QUEUES});
    let config = DeviceConfig::Block(serde_json::from_value(config).expect("the config is valid"));
    let services = Services {
        memory: &Ledger::default(),
        mmds: None,
    };
    let Ok(device) = config.build(&services) else {
        return;
    };
    let mem = shared_memory();
    let mut machine = Machine::new(&mem, device, features);
    for step in steps.iter().take(64) {
        match step {
            Step::Driver(op) => machine.run(op),
            Step::Update => _ = machine.try_update(json!({"drive_id": "disk"})),
        }
        assert_eq!(machine.config(NUM_QUEUES) >> 16, u32::from(QUEUES));
    }
});
