//! How a server ends, and what it leaves behind.

use super::*;

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
