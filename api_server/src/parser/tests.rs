//! The parser through its public interface: what it takes, what it refuses, and that pieces do not matter.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::message::Method;

const MAX_BODY: usize = 100;

/// All that comes out of `pieces`, fed one after the other.
fn parse_pieces<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<Parsed> {
    let mut parser = RequestParser::new(MAX_BODY);
    let mut results = Vec::new();
    for piece in pieces {
        parser.feed(piece);
        loop {
            match parser.parse() {
                Parsed::NeedMore => break,
                Parsed::Error(error) => {
                    results.push(Parsed::Error(error));
                    return results;
                }
                parsed => results.push(parsed),
            }
        }
    }
    results
}

fn parse(text: &str) -> Vec<Parsed> {
    parse_pieces([text.as_bytes()])
}

fn request(method: Method, path: &str, body: &str) -> Parsed {
    let body = Some(body.as_bytes().to_vec()).filter(|body| !body.is_empty());
    Parsed::Request {
        request: Request {
            method,
            path: path.to_owned(),
            body,
        },
        close: false,
    }
}

fn error_of(text: &str) -> ParseError {
    match parse(text).pop() {
        Some(Parsed::Error(error)) => error,
        other => panic!("expected an error, got {other:?}"),
    }
}

fn path_for(uri: &str) -> String {
    match parse(&format!("GET {uri} HTTP/1.1\r\n\r\n")).pop() {
        Some(Parsed::Request { request, .. }) => request.path,
        other => panic!("expected a request, got {other:?}"),
    }
}

fn is_syntax_error(text: &str) -> bool {
    matches!(error_of(text), ParseError::Syntax { .. })
}

/// The result for a `GET` with one header line.
fn with_header(line: &str) -> Parsed {
    parse(&format!("GET / HTTP/1.1\r\n{line}\r\n\r\n")).remove(0)
}

#[test]
fn takes_a_request_without_headers() {
    assert_eq!(
        parse("GET /version HTTP/1.1\r\n\r\n"),
        [request(Method::Get, "/version", "")]
    );
}

#[test]
fn takes_http_1_0() {
    assert_eq!(
        parse("DELETE /drives/a HTTP/1.0\r\n\r\n"),
        [request(Method::Delete, "/drives/a", "")]
    );
}

#[test]
fn takes_a_body_of_the_announced_length() {
    assert_eq!(
        parse("PUT /a HTTP/1.1\r\ncontent-LENGTH:  2 \r\n\r\n{}"),
        [request(Method::Put, "/a", "{}")]
    );
}

#[test]
fn zero_length_means_no_body() {
    assert_eq!(
        parse("PUT /a HTTP/1.1\r\nContent-Length: 0\r\n\r\n"),
        [request(Method::Put, "/a", "")]
    );
}

#[test]
fn takes_pipelined_requests_in_order() {
    assert_eq!(
        parse("PATCH /a HTTP/1.1\r\nContent-Length: 1\r\n\r\nxGET /b HTTP/1.1\r\n\r\n"),
        [request(Method::Patch, "/a", "x"), request(Method::Get, "/b", "")]
    );
}

#[test]
fn requests_before_an_error_come_out_first() {
    let results = parse("GET /a HTTP/1.1\r\n\r\nPOST /b HTTP/1.1\r\n\r\n");

    assert_eq!(
        results,
        [
            request(Method::Get, "/a", ""),
            Parsed::Error(ParseError::Method {
                method: "POST".to_owned()
            })
        ]
    );
}

#[test]
fn incomplete_line_is_not_judged_however_it_arrives() {
    assert_eq!(parse("GET / HTTP/1.1\r\na: b\r\n\r\r"), []);
    assert_eq!(parse_pieces([&b"GET / HTTP/1.1\r\na: b\r\n\r"[..], b"\r"]), []);
}

#[test]
fn nothing_is_taken_after_an_error() {
    let mut parser = RequestParser::new(MAX_BODY);
    parser.feed(b"BREW / HTTP/1.1\r\n\r\n");
    let first = parser.parse();

    parser.feed(b"GET / HTTP/1.1\r\n\r\n");

    assert!(matches!(first, Parsed::Error(_)));
    assert_eq!(parser.parse(), first);
}

