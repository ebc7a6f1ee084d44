//! The limits, and that refused clients can read why.

use super::*;

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
fn refuses_an_expected_body_over_the_limit() {
    let server = Running::echo();
    let mut client = server.connect();

    client.send("PUT /a HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 51201\r\n\r\n");

    assert!(is_final_fault(&client.rest(), 400, "51201"));
}

#[test]
fn eleventh_connection_is_refused_while_none_is_idle() {
    let server = Running::echo();
    let mut clients: Vec<Client> = (0..10).map(|_| server.connect()).collect();
    for client in &mut clients {
        client.send("GET /a HTTP/1.1\r\n");
    }

    let mut refused = server.connect();
    assert!(is_final_fault(&refused.rest(), 503, "Too many open connections"));
    drop(refused);

    clients[0].send("Connection: close\r\n\r\n");
    clients[0].rest();
    let mut next = server.connect();
    next.send("GET /c HTTP/1.1\r\n\r\n");
    assert_eq!(next.answer(), ok("GET /c "));
    clients[9].send("\r\n");
    assert_eq!(clients[9].answer(), ok("GET /a "));
}

#[test]
fn silent_clients_do_not_keep_others_out() {
    let server = Running::echo();
    let mut silent: Vec<Client> = (0..10).map(|_| server.connect()).collect();

    let mut client = server.connect();
    client.send("GET /a HTTP/1.1\r\n\r\n");

    assert_eq!(client.answer(), ok("GET /a "));
    assert_eq!(silent[0].rest(), "");
}

/// A server of two connections at a time.
fn of_two(handler: impl Handler + Send + 'static) -> Running {
    let config = ServerConfig {
        max_connections: 2,
        ..ServerConfig::default()
    };
    Running::start(config, handler)
}

#[test]
fn the_connection_that_has_been_idle_for_longest_makes_room() {
    let server = of_two(echo);
    let mut older = server.connect();
    let mut younger = server.connect();
    younger.send("GET /a HTTP/1.1\r\n\r\n");
    younger.answer();
    older.send("GET /b HTTP/1.1\r\n\r\n");
    older.answer();

    let mut next = server.connect();
    next.send("GET /c HTTP/1.1\r\n\r\n");

    assert_eq!(next.answer(), ok("GET /c "));
    assert_eq!(younger.rest(), "");
    older.send("GET /d HTTP/1.1\r\n\r\n");
    assert_eq!(older.answer(), ok("GET /d "));
}

#[test]
fn only_idle_connections_make_room() {
    let (handler, work) = deferring();
    let server = of_two(handler);
    let mut waiting = server.connect();
    waiting.send("GET /a HTTP/1.1\r\n\r\n");
    let (_, answer) = work.recv_timeout(PATIENCE).unwrap();
    let mut sending = server.connect();
    sending.send("G");

    let mut refused = server.connect();

    assert!(is_final_fault(&refused.rest(), 503, "Too many"));
    answer.send(Response::json("a"));
    assert_eq!(waiting.answer(), ok("a"));
    sending.send("ET /b HTTP/1.1\r\n\r\n");
    assert_eq!(work.recv_timeout(PATIENCE).unwrap().0.path, "/b");
}

#[test]
fn a_connection_whose_next_request_has_come_is_not_idle() {
    let (busy, go_on) = (mpsc::channel(), mpsc::channel());
    let handler = move |request: Request, responder: Responder| {
        if request.path == "/slow" {
            busy.0.send(()).unwrap();
            go_on.1.recv_timeout(PATIENCE).unwrap();
        }
        echo(request, responder);
    };
    let server = of_two(handler);
    let mut idle = server.connect();
    idle.send("GET /a HTTP/1.1\r\n\r\n");
    idle.answer();
    let mut slow = server.connect();
    slow.send("GET /slow HTTP/1.1\r\n\r\n");
    busy.1.recv_timeout(PATIENCE).unwrap();

    // The server, which is in its handler, hears of the new client first.
    let mut refused = server.connect();
    idle.send("GET /b HTTP/1.1\r\n\r\n");
    go_on.0.send(()).unwrap();

    assert_eq!(idle.answer(), ok("GET /b "));
    assert_eq!(slow.answer(), ok("GET /slow "));
    assert!(is_final_fault(&refused.rest(), 503, "Too many"));
}

/// Sends a request, waits until the handler has it, and hangs up.
fn ask_and_hang_up(server: &Running, work: &Receiver<(Request, Responder)>) -> Responder {
    let mut client = server.connect();
    client.send("GET /a HTTP/1.1\r\n\r\n");
    work.recv_timeout(PATIENCE).unwrap().1
}

#[test]
fn clients_that_hang_up_keep_their_places_until_their_requests_are_answered() {
    let (handler, work) = deferring();
    let config = ServerConfig {
        max_connections: 3,
        ..ServerConfig::default()
    };
    let server = Running::start(config, handler);
    let mut staying = server.connect();
    staying.send("GET /b HTTP/1.1\r\n");
    let first = ask_and_hang_up(&server, &work);
    let _second = ask_and_hang_up(&server, &work);

    assert!(is_final_fault(&server.connect().rest(), 503, "Too many"));

    first.send(Response::no_content());
    // The server has seen that answer when it hands over this request.
    staying.send("\r\n");
    let (_, _third) = work.recv_timeout(PATIENCE).unwrap();
    let mut next = server.connect();
    next.send("GET /c HTTP/1.1\r\n\r\n");
    assert_eq!(work.recv_timeout(PATIENCE).unwrap().0.path, "/c");
}

#[test]
fn refused_connections_that_stay_are_bounded() {
    let server = Running::start(
        ServerConfig {
            max_connections: 1,
            ..ServerConfig::default()
        },
        echo,
    );
    let mut first = server.connect();
    first.send("GET /a HTTP/1.1\r\n");

    let mut refused: Vec<Client> = (0..5).map(|_| server.connect()).collect();

    assert!(
        refused
            .iter_mut()
            .all(|client| is_final_fault(&client.rest(), 503, "Too many"))
    );
    first.send("\r\n");
    assert_eq!(first.answer(), ok("GET /a "));
}

#[test]
fn connections_being_closed_are_bounded_too() {
    let linger_timeout = PATIENCE * 2;
    let config = ServerConfig {
        max_connections: 1,
        linger_timeout,
        ..ServerConfig::default()
    };
    let server = Running::start(config, echo);
    let mut leaving = [server.connect(), server.connect()];
    leaving[0].send("BREW / HTTP/1.1");
    assert!(is_final_fault(&leaving[1].rest(), 503, "Too many"));
    leaving[0].send("\r\n");
    assert!(is_final_fault(&leaving[0].rest(), 400, "BREW"));

    let mut refused = server.connect();

    assert!(is_final_fault(&refused.rest(), 503, "Too many"));
}

#[test]
fn lingering_ends_even_if_the_client_stays() {
    let config = ServerConfig {
        linger_timeout: Duration::from_millis(50),
        ..ServerConfig::default()
    };
    let server = Running::start(config, echo);
    let mut client = server.connect();
    let hang_up = Poller::new().unwrap();
    hang_up.add(&client.stream, 0, EventSet::empty()).unwrap();

    client.send("BREW / HTTP/1.1\r\n");

    assert_eq!(hang_up.wait(Some(Instant::now() + PATIENCE)).unwrap().len(), 1);
    assert!(is_final_fault(&client.rest(), 400, "BREW"));
}
