//! The limits of a server, as whoever creates it sets them.

use std::time::Duration;

/// The limits of a [`Server`](crate::Server).
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// The largest request body, in bytes. Default 51,200.
    pub max_body: usize,
    /// How many connections are served at a time. For one more, the one that has been idle for longest is closed;
    /// if none is idle, the new one is answered 503. Default 10.
    pub max_connections: usize,
    /// How long a client may pause in the middle of a request or of reading its answer. Default 30 s.
    pub timeout: Duration,
    /// How long a connection that the server closes goes on discarding what its client still sends. Closing
    /// with unread bytes would give the client a reset, perhaps before it has read its answer. Default 2 s.
    pub linger_timeout: Duration,
    /// How long a stopped server waits for the answers that are due. Default 5 s.
    pub stop_timeout: Duration,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            max_body: 51_200,
            max_connections: 10,
            timeout: Duration::from_secs(30),
            linger_timeout: Duration::from_secs(2),
            stop_timeout: Duration::from_secs(5),
        }
    }
}