#[test]
fn empty_lines_before_a_request_are_skipped() {
    assert_eq!(
        parse("\r\n\r\nGET / HTTP/1.1\r\n\r\n"),
        [request(Method::Get, "/", "")]
    );
}

#[test]
fn parser_is_idle_between_requests_only() {
    let mut parser = RequestParser::new(MAX_BODY);
    assert!(parser.is_idle());
    parser.feed(b"PUT / HTTP/1.1\r\nContent-Length: 1\r\n\r\n");
    parser.parse();
    assert!(!parser.is_idle());
    parser.feed(b"x");
    parser.parse();
    assert!(parser.is_idle());
}

#[test]
fn path_is_kept_as_it_is() {
    assert_eq!(path_for("//a/%20?x=1"), "//a/%20?x=1");
    assert_eq!(path_for("/drives/é"), "/drives/é");
}

#[test]
fn absolute_form_is_reduced_to_its_path() {
    assert_eq!(path_for("http://localhost/version"), "/version");
    assert_eq!(path_for("HTTP://localhost:80/a/b"), "/a/b");
    assert_eq!(path_for("http://localhost"), "/");
}

#[test]
fn target_without_a_slash_is_the_root() {
    assert_eq!(path_for("version"), "/");
    assert_eq!(path_for("*"), "/");
}

#[test]
fn refuses_other_methods_at_the_first_line() {
    assert_eq!(
        error_of("get / HTTP/1.1\r\n"),
        ParseError::Method {
            method: "get".to_owned()
        }
    );
    assert_eq!(
        error_of("HEAD / HTTP/1.1\r\n"),
        ParseError::Method {
            method: "HEAD".to_owned()
        }
    );
}

#[test]
fn refuses_other_versions() {
    assert_eq!(error_of("GET / HTTP/2.0\r\n\r\n"), ParseError::Version);
}

#[test]
fn refuses_malformed_request_lines() {
    assert!(is_syntax_error("GET  HTTP/1.1\r\n\r\n"));
    assert!(is_syntax_error("{\"a\": 1}\r\n\r\n"));
    assert!(is_syntax_error("GET /\u{0} HTTP/1.1\r\n\r\n"));
}

#[test]
fn refuses_malformed_header_lines() {
    assert!(is_syntax_error("GET / HTTP/1.1\r\nfoo\r\n\r\n"));
    assert!(is_syntax_error("GET / HTTP/1.1\r\nfoo : bar\r\n\r\n"));
    assert!(is_syntax_error("GET / HTTP/1.1\r\na: b\r\n folded\r\n\r\n"));
    assert!(is_syntax_error("GET / HTTP/1.1\r\na: b\u{0}\r\n\r\n"));
}

#[test]
fn refuses_line_feeds_without_carriage_return() {
    assert!(is_syntax_error("GET / HTTP/1.1\n\n"));
    assert!(is_syntax_error("GET / HTTP/1.1\r\na: b\n"));
    assert!(is_syntax_error("\nGET / HTTP/1.1\r\n\r\n"));
}

#[test]
fn refuses_lengths_that_are_not_plain_numbers() {
    let value_of = |value: &str| match with_header(&format!("Content-Length: {value}")) {
        Parsed::Error(ParseError::ContentLength { value }) => value,
        other => panic!("expected a length error, got {other:?}"),
    };

    assert_eq!(value_of("abc"), "abc");
    assert_eq!(value_of("+1"), "+1");
    assert_eq!(value_of("-1"), "-1");
    assert_eq!(value_of("0x1"), "0x1");
    assert_eq!(value_of("1, 1"), "1, 1");
    assert_eq!(value_of(""), "");
}

#[test]
fn refuses_a_second_length_even_if_it_is_the_same() {
    assert_eq!(
        with_header("Content-Length: 1\r\nContent-Length: 1"),
        Parsed::Error(ParseError::DuplicateContentLength)
    );
}

#[test]
fn body_may_be_as_large_as_the_limit() {
    let body = "x".repeat(MAX_BODY);

    assert_eq!(
        parse(&format!(
            "PUT / HTTP/1.1\r\nContent-Length: {MAX_BODY}\r\n\r\n{body}"
        )),
        [request(Method::Put, "/", &body)]
    );
}

