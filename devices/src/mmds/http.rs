//! What guests ask and what they are told: one HTTP request to one response, without input or output.
//!
//! Called on the io thread of the interface that the request came through.

use std::io::Write;
use std::str;
use std::time::Duration;

use serde_json::Value;

use super::token::MAX_TTL;
use super::{Denied, Mmds};

/// The longest head of a request.
pub(super) const MAX_HEAD: usize = 8192;
/// The longest body; bodies mean nothing here and are thrown away.
const MAX_BODY: usize = 64 << 10;
const MAX_HEADERS: usize = 64;

const TOKEN: [&str; 2] = ["X-metadata-token", "X-aws-ec2-metadata-token"];
const TOKEN_TTL: [&str; 2] = [
    "X-metadata-token-ttl-seconds",
    "X-aws-ec2-metadata-token-ttl-seconds",
];
/// A proxy adds it: a request that came through one may be forged (by SSRF), and gets no token.
const FORWARDED: &str = "X-Forwarded-For";
const TOKEN_PATH: &str = "/latest/api/token";

const TEXT: &str = "text/plain";
const JSON: &str = "application/json";

/// The answer to the request at the beginning of the input.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// The response as it is sent.
    pub(super) bytes: Vec<u8>,
    /// Bytes of input that were the request's head.
    pub(super) head: usize,
    /// Bytes behind that are the request's body, as far as they have come or will come.
    pub(super) body: usize,
    /// The connection ends with this response.
    pub(super) close: bool,
}

/// Answers the request at the beginning of `input`; none when its head is not there wholly. `now` is [`Mmds::age`].
pub(super) fn answer(mmds: &Mmds, input: &[u8], now: Duration) -> Option<Answer> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    let refused = match parsed.parse(input) {
        Ok(httparse::Status::Complete(head)) => match Request::new(&parsed) {
            Ok(request) => {
                let response = respond(mmds, &request, now);
                return Some(Answer {
                    bytes: response.to_bytes(request.close, request.method == "HEAD"),
                    head,
                    body: request.body,
                    close: request.close,
                });
            }
            Err(why) => why,
        },
        Ok(httparse::Status::Partial) if input.len() < MAX_HEAD => return None,
        Ok(httparse::Status::Partial) => "The head of the request is too long.",
        Err(httparse::Error::TooManyHeaders) => "The request has too many headers.",
        Err(_) => "The request is not HTTP/1.",
    };
    // Where the next request would begin is not known, so there is none.
    Some(Answer {
        bytes: Response::refusal(400, refused).to_bytes(true, false),
        head: input.len(),
        body: 0,
        close: true,
    })
}

/// What matters of a request.
#[derive(Debug, Default)]
struct Request<'a> {
    method: &'a str,
    /// Begins with `/`; none when the target has no such path.
    path: Option<&'a str>,
    token: Option<&'a str>,
    /// The header that asks for a token's lifetime, by its proper name, and its value.
    ttl: Option<(&'static str, &'a str)>,
    forwarded: bool,
    json: bool,
    body: usize,
    close: bool,
}

impl<'a> Request<'a> {
    fn new(parsed: &httparse::Request<'_, 'a>) -> Result<Self, &'static str> {
        let mut request = Self {
            method: parsed.method.unwrap_or_default(),
            path: path_of(parsed.path.unwrap_or_default()),
            // HTTP/1.0 has no persistent connections.
            close: parsed.version != Some(1),
            ..Self::default()
        };
        let (mut accept, mut length) = (None, None);
        for header in &*parsed.headers {
            let is = |name: &&&str| header.name.eq_ignore_ascii_case(name);
            let value = str::from_utf8(header.value).unwrap_or_default();
            if TOKEN.iter().any(|name| is(&name)) {
                request.token = request.token.or(Some(value));
            } else if let Some(name) = TOKEN_TTL.iter().find(is) {
                request.ttl = request.ttl.or(Some((name, value)));
            } else if is(&&FORWARDED) {
                request.forwarded = true;
            } else if is(&&"Accept") {
                accept = accept.or_else(|| accepts_json(value));
            } else if is(&&"Connection") {
                let mut options = value.split(',');
                request.close |= options.any(|option| option.trim().eq_ignore_ascii_case("close"));
            } else if is(&&"Content-Length") {
                let new = content_length(value)?;
                if length.replace(new).is_some_and(|old| old != new) {
                    return Err("The request has two different lengths.");
                }
            } else if is(&&"Transfer-Encoding") {
                return Err("A transfer encoding is not supported.");
            }
        }
        request.json = accept.unwrap_or(false);
        request.body = length.unwrap_or(0);
        Ok(request)
    }
}

fn content_length(value: &str) -> Result<usize, &'static str> {
    // `parse` alone would take a sign.
    let digits = value.bytes().all(|c| c.is_ascii_digit());
    match value.parse() {
        Ok(length) if digits && length <= MAX_BODY => Ok(length),
        Ok(_) if digits => Err("The body of the request is too long."),
        _ => Err("The length of the request is not a number."),
    }
}

