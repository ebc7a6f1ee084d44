//! Requests and answers, and the bytes of an answer.
//!
//! Built by the parser and by the handler, on any thread; plain data.

use std::fmt;
use std::io::Write;

/// The media type of every API body but the metrics text.
const JSON: &str = "application/json";

/// The interim answer to `Expect: 100-continue`.
pub(crate) const CONTINUE: &[u8] =
    b"HTTP/1.1 100 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n";

/// The methods of the API. Any other one is refused by the parser.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    /// Reads a resource.
    Get,
    /// Creates or replaces a resource.
    Put,
    /// Changes parts of a resource.
    Patch,
    /// Removes a resource.
    Delete,
}

impl Method {
    /// The method that a request line names, in upper case as RFC 9110 §9.1 has it; `None` for any other one.
    pub fn from_token(token: &str) -> Option<Self> {
        match token {
            "GET" => Some(Self::Get),
            "PUT" => Some(Self::Put),
            "PATCH" => Some(Self::Patch),
            "DELETE" => Some(Self::Delete),
            _ => None,
        }
    }

    /// The method as it stands in a request line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Put => "PUT",
            Self::Patch => "PATCH",
            Self::Delete => "DELETE",
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One request, complete with its body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub method: Method,
    /// The resource: begins with `/`, is neither percent-decoded nor split at `?`.
    pub path: String,
    /// The body; `None` when its length is zero.
    pub body: Option<Vec<u8>>,
}

/// One answer. The constructors keep status and body consistent: only 204 has no body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    status: u16,
    body: Option<Vec<u8>>,
    content_type: &'static str,
    deprecation: bool,
}

impl Response {
    /// 204: done, with nothing to say.
    pub fn no_content() -> Self {
        Self {
            status: 204,
            body: None,
            content_type: JSON,
            deprecation: false,
        }
    }

    /// 200 with a body that is JSON text already.
    pub fn json(body: impl Into<Vec<u8>>) -> Self {
        Self::with_content_type(JSON, body)
    }

    /// 200 with a body of another media type, such as Prometheus text.
    pub fn with_content_type(content_type: &'static str, body: impl Into<Vec<u8>>) -> Self {
        Self {
            status: 200,
            body: Some(body.into()),
            content_type,
            deprecation: false,
        }
    }

    /// A failure: `{"fault_message":"<message>"}` with an HTTP status from 400 to 599.
    pub fn fault(status: u16, message: &str) -> Self {
        let body = serde_json::json!({ "fault_message": message }).to_string();
        Self {
            status,
            body: Some(body.into_bytes()),
            content_type: JSON,
            deprecation: false,
        }
    }

    /// The same answer with `Deprecation: true`, for a request that used a deprecated field or path.
    pub fn deprecated(self) -> Self {
        Self {
            deprecation: true,
            ..self
        }
    }

    /// The HTTP status code.
    pub fn status(&self) -> u16 {
        self.status
    }

    /// The body; `None` for 204.
    pub fn body(&self) -> Option<&[u8]> {
        self.body.as_deref()
    }

    /// Whether the answer says `Deprecation: true`.
    pub fn is_deprecated(&self) -> bool {
        self.deprecation
    }

    /// The head of an answer whose body ends with the connection.
    pub(crate) fn stream_head(content_type: &str) -> Vec<u8> {
        format!(
            "HTTP/1.1 200 \r\nServer: Firecracker API\r\nConnection: close\r\nContent-Type: {content_type}\r\n\r\n"
        )
        .into_bytes()
    }

    /// The bytes on the wire. Clients compare them, so the order of the headers and the status line without a
    /// reason phrase are part of the contract.
    pub(crate) fn to_bytes(&self, close: bool) -> Vec<u8> {
        let connection = if close { "close" } else { "keep-alive" };
        let mut bytes = format!(
            "HTTP/1.1 {} \r\nServer: Firecracker API\r\nConnection: {connection}\r\n",
            self.status
        )
        .into_bytes();
        if self.deprecation {
            bytes.extend_from_slice(b"Deprecation: true\r\n");
        }
        let body = self.body.as_deref().unwrap_or_default();
        if self.body.is_some() {
            write!(
                bytes,
                "Content-Type: {}\r\nContent-Length: {}\r\n",
                self.content_type,
                body.len()
            )
            .expect("writing to a Vec does not fail");
        }
        bytes.extend_from_slice(b"\r\n");
        bytes.extend_from_slice(body);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(response: Response, close: bool) -> String {
        String::from_utf8(response.to_bytes(close)).unwrap()
    }

    #[test]
    fn no_content_has_neither_type_nor_length() {
        assert_eq!(
            text(Response::no_content(), false),
            "HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"
        );
    }

    #[test]
    fn body_comes_with_type_and_length_in_that_order() {
        assert_eq!(
            text(Response::json("{\"a\":1}"), false),
            "HTTP/1.1 200 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\
             Content-Type: application/json\r\nContent-Length: 7\r\n\r\n{\"a\":1}"
        );
    }

    #[test]
    fn deprecation_stands_between_connection_and_type() {
        assert_eq!(
            text(Response::fault(400, "no").deprecated(), true),
            "HTTP/1.1 400 \r\nServer: Firecracker API\r\nConnection: close\r\nDeprecation: true\r\n\
             Content-Type: application/json\r\nContent-Length: 22\r\n\r\n{\"fault_message\":\"no\"}"
        );
    }

    #[test]
    fn empty_body_still_says_its_length() {
        assert!(
            text(Response::with_content_type("text/plain", ""), false)
                .ends_with("Content-Type: text/plain\r\nContent-Length: 0\r\n\r\n")
        );
    }

    #[test]
    fn fault_message_is_escaped_json() {
        let response = Response::fault(400, "a \"b\"\n\u{1}");

        let value: serde_json::Value = serde_json::from_slice(response.body().unwrap()).unwrap();

        assert_eq!(value["fault_message"], "a \"b\"\n\u{1}");
    }

    #[test]
    fn methods_are_case_sensitive() {
        assert_eq!(Method::from_token("PATCH"), Some(Method::Patch));
        assert_eq!(Method::from_token("get"), None);
    }
}
