//! Requests and their answers, byte by byte.

use std::time::Duration;

use super::super::http::{Answer, MAX_HEAD, answer};
use super::super::{Mmds, Version};
use super::{config, counter, service, service_of};
use serde_json::json;

const NOW: Duration = Duration::from_secs(1000);

fn ask_at(mmds: &Mmds, request: &str, now: Duration) -> Answer {
    answer(mmds, request.as_bytes(), now).expect("the request is whole")
}

/// Status, and all headers but those that every answer has, and body.
fn ask(mmds: &Mmds, request: &str) -> (u16, String, String) {
    parts(&ask_at(mmds, request, NOW))
}

fn parts(answer: &Answer) -> (u16, String, String) {
    let text = String::from_utf8(answer.bytes.clone()).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let (status, headers) = head.split_once("\r\n").unwrap();
    let status = status
        .strip_prefix("HTTP/1.1 ")
        .unwrap()
        .trim_end()
        .parse()
        .unwrap();
    let common = ["Server: ", "Connection: ", "Content-Length: "];
    let special = headers
        .split("\r\n")
        .filter(|line| !common.iter().any(|name| line.starts_with(name)));
    (status, special.collect::<Vec<_>>().join("; "), body.into())
}

/// The answer to a GET with these header lines.
fn get(mmds: &Mmds, path: &str, headers: &str) -> (u16, String, String) {
    ask(mmds, &format!("GET {path} HTTP/1.1\r\n{headers}\r\n"))
}

fn put_token(mmds: &Mmds, headers: &str) -> (u16, String, String) {
    ask(mmds, &format!("PUT /latest/api/token HTTP/1.1\r\n{headers}\r\n"))
}

fn text(status: u16, body: &str) -> (u16, String, String) {
    (status, "Content-Type: text/plain".into(), body.into())
}

fn json_text(body: &str) -> (u16, String, String) {
    (200, "Content-Type: application/json".into(), body.into())
}

const JSON: &str = "Accept: application/json\r\n";

#[test]
fn an_answer_has_these_bytes() {
    let answer = ask_at(&service(Version::V1), "GET /text HTTP/1.1\r\n\r\n", NOW);
    let expected = "HTTP/1.1 200 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\
                    Content-Type: text/plain\r\nContent-Length: 5\r\n\r\nplain";
    assert_eq!(String::from_utf8(answer.bytes).unwrap(), expected);
    assert_eq!((answer.head, answer.body, answer.close), (22, 0, false));
}

#[test]
fn text_is_given_as_it_is_and_objects_as_the_names_of_their_members() {
    let mmds = service(Version::V1);
    assert_eq!(get(&mmds, "/text", ""), text(200, "plain"));
    assert_eq!(get(&mmds, "/", ""), text(200, "empty/\nlatest/\nnothing\ntext"));
    let names = "ami-id\ncount\nlist\ntags/";
    assert_eq!(get(&mmds, "/latest/meta-data", ""), text(200, names));
    assert_eq!(get(&mmds, "/empty", ""), text(200, ""));
}

#[test]
fn what_is_neither_text_nor_an_object_has_no_text_form() {
    let mmds = service(Version::V1);
    let refusal = text(501, "Cannot retrieve value. The value has an unsupported type.");
    for path in ["/latest/meta-data/count", "/latest/meta-data/list", "/nothing"] {
        assert_eq!(get(&mmds, path, ""), refusal, "{path}");
    }
}

#[test]
fn who_accepts_json_gets_json_of_any_value() {
    let mmds = service(Version::V1);
    assert_eq!(get(&mmds, "/text", JSON), json_text("\"plain\""));
    assert_eq!(get(&mmds, "/latest/meta-data/count", JSON), json_text("3"));
    assert_eq!(get(&mmds, "/latest/meta-data/list/0", JSON), json_text("\"x\""));
    assert_eq!(get(&mmds, "/nothing", JSON), json_text("null"));
    let tags = r#"{"a/b~c":"odd","b":"2"}"#;
    assert_eq!(get(&mmds, "/latest/meta-data/tags", JSON), json_text(tags));
}

#[test]
fn the_first_known_type_that_is_accepted_decides() {
    let mmds = service(Version::V1);
    let json = |accept: &str| get(&mmds, "/text", &format!("accept: {accept}\r\n")) == json_text("\"plain\"");
    for accept in [
        "APPLICATION/JSON",
        "application/json;q=0.9, */*",
        "image/png,application/json",
    ] {
        assert!(json(accept), "{accept}");
    }
    for accept in [
        "*/*",
        "text/plain",
        "plain/text",
        "text/*;q=1, application/json",
        "image/png",
        "",
    ] {
        assert!(!json(accept), "{accept}");
    }
}

