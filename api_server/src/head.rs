//! The head of a request: request line and headers, judged as far as the framing of the body needs.
//!
//! Called by the parser with bytes from an untrusted client. Headers without a meaning here are ignored, as
//! are unknown values of `Content-Type`, `Accept` and `Expect`.

use crate::error::ParseError;
use crate::message::Method;
use crate::parser::MAX_HEADERS;

/// How much of a client's text an error message repeats, in characters.
const SHOWN: usize = 64;

/// What a head says.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) method: Method,
    pub(crate) path: String,
    /// Body length in bytes, at most the parser's limit.
    pub(crate) content_length: usize,
    /// The client waits for an interim answer before it sends the body (RFC 9110 §10.1.1).
    pub(crate) expects_continue: bool,
    /// The client wants the connection closed after the answer (RFC 9112 §9.6).
    pub(crate) close: bool,
}

impl Head {
    /// Reads a head off the start of `bytes`; also returns its length. `None` if more bytes are needed.
    ///
    /// Faults are reported as soon as they are visible, not only when the head is complete.
    pub(crate) fn parse(bytes: &[u8], max_body: usize) -> Result<Option<(Self, usize)>, ParseError> {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut request = httparse::Request::new(&mut headers);
        let status = request.parse(bytes).map_err(syntax_error)?;
        let method = request.method.map(parse_method).transpose()?;
        let length = match status {
            httparse::Status::Complete(length) => length,
            httparse::Status::Partial => bytes.len(),
        };
        refuse_bare_line_feeds(&bytes[..length])?;
        let (true, Some(method), Some(uri)) = (status.is_complete(), method, request.path) else {
            return Ok(None);
        };
        let mut fields = Fields::default();
        for header in request.headers.iter() {
            fields.read(header, max_body)?;
        }
        let head = Self {
            method,
            path: path_of(uri).to_owned(),
            content_length: fields.content_length.unwrap_or(0),
            // An HTTP/1.0 client cannot know interim answers.
            expects_continue: fields.expects_continue && request.version == Some(1),
            close: fields.close,
        };
        Ok(Some((head, length)))
    }
}

/// The header fields that matter, as read so far.
#[derive(Default)]
struct Fields {
    content_length: Option<usize>,
    expects_continue: bool,
    close: bool,
}

impl Fields {
    fn read(&mut self, header: &httparse::Header<'_>, max_body: usize) -> Result<(), ParseError> {
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        if is("content-length") {
            let length = parse_content_length(header.value, max_body)?;
            if self.content_length.replace(length).is_some() {
                return Err(ParseError::DuplicateContentLength);
            }
        } else if is("transfer-encoding") {
            return Err(ParseError::TransferEncoding);
        } else if is("connection") {
            self.close |= elements(header.value).any(|option| option.eq_ignore_ascii_case(b"close"));
        } else if is("expect") {
            self.expects_continue |= header.value.eq_ignore_ascii_case(b"100-continue");
        } else if is("accept-encoding") && !accepts_identity(header.value) {
            return Err(ParseError::AcceptEncoding {
                value: shown(header.value),
            });
        }
        Ok(())
    }
}

fn parse_method(token: &str) -> Result<Method, ParseError> {
    Method::from_token(token).ok_or_else(|| ParseError::Method {
        method: shown(token.as_bytes()),
    })
}

fn syntax_error(error: httparse::Error) -> ParseError {
    let reason = match error {
        httparse::Error::TooManyHeaders => return ParseError::TooManyHeaders { limit: MAX_HEADERS },
        httparse::Error::Version => return ParseError::Version,
        httparse::Error::HeaderName => "a header line does not begin with a valid name and a colon",
        httparse::Error::HeaderValue => "a header value holds a control character",
        httparse::Error::NewLine => "a line does not end with CR LF",
        _ => "the request line is not `METHOD /path HTTP/1.1`",
    };
    ParseError::Syntax { reason }
}

/// RFC 9112 §2.2 lets a server accept a bare LF; refusing it keeps one reading of every request.
fn refuse_bare_line_feeds(bytes: &[u8]) -> Result<(), ParseError> {
    let mut previous = 0;
    for &byte in bytes {
        if byte == b'\n' && previous != b'\r' {
            return Err(ParseError::Syntax {
                reason: "a line ends with LF alone, not with CR LF",
            });
        }
        previous = byte;
    }
    Ok(())
}

/// The path of a request target: origin form as it is, absolute form without scheme and host (RFC 9112 §3.2),
/// and `/` for everything else.
fn path_of(uri: &str) -> &str {
    const SCHEME: &str = "http://";
    let origin = match uri.get(..SCHEME.len()) {
        Some(scheme) if scheme.eq_ignore_ascii_case(SCHEME) => {
            let authority = &uri[SCHEME.len()..];
            authority.find('/').map_or("", |slash| &authority[slash..])
        }
        _ => uri,
    };
    if origin.starts_with('/') { origin } else { "/" }
}

fn parse_content_length(value: &[u8], max_body: usize) -> Result<usize, ParseError> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return Err(ParseError::ContentLength { value: shown(value) });
    }
    // Digits that do not fit a number are over any limit.
    let length = str::from_utf8(value).ok().and_then(|digits| digits.parse().ok());
    match length {
        Some(length) if length <= max_body => Ok(length),
        _ => Err(ParseError::PayloadTooLarge {
            length: shown(value),
            limit: max_body,
        }),
    }
}

/// RFC 9110 §12.5.3: `identity` is acceptable unless it, or a `*` that stands for it, has weight zero. An
/// empty list is refused, as the existing API does.
fn accepts_identity(value: &[u8]) -> bool {
    let mut identity = None;
    let mut any = None;
    for element in elements(value) {
        let mut parts = element.split(|&byte| byte == b';').map(<[u8]>::trim_ascii);
        let coding = parts.next().unwrap_or_default();
        let acceptable = !parts.any(is_zero_weight);
        if coding.eq_ignore_ascii_case(b"identity") {
            identity = Some(acceptable);
        } else if coding == b"*" {
            any = Some(acceptable);
        }
    }
    !value.is_empty() && identity.or(any).unwrap_or(true)
}

/// Whether a parameter is `q=0`, with any number of zero decimals.
fn is_zero_weight(parameter: &[u8]) -> bool {
    let weight = parameter
        .strip_prefix(b"q=")
        .or_else(|| parameter.strip_prefix(b"Q="));
    let decimals = weight.and_then(|weight| weight.strip_prefix(b"0"));
    decimals.is_some_and(|decimals| decimals.iter().all(|byte| matches!(byte, b'.' | b'0')))
}

/// The elements of a comma-separated list, without the white space around them.
fn elements(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|&byte| byte == b',').map(<[u8]>::trim_ascii)
}

/// Client text for an error message: the start of it.
fn shown(value: &[u8]) -> String {
    String::from_utf8_lossy(value).chars().take(SHOWN).collect()
}
