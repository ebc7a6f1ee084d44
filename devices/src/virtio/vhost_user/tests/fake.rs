//! A backend on a thread of this process: it speaks the protocol and serves nothing by itself.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use vmm_sys_util::tempdir::TempDir;
use vmm_sys_util::tempfile::TempFile;

/// What a fake can do, and what it is told.
#[derive(Default)]
pub(super) struct State {
    pub(super) features: u64,
    pub(super) protocol: u64,
    pub(super) queues: u64,
    pub(super) config: Vec<u8>,
    /// It takes requests and answers none.
    pub(super) silent: bool,
    killed: bool,
    /// It answers with these bytes, whatever it is asked.
    pub(super) garbage: Option<Vec<u8>>,
    /// Where a queue stands when it is stopped.
    pub(super) bases: BTreeMap<u32, u32>,
    pub(super) calls: BTreeMap<u32, File>,
    pub(super) kicks: BTreeMap<u32, File>,
    pub(super) enabled: Vec<u32>,
    pub(super) driver_features: u64,
    pub(super) channel: Option<File>,
    /// The requests so far.
    pub(super) requests: Vec<u32>,
}

/// The connection that is served.
type Current = Arc<Mutex<Option<UnixStream>>>;

/// A backend that can be killed and started again.
pub(super) struct Fake {
    pub(super) state: Arc<Mutex<State>>,
    dir: TempDir,
    running: Option<(JoinHandle<()>, Current)>,
}

impl Fake {
    /// A backend with a disk of eight sectors and one queue, not yet started.
    pub(super) fn new() -> Self {
        let mut config = vec![0; 60];
        config[0] = 8;
        let state = State {
            features: 1 << 30 | 1 << 32 | 1 << 29 | 1 << 28 | 1 << 9 | 1 << 6 | 1 << 11 | 1 << 35,
            protocol: 1 << 9 | 1 << 3 | 1 << 5 | 1 << 0,
            queues: 1,
            config,
            ..State::default()
        };
        Self {
            state: Arc::new(state.into()),
            dir: TempDir::new().unwrap(),
            running: None,
        }
    }

    pub(super) fn path(&self) -> PathBuf {
        self.dir.as_path().join("socket")
    }

    pub(super) fn with<R>(&self, work: impl FnOnce(&mut State) -> R) -> R {
        work(&mut self.state.lock().unwrap())
    }

    /// Listens, and serves one connection after the other.
    pub(super) fn start(&mut self) {
        let listener = UnixListener::bind(self.path()).unwrap();
        let current = Current::default();
        let (state, connected) = (Arc::clone(&self.state), Arc::clone(&current));
        self.with(|state| state.killed = false);
        let thread = thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                *connected.lock().unwrap() = Some(stream.try_clone().unwrap());
                serve(&stream, &state);
                if state.lock().unwrap().killed {
                    return;
                }
            }
        });
        self.running = Some((thread, current));
    }

    /// Dies: its connection and its socket are gone.
    pub(super) fn kill(&mut self) {
        let Some((thread, current)) = self.running.take() else {
            return;
        };
        self.with(|state| {
            state.killed = true;
            (state.calls.clear(), state.kicks.clear(), state.channel.take())
        });
        if let Some(stream) = current.lock().unwrap().take() {
            stream.shutdown(std::net::Shutdown::Both).unwrap();
        }
        // It may be waiting for somebody.
        drop(UnixStream::connect(self.path()));
        std::fs::remove_file(self.path()).unwrap();
        thread.join().unwrap();
    }

    /// Tells the driver that a queue has answers.
    pub(super) fn call(&self, queue: u32) {
        self.with(|state| (&state.calls[&queue]).write_all(&1u64.to_ne_bytes()).unwrap());
    }

    /// Whether a queue was kicked.
    pub(super) fn is_kicked(&self, queue: u32) -> bool {
        self.with(|state| (&state.kicks[&queue]).read(&mut [0; 8]).is_ok())
    }
}

/// Answers until the other end goes.
fn serve(stream: &UnixStream, state: &Mutex<State>) {
    let mut header = [0; 12];
    loop {
        let file = match stream.recv_with_fd(&mut header) {
            Ok((12, file)) => file,
            _ => return,
        };
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let (request, flags, size) = (word(0), word(4), word(8));
        let mut body = vec![0; usize::try_from(size).unwrap()];
        let mut stream = stream;
        if stream.read_exact(&mut body).is_err() {
            return;
        }
        let mut state = state.lock().unwrap();
        state.requests.push(request);
        let answer = state.answer(request, &body, file);
        if let Some(garbage) = &state.garbage {
            // The other end may have gone at the sight of it.
            let _ = stream.write_all(garbage);
            continue;
        }
        if state.silent {
            continue;
        }
        let (answer, file) = match answer {
            None if flags & 8 == 0 => continue,
            None => (0u64.to_ne_bytes().to_vec(), None),
            Some(answer) => answer,
        };
        let mut message = Vec::new();
        for number in [request, 5, u32::try_from(answer.len()).unwrap()] {
            message.extend_from_slice(&number.to_ne_bytes());
        }
        message.extend_from_slice(&answer);
        let fds: Vec<_> = file.iter().map(AsRawFd::as_raw_fd).collect();
        let _ = stream.send_with_fds(&[&message[..]], &fds);
    }
}

type Answer = (Vec<u8>, Option<File>);

impl State {
    fn answer(&mut self, request: u32, body: &[u8], file: Option<File>) -> Option<Answer> {
        let word = |at: usize| u32::from_ne_bytes(body[at..at + 4].try_into().unwrap());
        let number = |value: u64| Some((value.to_ne_bytes().to_vec(), None));
        match request {
            1 => return number(self.features),
            15 => return number(self.protocol),
            17 => return number(self.queues),
            2 => self.driver_features = u64::from_ne_bytes(body.try_into().unwrap()),
            10 => drop(self.bases.insert(word(0), word(4))),
            11 => {
                let queue = word(0);
                self.enabled.retain(|enabled| *enabled != queue);
                let base = [queue, self.bases[&queue]].map(u32::to_ne_bytes).concat();
                return Some((base, None));
            }
            12 => drop(self.kicks.insert(word(0), file.unwrap())),
            13 => drop(self.calls.insert(word(0), file.unwrap())),
            18 => self.enabled.push(word(0)),
            21 => self.channel = file,
            24 => {
                let mut answer = body.to_vec();
                answer[12..].copy_from_slice(&self.config[..body.len() - 12]);
                return Some((answer, None));
            }
            31 => {
                let shared = TempFile::new().unwrap().into_file();
                let mut answer = body.to_vec();
                answer[0] = 64;
                return Some((answer, Some(shared)));
            }
            _ => {}
        }
        None
    }
}
