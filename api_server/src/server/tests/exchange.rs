//! Requests and answers: order, pieces, answers from elsewhere.

use super::*;

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