#[test]
fn refuses_a_body_over_the_limit_before_it_arrives() {
    let too_large = |length: &str| ParseError::PayloadTooLarge {
        length: length.to_owned(),
        limit: MAX_BODY,
    };

    assert_eq!(
        with_header("Content-Length: 101"),
        Parsed::Error(too_large("101"))
    );
    let overflow = "99999999999999999999999";
    assert_eq!(
        with_header(&format!("Content-Length: {overflow}")),
        Parsed::Error(too_large(overflow))
    );
}

#[test]
fn refuses_every_transfer_encoding() {
    assert_eq!(
        with_header("transfer-encoding: chunked"),
        Parsed::Error(ParseError::TransferEncoding)
    );
    assert_eq!(
        with_header("Transfer-Encoding: identity"),
        Parsed::Error(ParseError::TransferEncoding)
    );
}

#[test]
fn refuses_clients_that_exclude_identity() {
    let is_refused = |value: &str| {
        matches!(
            with_header(&format!("Accept-Encoding: {value}")),
            Parsed::Error(ParseError::AcceptEncoding { .. })
        )
    };

    assert!(is_refused("identity;q=0"));
    assert!(is_refused("gzip, identity; q=0.000"));
    assert!(is_refused("*;q=0"));
    assert!(is_refused(""));
    assert!(!is_refused("gzip, deflate"));
    assert!(!is_refused("identity;q=0.5"));
    assert!(!is_refused("identity, *;q=0"));
    assert!(!is_refused("gzip;q=0"));
}

#[test]
fn unknown_headers_and_values_are_ignored() {
    let expected = request(Method::Get, "/", "");

    assert_eq!(with_header("Content-Type: text/xml"), expected);
    assert_eq!(with_header("Expect: the-unexpected"), expected);
    assert_eq!(with_header("X-Anything: caf\u{e9}"), expected);
}

#[test]
fn close_is_found_among_connection_options() {
    let closes = |line: &str| matches!(with_header(line), Parsed::Request { close: true, .. });

    assert!(closes("Connection: close"));
    assert!(closes("connection: Keep-Alive , CLOSE"));
    assert!(!closes("Connection: keep-alive"));
    assert!(!closes("Connection: closed"));
}

#[test]
fn refuses_a_head_over_the_limit_even_without_a_line_end() {
    let error = ParseError::HeadTooLarge { limit: MAX_HEAD };

    assert_eq!(error_of(&format!("GET /{}", "x".repeat(MAX_HEAD))), error);
    assert_eq!(
        error_of(&format!("GET / HTTP/1.1\r\na: {}", "x".repeat(MAX_HEAD))),
        error
    );
}

#[test]
fn head_may_be_as_large_as_the_limit() {
    let around = "GET / HTTP/1.1\r\na: \r\n\r\n".len();
    let head = format!("GET / HTTP/1.1\r\na: {}\r\n\r\n", "x".repeat(MAX_HEAD - around));

    assert_eq!(parse(&head), [request(Method::Get, "/", "")]);
}

#[test]
fn headers_may_be_as_many_as_the_limit() {
    assert_eq!(
        with_header(&vec!["a: b"; MAX_HEADERS].join("\r\n")),
        request(Method::Get, "/", "")
    );
    assert_eq!(
        with_header(&vec!["a: b"; MAX_HEADERS + 1].join("\r\n")),
        Parsed::Error(ParseError::TooManyHeaders { limit: MAX_HEADERS })
    );
}

#[test]
fn asks_once_for_a_body_that_is_expected() {
    let head = b"PUT / HTTP/1.1\r\nExpect: 100-Continue\r\nContent-Length: 2\r\n\r\n";

    assert_eq!(
        parse_pieces([&head[..], b"{", b"}"]),
        [Parsed::Continue, request(Method::Put, "/", "{}")]
    );
}

#[test]
fn does_not_ask_for_a_body_that_is_here_or_empty() {
    let expected = request(Method::Put, "/", "x");

    assert_eq!(
        parse("PUT / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\nx"),
        [expected]
    );
    assert_eq!(with_header("Expect: 100-continue"), request(Method::Get, "/", ""));
}

