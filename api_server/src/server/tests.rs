//! The server over real sockets, as its clients see it.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::sync::Mutex;
use std::thread::{self, JoinHandle};

use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::message::Request;

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

#[test]
fn answers_on_a_kept_connection() {
    let server = Running::echo();
    let mut client = server.connect();

    client.send("GET /a HTTP/1.1\r\n\r\n");
    assert_eq!(client.answer(), ok("GET /a "));
    client.send("PUT /b HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}");
    assert_eq!(client.answer(), ok("PUT /b {}"));
}

#[test]
fn takes_a_request_byte_by_byte() {
    let server = Running::echo();
    let mut client = server.connect();

    for byte in "PUT /slow HTTP/1.1\r\nContent-Length: 4\r\n\r\nbody".chars() {
        client.send(&byte.to_string());
        thread::yield_now();
    }

    assert_eq!(client.answer(), ok("PUT /slow body"));
}

#[test]
fn answers_pipelined_requests_in_order() {
    let server = Running::echo();
    let mut client = server.connect();
    let count = 1000;

    let mut sender = client.stream.try_clone().unwrap();
    let requests: String = (0..count)
        .map(|number| format!("GET /{number} HTTP/1.1\r\n\r\n"))
        .collect();
    let sending = thread::spawn(move || sender.write_all(requests.as_bytes()).unwrap());

    let answers: Vec<String> = (0..count).map(|_| client.answer()).collect();
    let expected: Vec<String> = (0..count).map(|number| ok(&format!("GET /{number} "))).collect();
    assert_eq!(answers, expected);
    sending.join().unwrap();
}

#[test]
fn answers_before_a_parse_error_are_given_before_it() {
    let server = Running::echo();
    let mut client = server.connect();

    client.send(
        "GET /a HTTP/1.1\r\n\r\nGET /b HTTP/1.1\r\n\r\nBREW /c HTTP/1.1\r\n\r\nGET /d HTTP/1.1\r\n\r\n",
    );

    assert_eq!(client.answer(), ok("GET /a "));
    assert_eq!(client.answer(), ok("GET /b "));
    assert!(is_final_fault(
        &client.answer(),
        400,
        "Unsupported HTTP method `BREW`"
    ));
    assert_eq!(client.rest(), "");
}

#[test]
fn body_over_the_limit_is_refused_and_the_answer_survives_the_sending() {
    let server = Running::echo();
    let mut client = server.connect();

    client.send("PUT /a HTTP/1.1\r\nContent-Length: 4000000\r\n\r\n");
    client.send(&"x".repeat(4_000_000));

    assert!(is_final_fault(
        &client.rest(),
        400,
        "4000000 bytes exceeds the limit of 51200 bytes"
    ));
}

#[test]
fn body_may_be_as_large_as_the_limit() {
    let server = Running::echo();
    let mut client = server.connect();
    let body = "x".repeat(51_200);

    client.send(&format!("PUT /a HTTP/1.1\r\nContent-Length: 51200\r\n\r\n{body}"));

    assert_eq!(client.answer(), ok(&format!("PUT /a {body}")));
}

#[test]
fn honours_connection_close() {
    let server = Running::echo();
    let mut client = server.connect();

    client.send("GET /a HTTP/1.1\r\nConnection: close\r\n\r\nGET /b HTTP/1.1\r\n\r\n");

    assert_eq!(client.rest(), ok("GET /a ").replace("keep-alive", "close"));
}

#[test]
fn asks_for_an_expected_body() {
    let server = Running::echo();
    let mut client = server.connect();

    client.send("PUT /a HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n");
    assert_eq!(
        client.answer(),
        "HTTP/1.1 100 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"
    );
    client.send("{}");
    assert_eq!(client.answer(), ok("PUT /a {}"));
}

#[test]
fn refuses_an_expected_body_over_the_limit() {
    let server = Running::echo();
    let mut client = server.connect();

    client.send("PUT /a HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 51201\r\n\r\n");

    assert!(is_final_fault(&client.rest(), 400, "51201"));
}