/// Whether the first media type of the list that is known here is JSON; none when there is none.
fn accepts_json(accept: &str) -> Option<bool> {
    accept.split(',').find_map(|range| {
        let kind = range.split(';').next().unwrap_or_default().trim();
        let is = |name: &&str| kind.eq_ignore_ascii_case(name);
        if is(&JSON) {
            Some(true)
        } else {
            // Some clients turn the names of the type around.
            [TEXT, "plain/text", "text/*", "*/*"]
                .iter()
                .any(is)
                .then_some(false)
        }
    })
}

/// The path of a request's target, which may be a whole URL (RFC 9112 §3.2).
fn path_of(target: &str) -> Option<&str> {
    let path = match target.split_once("://") {
        Some((scheme, rest)) if !scheme.contains('/') => rest.find('/').map(|at| &rest[at..]),
        _ => Some(target),
    };
    path.filter(|path| path.starts_with('/'))
}

/// The path as a JSON pointer (RFC 6901): every slash begins the name of a member, so a run of slashes is one and the
/// last one is none.
fn pointer(path: &str) -> String {
    let names = path.split('/').filter(|name| !name.is_empty());
    names.fold(String::with_capacity(path.len()), |pointer, name| {
        pointer + "/" + name
    })
}

#[derive(Debug)]
struct Response {
    status: u16,
    header: Option<(&'static str, String)>,
    content_type: &'static str,
    body: Vec<u8>,
}

impl Response {
    fn ok(content_type: &'static str, body: Vec<u8>) -> Self {
        Self {
            status: 200,
            header: None,
            content_type,
            body,
        }
    }

    fn refusal(status: u16, why: impl Into<String>) -> Self {
        Self {
            status,
            header: None,
            content_type: TEXT,
            body: why.into().into_bytes(),
        }
    }

    fn with_header(self, name: &'static str, value: impl Into<String>) -> Self {
        Self {
            header: Some((name, value.into())),
            ..self
        }
    }

    /// Status line and order of headers are those of the API.
    fn to_bytes(&self, close: bool, head_only: bool) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(256 + self.body.len());
        let connection = if close { "close" } else { "keep-alive" };
        let written = write!(
            bytes,
            "HTTP/1.1 {} \r\nServer: Firecracker API\r\nConnection: {connection}\r\n",
            self.status
        )
        .and_then(|()| match &self.header {
            Some((name, value)) => write!(bytes, "{name}: {value}\r\n"),
            None => Ok(()),
        })
        .and_then(|()| {
            let len = self.body.len();
            write!(
                bytes,
                "Content-Type: {}\r\nContent-Length: {len}\r\n\r\n",
                self.content_type
            )
        });
        written.expect("writing to a Vec does not fail");
        if !head_only {
            bytes.extend_from_slice(&self.body);
        }
        bytes
    }
}

fn respond(mmds: &Mmds, request: &Request<'_>, now: Duration) -> Response {
    let Some(path) = request.path else {
        return Response::refusal(400, "Invalid URI.");
    };
    match request.method {
        "GET" => match mmds.admits(request.token, now) {
            Ok(()) => get(mmds, path, request.json),
            Err(Denied::InvalidToken) => Response::refusal(401, "MMDS token not valid."),
            Err(Denied::NoToken) => Response::refusal(
                401,
                "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header to specify the \
                 session token.",
            ),
        },
        "PUT" => put_token(mmds, path, request, now),
        _ => Response::refusal(405, "Not allowed HTTP method.").with_header("Allow", "GET, PUT"),
    }
}

fn not_found(path: &str) -> Response {
    Response::refusal(404, format!("Resource not found: {path}."))
}

fn get(mmds: &Mmds, path: &str, json: bool) -> Response {
    let document = mmds.store.get();
    let Some(value) = document.pointer(&pointer(path)) else {
        return not_found(path);
    };
    if json && !mmds.config.imds_compat {
        return Response::ok(JSON, serde_json::to_vec(value).expect("a document is plain data"));
    }
    match value {
        Value::String(text) => Response::ok(TEXT, text.clone().into_bytes()),
        Value::Object(members) => {
            let lines = members.iter().map(|(name, value)| match value {
                Value::Object(_) => format!("{name}/"),
                _ => name.clone(),
            });
            Response::ok(TEXT, lines.collect::<Vec<_>>().join("\n").into_bytes())
        }
        _ => Response::refusal(501, "Cannot retrieve value. The value has an unsupported type."),
    }
}

fn put_token(mmds: &Mmds, path: &str, request: &Request<'_>, now: Duration) -> Response {
    if request.forwarded {
        let why = "Invalid header. Reason: Unsupported header name. Key: X-Forwarded-For";
        return Response::refusal(400, why);
    }
    if pointer(path) != TOKEN_PATH {
        return not_found(path);
    }
    let Some((name, value)) = request.ttl else {
        return Response::refusal(
            400,
            "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or \
             `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime.",
        );
    };
    let Some(ttl) = value.parse().ok().filter(|ttl| (1..=MAX_TTL).contains(ttl)) else {
        let why = format!(
            "Invalid time to live value provided for token: {value}. Please provide a value between 1 and {MAX_TTL}."
        );
        return Response::refusal(400, why);
    };
    match mmds.issue_token(ttl, now) {
        Ok(token) => Response::ok(TEXT, token.into_bytes()).with_header(name, ttl.to_string()),
        Err(error) => {
            log::warn!("MMDS: the host gave no random bytes for a token: {error}");
            Response::refusal(500, "No token can be made.")
        }
    }
}