#[test]
fn imds_compat_answers_in_text_whatever_is_accepted() {
    let config = config(r#","imds_compat":true"#);
    let mmds = service_of(config, json!({"a": {"b": 1}}));
    assert_eq!(get(&mmds, "/a", JSON), text(200, "b"));
    assert_eq!(get(&mmds, "/a/b", JSON).0, 501);
}

#[test]
fn a_path_is_a_json_pointer_with_as_many_slashes_as_one_likes() {
    let mmds = service(Version::V1);
    for path in [
        "/text/",
        "//text",
        "http://169.254.169.254/text",
        "http://169.254.169.254//text//",
    ] {
        assert_eq!(get(&mmds, path, ""), text(200, "plain"), "{path}");
    }
    assert_eq!(get(&mmds, "/latest/meta-data/tags/a~1b~0c", ""), text(200, "odd"));
}

#[test]
fn what_is_not_there_is_not_found_by_the_name_that_was_asked() {
    let mmds = service(Version::V1);
    for path in [
        "/x",
        "/text/x",
        "/latest//x/",
        "/text?x=1",
        "/latest/meta-data/list/1",
    ] {
        let refusal = text(404, &format!("Resource not found: {path}."));
        assert_eq!(get(&mmds, path, ""), refusal);
        assert_eq!(get(&mmds, path, JSON), refusal);
    }
}

#[test]
fn a_target_without_a_path_is_invalid() {
    let mmds = service(Version::V1);
    for target in ["http://169.254.169.254", "text", "*", "http://"] {
        assert_eq!(get(&mmds, target, ""), text(400, "Invalid URI."), "{target}");
    }
}

#[test]
fn other_methods_are_not_allowed() {
    let refusal = (
        405,
        "Allow: GET, PUT; Content-Type: text/plain".to_owned(),
        "Not allowed HTTP method.".to_owned(),
    );
    for version in [Version::V1, Version::V2] {
        for method in ["POST", "PATCH", "DELETE", "OPTIONS", "get"] {
            let request = format!("{method} / HTTP/1.1\r\n\r\n");
            assert_eq!(ask(&service(version), &request), refusal, "{method}");
        }
    }
}

#[test]
fn an_answer_to_head_has_no_body() {
    let answer = parts(&ask_at(&service(Version::V1), "HEAD / HTTP/1.1\r\n\r\n", NOW));
    assert_eq!((answer.0, answer.2.as_str()), (405, ""));
}

#[test]
fn v2_asks_for_a_token() {
    let mmds = service(Version::V2);
    let missing = "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header to specify the \
                   session token.";
    assert_eq!(get(&mmds, "/text", ""), text(401, missing));
    let invalid = text(401, "MMDS token not valid.");
    assert_eq!(get(&mmds, "/text", "X-metadata-token: abc\r\n"), invalid);
    assert_eq!(get(&mmds, "/text", "X-aws-ec2-metadata-token: \r\n"), invalid);
    assert_eq!(
        (counter(&mmds, "rx_no_token"), counter(&mmds, "rx_invalid_token")),
        (1, 2)
    );
}

#[test]
fn v2_answers_with_a_token_by_either_name_until_it_ends() {
    let mmds = service(Version::V2);
    for (ttl, name) in [
        ("X-metadata-token-ttl-seconds", "X-metadata-token"),
        ("X-aws-ec2-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token"),
    ] {
        let lower = ttl.to_lowercase();
        let (status, headers, token) = put_token(&mmds, &format!("{lower}: 60\r\n"));
        assert_eq!(
            (status, headers),
            (200, format!("{ttl}: 60; Content-Type: text/plain"))
        );
        let request = format!("GET /text HTTP/1.1\r\n{name}: {token}\r\n\r\n");
        let at = |later| parts(&ask_at(&mmds, &request, NOW + Duration::from_secs(later)));
        assert_eq!(at(59), text(200, "plain"));
        assert_eq!(at(60), text(401, "MMDS token not valid."));
    }
}

#[test]
fn v1_answers_with_any_token_and_without_and_counts_them() {
    let mmds = service(Version::V1);
    let (status, _, token) = put_token(&mmds, "X-metadata-token-ttl-seconds: 21600\r\n");
    assert_eq!(status, 200);
    for headers in [
        "",
        "X-metadata-token: wrong\r\n",
        &format!("X-metadata-token: {token}\r\n"),
    ] {
        assert_eq!(get(&mmds, "/text", headers), text(200, "plain"), "{headers}");
    }
    assert_eq!(
        (counter(&mmds, "rx_no_token"), counter(&mmds, "rx_invalid_token")),
        (1, 1)
    );
}

#[test]
fn a_token_needs_a_lifetime_in_range() {
    let mmds = service(Version::V2);
    let missing = "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or \
                   `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime.";
    assert_eq!(put_token(&mmds, ""), text(400, missing));
    for ttl in ["0", "21601", "-1", "abc", "", "99999999999", "1.5"] {
        let refusal = format!(
            "Invalid time to live value provided for token: {ttl}. Please provide a value between 1 and 21600."
        );
        let answer = put_token(&mmds, &format!("X-metadata-token-ttl-seconds: {ttl}\r\n"));
        assert_eq!(answer, text(400, &refusal));
    }
    for ttl in ["1", "21600"] {
        let header = format!("X-metadata-token-ttl-seconds: {ttl}\r\n");
        assert_eq!(put_token(&mmds, &header).0, 200, "{ttl}");
    }
}

#[test]
fn a_token_is_put_at_its_path_only() {
    let mmds = service(Version::V2);
    let put = |path: &str| {
        ask(
            &mmds,
            &format!("PUT {path} HTTP/1.1\r\nX-metadata-token-ttl-seconds: 1\r\n\r\n"),
        )
    };
    assert_eq!(put("/latest//api/token/").0, 200);
    for path in ["/latest/api", "/text", "/latest/api/token/x"] {
        assert_eq!(put(path), text(404, &format!("Resource not found: {path}.")));
    }
}

#[test]
fn a_forwarded_request_gets_no_token() {
    let mmds = service(Version::V2);
    let headers = "x-FORWARDED-for: 10.0.0.1\r\nX-metadata-token-ttl-seconds: 60\r\n";
    let refusal = "Invalid header. Reason: Unsupported header name. Key: X-Forwarded-For";
    assert_eq!(put_token(&mmds, headers), text(400, refusal));
}

#[test]
fn every_request_sees_the_document_of_its_moment() {
    let mmds = service(Version::V1);
    mmds.store.put(json!({"text": "new"})).unwrap();
    assert_eq!(get(&mmds, "/text", ""), text(200, "new"));
    assert_eq!(get(&mmds, "/latest", "").0, 404);
}

#[test]
fn a_request_is_awaited_until_its_head_is_whole() {
    let mmds = service(Version::V1);
    let request = b"GET /text HTTP/1.1\r\nHost: x\r\n\r\n";
    for len in 0..request.len() {
        assert_eq!(answer(&mmds, &request[..len], NOW), None, "{len}");
    }
    let long = [b"GET / HTTP/1.1\r\nA: ".as_slice(), &[b'a'; MAX_HEAD]].concat();
    assert_eq!(answer(&mmds, &long[..MAX_HEAD - 1], NOW), None);
    let refused = answer(&mmds, &long[..MAX_HEAD], NOW).unwrap();
    assert_eq!(parts(&refused), text(400, "The head of the request is too long."));
    assert!(refused.close);
}

#[test]
fn what_is_no_request_ends_the_connection() {
    let mmds = service(Version::V1);
    for (junk, why) in [
        ("\0\0\0\0", "The request is not HTTP/1."),
        ("GET / HTTP/2.0\r\n\r\n", "The request is not HTTP/1."),
        ("GET / HTTP/1.1\r\nno colon\r\n\r\n", "The request is not HTTP/1."),
        (
            "PUT / HTTP/1.1\r\nContent-Length: +1\r\n\r\n",
            "The length of the request is not a number.",
        ),
        (
            "PUT / HTTP/1.1\r\nContent-Length: 65537\r\n\r\n",
            "The body of the request is too long.",
        ),
        (
            "PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            "The request has two different lengths.",
        ),
        (
            "PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
            "A transfer encoding is not supported.",
        ),
        (
            &format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(65)),
            "The request has too many headers.",
        ),
    ] {
        let refused = ask_at(&mmds, junk, NOW);
        assert_eq!(parts(&refused), text(400, why), "{junk}");
        assert!(refused.close && refused.head == junk.len());
    }
}