#[test]
fn half_closed_client_still_gets_its_answers() {
    let server = Running::echo();
    let mut client = server.connect();

    client.send("GET /a HTTP/1.1\r\n\r\nGET /b HTTP/1.1\r\n\r\n");
    client.stream.shutdown(Shutdown::Write).unwrap();

    assert_eq!(client.rest(), ok("GET /a ") + &ok("GET /b "));
}

#[test]
fn client_that_ends_within_a_request_is_told_so() {
    let server = Running::echo();
    let mut client = server.connect();

    client.send("PUT /a HTTP/1.1\r\nContent-Length: 2\r\n\r\n{");
    client.stream.shutdown(Shutdown::Write).unwrap();

    assert!(is_final_fault(&client.rest(), 400, "in the middle of a request"));
}

#[test]
fn eleventh_connection_is_refused_until_one_is_closed() {
    let server = Running::echo();
    let mut clients: Vec<Client> = (0..10).map(|_| server.connect()).collect();
    for client in &mut clients {
        client.send("GET /a HTTP/1.1\r\n\r\n");
        client.answer();
    }

    let mut refused = server.connect();
    assert!(is_final_fault(&refused.rest(), 503, "Too many open connections"));
    drop(refused);

    clients[0].send("GET /b HTTP/1.1\r\nConnection: close\r\n\r\n");
    clients[0].rest();
    let mut next = server.connect();
    next.send("GET /c HTTP/1.1\r\n\r\n");
    assert_eq!(next.answer(), ok("GET /c "));
    clients[9].send("GET /d HTTP/1.1\r\n\r\n");
    assert_eq!(clients[9].answer(), ok("GET /d "));
}

#[test]
fn refused_connections_that_stay_are_bounded_too() {
    let server = Running::start(
        ServerConfig {
            max_connections: 1,
            ..ServerConfig::default()
        },
        echo,
    );
    let mut first = server.connect();
    first.send("GET /a HTTP/1.1\r\n\r\n");
    first.answer();

    let mut refused: Vec<Client> = (0..5).map(|_| server.connect()).collect();

    assert!(
        refused
            .iter_mut()
            .all(|client| is_final_fault(&client.rest(), 503, "Too many"))
    );
    first.send("GET /b HTTP/1.1\r\n\r\n");
    assert_eq!(first.answer(), ok("GET /b "));
}

#[test]
fn answer_may_come_later_from_another_thread() {
    let (handler, work) = deferring();
    let server = Running::start(ServerConfig::default(), handler);
    let mut slow = server.connect();
    let mut quick = server.connect();
    slow.send("PUT /slow HTTP/1.1\r\nContent-Length: 1\r\n\r\n1");
    let (slow_request, slow_responder) = work.recv_timeout(PATIENCE).unwrap();

    quick.send("GET /quick HTTP/1.1\r\n\r\n");
    let (_, quick_responder) = work.recv_timeout(PATIENCE).unwrap();
    quick_responder.send(Response::json("quick"));
    assert_eq!(quick.answer(), ok("quick"));

    assert_eq!(slow_request.path, "/slow");
    slow_responder.send(Response::json("slow"));
    assert_eq!(slow.answer(), ok("slow"));
}

#[test]
fn next_request_waits_for_the_answer_before_it() {
    let (handler, work) = deferring();
    let server = Running::start(ServerConfig::default(), handler);
    let mut client = server.connect();
    let mut other = server.connect();
    client.send("GET /1 HTTP/1.1\r\n\r\nGET /2 HTTP/1.1\r\n\r\n");
    let (_, first) = work.recv_timeout(PATIENCE).unwrap();

    other.send("GET /other HTTP/1.1\r\n\r\n");
    let (request, responder) = work.recv_timeout(PATIENCE).unwrap();
    assert_eq!(request.path, "/other");
    responder.send(Response::no_content());

    first.send(Response::json("1"));
    let (request, responder) = work.recv_timeout(PATIENCE).unwrap();
    assert_eq!(request.path, "/2");
    responder.send(Response::json("2"));
    assert_eq!(client.answer() + &client.answer(), ok("1") + &ok("2"));
}

