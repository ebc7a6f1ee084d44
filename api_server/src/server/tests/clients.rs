//! Clients that leave early, stall or come in numbers.

use super::*;

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
    let server = Running::start(ServerConfig::default(), handler);
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
