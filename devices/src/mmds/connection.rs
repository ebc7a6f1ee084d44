//! [`Connection`]: HTTP on one TCP connection of a guest.

use std::net::Ipv4Addr;
use std::time::Duration;

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp;

use super::Mmds;
use super::http::{self, MAX_HEAD};

/// Where the service listens.
pub(super) const HTTP_PORT: u16 = 80;
/// What a guest may send ahead.
pub(super) const RECEIVE_BUFFER: usize = 4096;
const SEND_BUFFER: usize = 16 << 10;
/// How long a guest may be silent before its connection is forgotten.
const PATIENCE: smoltcp::time::Duration = smoltcp::time::Duration::from_secs(60);

/// A connection, which has a socket of its own.
pub(super) struct Connection {
    pub(super) socket: SocketHandle,
    pub(super) peer: (Ipv4Addr, u16),
    pub(super) mac: [u8; 6],
    pub(super) last_heard: Duration,
    /// What came and was not looked at yet, up to a whole head.
    input: Vec<u8>,
    /// Bytes of a request's body that are still to be thrown away.
    body: usize,
    /// The response that is being sent.
    response: Vec<u8>,
    sent: usize,
    /// It ends behind this response.
    close: bool,
}

impl Connection {
    pub(super) fn new(socket: SocketHandle, peer: (Ipv4Addr, u16), mac: [u8; 6], now: Duration) -> Self {
        Self {
            socket,
            peer,
            mac,
            last_heard: now,
            input: Vec::new(),
            body: 0,
            response: Vec::new(),
            sent: 0,
            close: false,
        }
    }

    /// Moves what can be moved: input to requests, responses to output. One request is answered at a time, and what
    /// comes in the meantime stays in the socket, whose window then holds the guest back.
    pub(super) fn serve(&mut self, socket: &mut tcp::Socket<'_>, mmds: &Mmds, now: Duration) {
        loop {
            self.send(socket);
            if !self.response.is_empty() {
                return;
            }
            if self.close {
                return socket.close();
            }
            let received = self.fetch(socket);
            match http::answer(mmds, &self.input, now) {
                Some(answer) => self.take(answer),
                None if received => {}
                None => break,
            }
        }
        if !socket.may_recv() && socket.may_send() {
            // The guest sends no more, and has all its answers.
            socket.close();
        }
    }

    fn send(&mut self, socket: &mut tcp::Socket<'_>) {
        // Refused on a connection that is not open, or no more.
        let room = socket.send_slice(&self.response[self.sent..]);
        self.sent += room.unwrap_or(0);
        if self.sent == self.response.len() {
            self.response = Vec::new();
            self.sent = 0;
        }
    }

    /// Takes input as long as a head may need it; tells whether there was some.
    fn fetch(&mut self, socket: &mut tcp::Socket<'_>) -> bool {
        let room = MAX_HEAD - self.input.len();
        let (input, body) = (&mut self.input, &mut self.body);
        let taken = socket.recv(|data| {
            let skipped = data.len().min(*body);
            *body -= skipped;
            let fresh = data.len().min(skipped + room);
            input.extend_from_slice(&data[skipped..fresh]);
            (fresh, fresh)
        });
        taken.is_ok_and(|count| count > 0)
    }

    fn take(&mut self, answer: http::Answer) {
        let came = (answer.head + answer.body).min(self.input.len());
        self.input.drain(..came);
        self.body = answer.head + answer.body - came;
        self.response = answer.bytes;
        self.close = answer.close;
    }
}

/// A socket that waits for the first frame of its connection.
pub(super) fn listener(address: Ipv4Addr) -> tcp::Socket<'static> {
    let buffer = |len| tcp::SocketBuffer::new(vec![0; len]);
    let mut socket = tcp::Socket::new(buffer(RECEIVE_BUFFER), buffer(SEND_BUFFER));
    socket.set_timeout(Some(PATIENCE));
    // A request is a few segments and its answer follows at once, so neither kind of waiting saves a frame.
    socket.set_ack_delay(None);
    socket.set_nagle_enabled(false);
    let listening = socket.listen((address, HTTP_PORT));
    listening.expect("a new socket can listen, and the port is not zero");
    socket
}