#[test]
fn dropped_responder_answers_a_fault() {
    let server = Running::start(ServerConfig::default(), |_: Request, responder: Responder| {
        drop(responder)
    });
    let mut client = server.connect();

    client.send("GET /a HTTP/1.1\r\n\r\n");

    let answer = client.answer();
    assert!(answer.starts_with("HTTP/1.1 400 \r\n"), "{answer}");
    assert!(
        answer.contains("{\"fault_message\":\"The request was abandoned"),
        "{answer}"
    );
}

#[test]
fn client_that_vanishes_within_a_request_harms_nobody() {
    let server = Running::echo();
    let mut vanishing = server.connect();
    vanishing.send("PUT /a HTTP/1.1\r\nContent-Length: 100\r\n\r\nhalf");
    drop(vanishing);

    let mut client = server.connect();
    client.send("GET /b HTTP/1.1\r\n\r\n");
    assert_eq!(client.answer(), ok("GET /b "));
}

#[test]
fn client_that_vanishes_before_its_answer_harms_nobody() {
    let (handler, work) = deferring();
    let server = Running::start(
        ServerConfig {
            max_connections: 1,
            ..ServerConfig::default()
        },
        handler,
    );
    let mut vanishing = server.connect();
    vanishing.send("GET /a HTTP/1.1\r\n\r\n");
    let (_, late) = work.recv_timeout(PATIENCE).unwrap();
    drop(vanishing);

    let mut client = server.connect();
    client.send("GET /b HTTP/1.1\r\n\r\n");
    let (request, responder) = work.recv_timeout(PATIENCE).unwrap();
    late.send(Response::json("late"));
    responder.send(Response::json("in time"));

    assert_eq!(request.path, "/b");
    assert_eq!(client.answer(), ok("in time"));
}

#[test]
fn client_that_vanishes_within_its_answer_harms_nobody() {
    let answer = "x".repeat(4_000_000);
    let server = Running::start(
        ServerConfig::default(),
        move |_: Request, responder: Responder| {
            responder.send(Response::json(answer.as_str()));
        },
    );
    let mut vanishing = server.connect();
    vanishing.send("GET /a HTTP/1.1\r\n\r\n");
    vanishing.byte();
    drop(vanishing);

    let mut client = server.connect();
    client.send("GET /b HTTP/1.1\r\n\r\n");
    assert_eq!(client.answer().len(), ok(&"x".repeat(4_000_000)).len());
}

#[test]
fn request_of_a_client_that_does_not_wait_is_still_handled() {
    let (handler, work) = deferring();
    let server = Running::start(ServerConfig::default(), handler);
    let mut client = server.connect();
    client.send("PUT /a HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}");
    drop(client);

    let (request, _) = work.recv_timeout(PATIENCE).unwrap();

    assert_eq!(request.path, "/a");
}

#[test]
fn client_that_stalls_within_a_request_is_closed() {
    let config = ServerConfig {
        timeout: Duration::from_millis(50),
        ..ServerConfig::default()
    };
    let server = Running::start(config, echo);
    let mut idle = server.connect();
    let mut stalling = server.connect();

    stalling.send("GET /a HTTP/1.1\r\n");
    assert!(is_final_fault(&stalling.rest(), 400, "incomplete"));

    idle.send("GET /b HTTP/1.1\r\n\r\n");
    assert_eq!(idle.answer(), ok("GET /b "));
}

