//! HTTP/1.1 over a unix stream socket, for a REST API of small JSON bodies.
//!
//! This crate frames bytes into requests and answers into bytes; it knows neither routes nor VMs. The monitor
//! runs one [`Server`] on its `api` thread and gives it a [`Handler`]. An answer travels back through the
//! [`Responder`] that comes with its request, from any thread and at any later time, while the other
//! connections go on being served.
//!
//! ```no_run
//! use api_server::{Request, Responder, Response, Server, ServerConfig};
//! # fn main() -> Result<(), api_server::ServerError> {
//! let mut server = Server::bind("/run/mayfly.socket".as_ref(), ServerConfig::default())?;
//! server.run(&mut |request: Request, responder: Responder| {
//!     responder.send(match request.path.as_str() {
//!         "/version" => Response::json(r#"{"firecracker_version":"1.16.1"}"#),
//!         _ => Response::fault(400, "No such resource."),
//!     });
//! })
//! # }
//! ```
//!
//! # Limits and time-outs
//!
//! * Ten connections at a time ([`ServerConfig::max_connections`]). For one more, the one that has been idle for
//!   longest is closed, so that clients that say nothing cannot keep others out. Idle is a connection of whose next
//!   request no byte has come, and that is owed no answer. If none is idle, the new one is answered 503 and closed.
//! * 8 KiB for a request's head, 64 headers, and [`ServerConfig::max_body`] bytes of body.
//! * One request per connection is with the handler at a time, and nothing more is read until its answer is
//!   written, so that memory is bounded however fast a client sends. Pipelined requests wait in the socket.
//!   A client that hangs up meanwhile keeps its place among the connections until then: its request is not gone.
//! * A client that stops in the middle of a request, or does not read its answer, is closed after
//!   [`ServerConfig::timeout`]; one that does not read a stream is not. A connection with nothing in flight may stay
//!   open until its place is needed, and a handler may take as long as it likes. With nothing in flight no timer is
//!   armed: an idle server does not wake up.
//!
//! # Streams
//!
//! An answer can be a [`Stream`], whose body has no length and ends with its connection. Such a connection counts
//! among the others for as long as it lasts. [`STREAM_BACKLOG`] bounds what waits for a client that reads slowly; what
//! is beyond is refused to the sender, which never waits. A stopped server closes streams at once, after what the
//! client's socket takes.
//!
//! # Errors on the wire
//!
//! Whatever cannot be parsed is answered 400 with `{"fault_message":"..."}`, after the answers to the
//! requests before it. The connection is then closed, since the start of the next request is unknown. It
//! lingers until the client has stopped sending (for [`ServerConfig::linger_timeout`] at most), so that the
//! client reads the answer and not a reset.
#![forbid(unsafe_code)]

mod config;
mod connection;
mod error;
mod handler;
mod head;
pub mod message;
pub mod parser;
mod poller;
mod server;
mod socket;
mod stream;

pub use config::ServerConfig;
pub use error::{ParseError, ServerError};
pub use handler::{Handler, Responder};
pub use message::{Method, Request, Response};
pub use server::{Server, Stopper};
pub use socket::SocketFile;
pub use stream::{STREAM_BACKLOG, Stream, StreamError};
