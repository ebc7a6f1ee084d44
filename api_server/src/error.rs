//! What can go wrong: with a request's bytes ([`ParseError`]) and with the server itself ([`ServerError`]).

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why bytes are not a request. The text becomes the `fault_message` of a 400.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ParseError {
    /// The request line or a header breaks the grammar of RFC 9112.
    #[error("Malformed HTTP request: {reason}.")]
    Syntax {
        /// What is wrong where.
        reason: &'static str,
    },
    /// A well-formed method that the API has no use for.
    #[error("Unsupported HTTP method `{method}`: use GET, PUT, PATCH or DELETE.")]
    Method {
        /// The method, shortened for display.
        method: String,
    },
    /// Neither HTTP/1.0 nor HTTP/1.1.
    #[error("Unsupported HTTP version: use HTTP/1.1 or HTTP/1.0.")]
    Version,
    /// Request line and headers do not end within the limit.
    #[error("Request line and headers exceed the limit of {limit} bytes.")]
    HeadTooLarge {
        /// The limit in bytes.
        limit: usize,
    },
    /// More header lines than the limit.
    #[error("The request has more than {limit} headers.")]
    TooManyHeaders {
        /// The limit in header lines.
        limit: usize,
    },
    /// `Content-Length` is not a plain decimal number.
    #[error("Invalid Content-Length `{value}`: it must be a decimal number of bytes.")]
    ContentLength {
        /// The header's value, shortened for display.
        value: String,
    },
    /// More than one `Content-Length`.
    #[error("The request has more than one Content-Length header.")]
    DuplicateContentLength,
    /// The announced body is larger than the server takes.
    #[error(
        "The request body of {length} bytes exceeds the limit of {limit} bytes (--http-api-max-payload-size)."
    )]
    PayloadTooLarge {
        /// The announced length in bytes, shortened for display.
        length: String,
        /// The limit in bytes.
        limit: usize,
    },
    /// A `Transfer-Encoding`, of which this server knows none.
    #[error("Transfer-Encoding is not supported: send the body with a Content-Length.")]
    TransferEncoding,
    /// The client refuses the only encoding that this server sends.
    #[error(
        "Invalid Accept-Encoding `{value}`: answers are sent unencoded, so `identity` must be acceptable."
    )]
    AcceptEncoding {
        /// The header's value, shortened for display.
        value: String,
    },
}

/// Why the server cannot start or go on.
#[derive(Debug, Error)]
pub enum ServerError {
    /// The path is empty or holds a zero byte.
    #[error("API socket path {path:?} is not a file name")]
    PathInvalid {
        /// The path as given.
        path: PathBuf,
    },
    /// The path does not fit the kernel's socket address.
    #[error(
        "API socket path {path:?} has {length} bytes, but a unix socket path may have {max}; choose a shorter one"
    )]
    PathTooLong {
        /// The path as given.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
        /// The kernel's limit in bytes.
        max: usize,
    },
    /// Something exists at the path already.
    #[error(
        "API socket path {path:?} is in use; stop the process that serves it, remove the file if there is none, \
         or choose another path"
    )]
    PathInUse {
        /// The path as given.
        path: PathBuf,
    },
    /// The directory of the path does not exist.
    #[error(
        "cannot create API socket {path:?}: {directory:?} is not an existing directory; make it, or choose another path"
    )]
    NoDirectory {
        /// The path as given.
        path: PathBuf,
        /// Its directory.
        directory: PathBuf,
    },
    /// The directory of the path may not be written.
    #[error("no permission to create API socket {path:?}; check the owner and mode of its directory")]
    Permission {
        /// The path as given.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Any other failure to create the socket.
    #[error("cannot create API socket {path:?}")]
    Bind {
        /// The path as given.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A call of the event loop failed that never fails in a healthy process.
    #[error("API event loop: {operation} failed")]
    EventLoop {
        /// The system call.
        operation: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}