#[test]
fn client_that_does_not_read_its_answer_is_closed() {
    let config = ServerConfig {
        timeout: Duration::from_millis(50),
        ..ServerConfig::default()
    };
    let answer = "x".repeat(4_000_000);
    let server = Running::start(config, move |_: Request, responder: Responder| {
        responder.send(Response::json(answer.as_str()));
    });
    let mut client = server.connect();
    let hang_up = Poller::new().unwrap();
    hang_up.add(&client.stream, 0, EventSet::empty()).unwrap();

    client.send("GET /a HTTP/1.1\r\n\r\n");

    assert_eq!(hang_up.wait(Some(Instant::now() + PATIENCE)).unwrap().len(), 1);
    assert!(client.rest().len() < 4_000_000);
}

#[test]
fn stop_closes_idle_connections_and_removes_the_socket() {
    let mut server = Running::echo();
    let mut client = server.connect();
    client.send("GET /a HTTP/1.1\r\n\r\n");
    client.answer();

    server.stopper.stop();
    server.join();

    assert_eq!(client.rest(), "");
    assert!(!server.directory.as_path().join("api.socket").exists());
}

#[test]
fn stop_waits_for_the_answer_that_is_due() {
    let (handler, work) = deferring();
    let mut server = Running::start(ServerConfig::default(), handler);
    let mut idle = server.connect();
    let mut client = server.connect();
    client.send("GET /a HTTP/1.1\r\n\r\n");
    let (_, responder) = work.recv_timeout(PATIENCE).unwrap();

    server.stopper.stop();
    assert_eq!(idle.rest(), "");
    responder.send(Response::json("a"));

    assert_eq!(client.rest(), ok("a").replace("keep-alive", "close"));
    server.join();
}

#[test]
fn stop_does_not_wait_for_ever() {
    let config = ServerConfig {
        stop_timeout: Duration::from_millis(50),
        ..ServerConfig::default()
    };
    let (handler, work) = deferring();
    let mut server = Running::start(config, handler);
    let mut client = server.connect();
    client.send("GET /a HTTP/1.1\r\n\r\n");
    let (_, responder) = work.recv_timeout(PATIENCE).unwrap();

    server.stopper.stop();
    server.join();

    responder.send(Response::no_content());
    assert_eq!(client.rest(), "");
}

#[test]
fn server_stopped_before_it_runs_returns_at_once() {
    let directory = TempDir::new().unwrap();
    let mut server = Server::bind(&directory.as_path().join("api.socket"), ServerConfig::default()).unwrap();

    server.stopper().stop();

    server.run(&mut echo).unwrap();
}

#[test]
fn listener_of_the_caller_is_served_and_its_file_left() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("own.socket");
    let (listener, file) = SocketFile::bind(&path).unwrap();
    let mut server = Server::from_listener(listener, ServerConfig::default()).unwrap();
    let stopper = server.stopper();
    let thread = thread::spawn(move || server.run(&mut echo));
    let mut client = Client {
        stream: UnixStream::connect(&path).unwrap(),
    };

    client.send("GET /a HTTP/1.1\r\n\r\n");
    assert_eq!(client.answer(), ok("GET /a "));
    stopper.stop();
    thread.join().unwrap().unwrap();

    assert!(path.exists());
    drop(file);
    assert!(!path.exists());
}

#[test]
fn many_clients_at_once_get_their_own_answers() {
    let server = Arc::new(Running::echo());
    let failures = Arc::new(Mutex::new(Vec::new()));

    let threads: Vec<JoinHandle<()>> = (0..10)
        .map(|number| {
            let (server, failures) = (Arc::clone(&server), Arc::clone(&failures));
            thread::spawn(move || {
                let mut client = server.connect();
                for turn in 0..100 {
                    client.send(&format!(
                        "PUT /{number} HTTP/1.1\r\nContent-Length: 3\r\n\r\n{turn:03}"
                    ));
                    let answer = client.answer();
                    if answer != ok(&format!("PUT /{number} {turn:03}")) {
                        failures.lock().unwrap().push(answer);
                    }
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());

    assert_eq!(*failures.lock().unwrap(), Vec::<String>::new());
}