#[test]
fn the_connection_ends_when_the_client_wants_it_or_is_old() {
    let mmds = service(Version::V1);
    let close = |request: &str| {
        let answer = ask_at(&mmds, request, NOW);
        let says_so = String::from_utf8(answer.bytes)
            .unwrap()
            .contains("Connection: close\r\n");
        assert_eq!(answer.close, says_so);
        answer.close
    };
    assert!(!close("GET / HTTP/1.1\r\nConnection: keep-alive\r\n\r\n"));
    assert!(close("GET / HTTP/1.1\r\nconnection: foo, Close\r\n\r\n"));
    assert!(close("GET / HTTP/1.0\r\n\r\n"));
}

#[test]
fn a_body_is_counted_and_not_looked_at() {
    let mmds = service(Version::V2);
    let request =
        "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\nContent-Length: 9\r\n\r\nabc";
    let answer = ask_at(&mmds, request, NOW);
    assert_eq!(
        (answer.head, answer.body, parts(&answer).0),
        (request.len() - 3, 9, 200)
    );
}

#[test]
fn an_empty_store_is_an_empty_object() {
    let mmds = Mmds::new(config(""), std::sync::Arc::new(super::super::Store::new(10)));
    assert_eq!(get(&mmds, "/", JSON), json_text("{}"));
    assert_eq!(get(&mmds, "/x", "").0, 404);
}
