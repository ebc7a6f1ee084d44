//! The server over real sockets, as its clients see it.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::sync::Mutex;
use std::thread::{self, JoinHandle};

use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::message::Request;

mod clients;
mod exchange;
mod limits;
mod stopping;
mod streams;

/// How long a test waits for something that is sure to come.
const PATIENCE: Duration = Duration::from_secs(20);

/// A server on its own thread. Dropping it stops the server.
struct Running {
    directory: TempDir,
    stopper: Stopper,
    thread: Option<JoinHandle<Result<(), ServerError>>>,
}

impl Running {
    fn start(config: ServerConfig, mut handler: impl Handler + Send + 'static) -> Self {
        let directory = TempDir::new().unwrap();
        let mut server = Server::bind(&directory.as_path().join("api.socket"), config).unwrap();
        let stopper = server.stopper();
        let thread = Some(thread::spawn(move || server.run(&mut handler)));
        Self {
            directory,
            stopper,
            thread,
        }
    }

    /// With default limits and the answers of [`echo`].
    fn echo() -> Self {
        Self::start(ServerConfig::default(), echo)
    }

    fn connect(&self) -> Client {
        let stream = UnixStream::connect(self.directory.as_path().join("api.socket")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Client { stream }
    }

    fn join(&mut self) {
        self.thread.take().unwrap().join().unwrap().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stopper.stop();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap().unwrap();
        }
    }
}

struct Client {
    stream: UnixStream,
}

impl Client {
    fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).unwrap();
    }

    /// Reads one answer: head and body, as text.
    fn answer(&mut self) -> String {
        let mut text = String::new();
        while !text.ends_with("\r\n\r\n") {
            text.push(self.byte());
        }
        let length = text
            .lines()
            .find_map(|line| line.strip_prefix("Content-Length: "));
        let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
        self.stream.read_exact(&mut body).unwrap();
        text += str::from_utf8(&body).unwrap();
        text
    }

    fn byte(&mut self) -> char {
        let mut byte = [0];
        self.stream.read_exact(&mut byte).unwrap();
        char::from(byte[0])
    }

    /// Everything up to the end of the stream; fails if the connection is reset.
    fn rest(&mut self) -> String {
        let mut text = String::new();
        self.stream.read_to_string(&mut text).unwrap();
        text
    }
}

/// Answers with method, path and body of the request.
fn echo(request: Request, responder: Responder) {
    let body = String::from_utf8(request.body.unwrap_or_default()).unwrap();
    responder.send(Response::json(format!(
        "{} {} {body}",
        request.method, request.path
    )));
}

/// A handler that puts its work aside, and where the work goes.
fn deferring() -> (impl Handler + Send + 'static, Receiver<(Request, Responder)>) {
    let (sender, receiver) = mpsc::channel();
    let handler = move |request: Request, responder: Responder| sender.send((request, responder)).unwrap();
    (handler, receiver)
}

fn ok(body: &str) -> String {
    format!(
        "HTTP/1.1 200 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Whether `answer` is a fault of `status` that closes the connection and says `words` in valid JSON.
fn is_final_fault(answer: &str, status: u16, words: &str) -> bool {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    head.starts_with(&format!("HTTP/1.1 {status} \r\n"))
        && head.contains("\r\nConnection: close\r\n")
        && body["fault_message"].as_str().unwrap().contains(words)
}