#[test]
fn does_not_send_interim_answers_to_http_1_0() {
    assert_eq!(
        parse("PUT / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n"),
        []
    );
}

#[test]
fn refuses_an_expected_body_over_the_limit_without_asking_for_it() {
    let results = parse("PUT / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 101\r\n\r\n");

    assert!(
        matches!(results[..], [Parsed::Error(ParseError::PayloadTooLarge { .. })]),
        "{results:?}"
    );
}

#[test]
fn messages_repeat_only_the_start_of_what_the_client_sent() {
    let message = error_of(&format!("{} / HTTP/1.1\r\n", "X".repeat(5000))).to_string();

    assert!(message.len() < 200, "{message}");
}

prop_compose! {
    /// A request as bytes, and what is to come out.
    fn any_request()(
        method in prop::sample::select(vec![Method::Get, Method::Put, Method::Patch, Method::Delete]),
        path in "/[a-z0-9/_-]{0,40}",
        headers in vec(("X-[a-z]{1,8}", "[ -~]{0,20}"), 0..5),
        body in vec(any::<u8>(), 0..=MAX_BODY),
        close in any::<bool>(),
    ) -> (Vec<u8>, Parsed) {
        let mut text = format!("{method} {path} HTTP/1.1\r\nContent-Length: {}\r\n", body.len());
        for (name, value) in headers {
            text += &format!("{name}: {value}\r\n");
        }
        text += if close { "Connection: close\r\n\r\n" } else { "\r\n" };
        let bytes = [text.into_bytes(), body.clone()].concat();
        let body = Some(body).filter(|body| !body.is_empty());
        (bytes, Parsed::Request { request: Request { method, path, body }, close })
    }
}

/// A byte that means something to the grammar.
fn any_troublemaker() -> impl Strategy<Value = u8> {
    prop::sample::select(b"\r\n\0 :,;\xffA9".to_vec())
}

/// `stream` cut at any `cuts`.
fn pieces_of<'a>(stream: &'a [u8], cuts: &[prop::sample::Index]) -> Vec<&'a [u8]> {
    let mut ends: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
    ends.push(stream.len());
    ends.sort_unstable();
    let mut start = 0;
    ends.into_iter()
        .map(|end| &stream[std::mem::replace(&mut start, end)..end])
        .collect()
}

proptest! {
    #[test]
    fn pieces_do_not_matter_to_valid_streams(
        requests in vec(any_request(), 1..6),
        cuts in vec(any::<prop::sample::Index>(), 0..20),
    ) {
        let stream = requests.iter().map(|(bytes, _)| bytes.as_slice()).collect::<Vec<_>>().concat();
        let expected: Vec<Parsed> = requests.into_iter().map(|(_, parsed)| parsed).collect();

        prop_assert_eq!(parse_pieces(pieces_of(&stream, &cuts)), expected.clone());
        prop_assert_eq!(parse_pieces(stream.chunks(1)), expected);
    }

    #[test]
    fn pieces_do_not_matter_to_damaged_streams(
        (mut stream, _) in any_request(),
        damage in vec((any::<prop::sample::Index>(), any_troublemaker()), 1..4),
        cuts in vec(any::<prop::sample::Index>(), 0..20),
    ) {
        for (place, byte) in damage {
            let place = place.index(stream.len());
            stream[place] = byte;
        }
        let whole = parse_pieces([&stream[..]]);
        let pieces = parse_pieces(pieces_of(&stream, &cuts));

        let is_error = |parsed: &Parsed| matches!(parsed, Parsed::Error(_));
        let without_error = |results: &[Parsed]| -> Vec<Parsed> {
            results.iter().filter(|parsed| !is_error(parsed)).cloned().collect()
        };
        prop_assert_eq!(without_error(&whole), without_error(&pieces));
        prop_assert_eq!(whole.iter().any(is_error), pieces.iter().any(is_error));
    }

    #[test]
    fn arbitrary_bytes_never_panic(
        stream in vec(any::<u8>(), 0..2000),
        cuts in vec(any::<prop::sample::Index>(), 0..20),
    ) {
        parse_pieces(pieces_of(&stream, &cuts));
    }
}
