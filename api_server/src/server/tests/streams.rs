use super::*;
use crate::{STREAM_BACKLOG, Stream, StreamError};

const HEAD: &str =
    "HTTP/1.1 200 \r\nServer: Firecracker API\r\nConnection: close\r\nContent-Type: text/plain\r\n\r\n";

/// A server that makes every request for `/stream` a stream and gives it away; others are echoed.
fn streaming() -> (Running, Receiver<Stream>) {
    let (sender, streams) = mpsc::channel();
    let handler = move |request: Request, responder: Responder| {
        if request.path == "/stream" {
            sender.send(responder.stream("text/plain")).unwrap();
        } else {
            echo(request, responder);
        }
    };
    (Running::start(ServerConfig::default(), handler), streams)
}

/// A client that reads a stream, and its sender.
fn subscribe(server: &Running, streams: &Receiver<Stream>) -> (Client, Stream) {
    let mut client = server.connect();
    client.send("GET /stream HTTP/1.1\r\n\r\n");
    let stream = streams.recv_timeout(PATIENCE).unwrap();
    assert_eq!(client.answer(), HEAD);
    (client, stream)
}

impl Client {
    fn line(&mut self) -> String {
        let mut line = String::new();
        while !line.ends_with('\n') {
            line.push(self.byte());
        }
        line
    }
}

#[test]
fn pieces_arrive_when_they_are_sent_and_the_end_ends_the_connection() {
    let (server, streams) = streaming();
    let (mut client, stream) = subscribe(&server, &streams);
    stream.send(b"one\n").unwrap();
    assert_eq!(client.line(), "one\n");
    stream.send(b"two\n").unwrap();
    stream.send(b"three\n").unwrap();
    drop(stream);
    assert_eq!(client.rest(), "two\nthree\n");
}

#[test]
fn other_clients_are_served_meanwhile() {
    let (server, streams) = streaming();
    let (mut reader, stream) = subscribe(&server, &streams);
    let mut other = server.connect();
    other.send("GET /a HTTP/1.1\r\n\r\n");
    assert_eq!(other.answer(), ok("GET /a "));
    stream.send(b"still there\n").unwrap();
    assert_eq!(reader.line(), "still there\n");
}

#[test]
fn a_client_that_goes_away_closes_its_stream() {
    let (server, streams) = streaming();
    let (client, stream) = subscribe(&server, &streams);
    drop(client);
    wait_until_closed(&stream);
    assert_eq!(stream.send(b"x"), Err(StreamError::Closed));
}

fn wait_until_closed(stream: &Stream) {
    let deadline = Instant::now() + PATIENCE;
    while !stream.is_closed() && Instant::now() < deadline {
        thread::yield_now();
    }
}

#[test]
fn a_client_that_goes_away_before_its_stream_begins_closes_it_too() {
    let (handler, work) = deferring();
    let server = Running::start(ServerConfig::default(), handler);
    let mut client = server.connect();
    client.send("GET /stream HTTP/1.1\r\n\r\n");
    let (_, responder) = work.recv_timeout(PATIENCE).unwrap();
    drop(client);
    // The server has seen that when it hands over this request.
    let mut other = server.connect();
    other.send("GET /a HTTP/1.1\r\n\r\n");
    let (_, _other) = work.recv_timeout(PATIENCE).unwrap();

    let stream = responder.stream("text/plain");

    wait_until_closed(&stream);
    assert_eq!(stream.send(b"x"), Err(StreamError::Closed));
}

#[test]
fn a_client_that_does_not_read_costs_a_bounded_amount_and_may_go_on_later() {
    let (server, streams) = streaming();
    let (mut client, stream) = subscribe(&server, &streams);
    let piece = [b'x'; 1000];
    let mut sent = 0;
    // The socket's buffer and the backlog fill up; how fast is up to the server's thread.
    let deadline = Instant::now() + PATIENCE;
    let mut refused = 0;
    while refused < 1000 && Instant::now() < deadline {
        match stream.send(&piece) {
            Ok(()) => (sent, refused) = (sent + piece.len(), 0),
            Err(error) => {
                assert_eq!(error, StreamError::Full);
                refused += 1;
                thread::yield_now();
            }
        }
    }
    assert!(sent >= STREAM_BACKLOG - piece.len(), "{sent}");
    let mut all = vec![0; sent];
    client.stream.read_exact(&mut all).unwrap();
    assert!(all.iter().all(|byte| *byte == b'x'));
    while stream.send(b"again\n").is_err() {
        thread::yield_now();
    }
    assert_eq!(client.line(), "again\n");
}

#[test]
fn a_stopped_server_writes_what_was_sent_and_does_not_wait_for_slow_readers() {
    let (mut server, streams) = streaming();
    let (mut prompt, stream) = subscribe(&server, &streams);
    let (_slow, blocked) = subscribe(&server, &streams);
    while blocked.send(&[0; 1000]).is_ok() {}
    stream.send(b"the end\n").unwrap();
    let before = Instant::now();
    server.stopper.stop();
    server.join();
    assert!(before.elapsed() < ServerConfig::default().stop_timeout);
    assert_eq!(prompt.rest(), "the end\n");
    assert_eq!(stream.send(b"x"), Err(StreamError::Closed));
}

#[test]
fn a_request_behind_a_stream_is_not_served() {
    let (server, streams) = streaming();
    let mut client = server.connect();
    client.send("GET /stream HTTP/1.1\r\n\r\nGET /a HTTP/1.1\r\n\r\n");
    let stream = streams.recv_timeout(PATIENCE).unwrap();
    stream.send(b"one\n").unwrap();
    drop(stream);
    assert_eq!(client.rest(), format!("{HEAD}one\n"));
}
