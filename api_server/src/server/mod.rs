//! The server: one thread, one epoll loop over the listener, the connections and a wake-up from other
//! threads.
//!
//! The monitor creates it on its main thread, so that a bad path is reported before anything else happens,
//! and runs it on the `api` thread. Per request that comes in one piece the loop makes about ten system
//! calls; idle, it makes none.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::config::ServerConfig;
use crate::connection::{Connection, Step};
use crate::error::ServerError;
use crate::handler::{Handler, Message, Reply, Responder, Wake};
use crate::message::Response;
use crate::poller::Poller;
use crate::socket::SocketFile;

/// Tokens: connections count up from `FIRST_CONNECTION` and never reuse one, so that a late event or answer
/// for a closed connection finds nothing.
const LISTENER: u64 = 0;
const WAKE: u64 = 1;
const FIRST_CONNECTION: u64 = 2;

/// How long to wait before accepting again after the process ran out of file descriptors or memory.
const ACCEPT_RETRY: Duration = Duration::from_secs(1);

/// Stops a [`Server`] from any thread.
#[derive(Clone, Debug)]
pub struct Stopper {
    wake: Arc<Wake>,
}

impl Stopper {
    /// Makes [`Server::run`] return: no request is taken any more, answers that are due are waited for (up to
    /// [`ServerConfig::stop_timeout`]) and written. Returns at once.
    pub fn stop(&self) {
        self.wake.request_stop();
    }
}

/// An HTTP server on a unix stream socket. See the [crate documentation](crate) for its limits.
#[derive(Debug)]
pub struct Server {
    config: ServerConfig,
    poller: Poller,
    listener: UnixListener,
    connections: BTreeMap<u64, Client>,
    /// Connections that ended while their request was with the handler. They keep their places until its answer
    /// comes: the request takes memory until then.
    abandoned: BTreeSet<u64>,
    next_token: u64,
    /// How often a connection has done something: tells which of them has been idle for longest.
    turns: u64,
    /// When the listener, which is not polled meanwhile, gets its next chance.
    accept_again: Option<Instant>,
    /// Set once stopping has begun: when to give up.
    stop_by: Option<Instant>,
    stopping: bool,
    wake: Arc<Wake>,
    replies: Receiver<Reply>,
    reply_sender: Sender<Reply>,
    /// Removed when the server is dropped; `None` if the socket is the caller's.
    socket: Option<SocketFile>,
}

/// A connection and what epoll knows about it.
#[derive(Debug)]
struct Client {
    connection: Connection,
    registered: EventSet,
    /// The server's count of turns when this connection had its last one.
    last_turn: u64,
}

impl Server {
    /// A server on a new socket at `path`. The socket exists, and queues clients, from now until the server
    /// is dropped.
    ///
    /// # Errors
    /// As [`SocketFile::bind`] and [`Server::from_listener`].
    pub fn bind(path: &Path, config: ServerConfig) -> Result<Self, ServerError> {
        let (listener, socket) = SocketFile::bind(path)?;
        let mut server = Self::from_listener(listener, config)?;
        server.socket = Some(socket);
        Ok(server)
    }

    /// A server on a listening socket that the caller made. It does not remove the socket's file.
    ///
    /// # Errors
    /// [`ServerError::EventLoop`] if the process is out of file descriptors or memory.
    pub fn from_listener(listener: UnixListener, config: ServerConfig) -> Result<Self, ServerError> {
        let failed = |operation| move |source| ServerError::EventLoop { operation, source };
        listener
            .set_nonblocking(true)
            .map_err(failed("set_nonblocking"))?;
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(failed("eventfd"))?;
        let poller = Poller::new()?;
        poller.add(&listener, LISTENER, EventSet::IN)?;
        poller.add(&event, WAKE, EventSet::IN)?;
        let (reply_sender, replies) = mpsc::channel();
        Ok(Self {
            config,
            poller,
            listener,
            connections: BTreeMap::new(),
            abandoned: BTreeSet::new(),
            next_token: FIRST_CONNECTION,
            turns: 0,
            accept_again: None,
            stop_by: None,
            stopping: false,
            wake: Arc::new(Wake::new(event)),
            replies,
            reply_sender,
            socket: None,
        })
    }

    /// The socket that [`Server::bind`] made.
    pub fn socket(&self) -> Option<&SocketFile> {
        self.socket.as_ref()
    }

    /// A handle that stops this server.
    pub fn stopper(&self) -> Stopper {
        Stopper {
            wake: Arc::clone(&self.wake),
        }
    }

    /// Serves until [`Stopper::stop`] is called, on the calling thread. A stopped server stays stopped.
    ///
    /// # Errors
    /// [`ServerError::EventLoop`] if epoll itself fails; what clients do is no error.
    pub fn run(&mut self, handler: &mut dyn Handler) -> Result<(), ServerError> {
        while !self.is_finished() {
            for (token, events) in self.poller.wait(self.next_deadline())? {
                match token {
                    LISTENER => self.accept(handler)?,
                    WAKE => self.woken(handler)?,
                    _ => self.drive(token, handler, |connection| connection.ready(events)),
                }
            }
            self.expire(handler)?;
        }
        self.connections.clear();
        Ok(())
    }

    fn is_finished(&self) -> bool {
        let owed = self
            .connections
            .values()
            .any(|client| client.connection.owes_answer());
        let overdue = self.stop_by.is_some_and(|deadline| deadline <= Instant::now());
        self.stopping && (!owed || overdue)
    }

    /// Lets a connection do its next step and sees to what follows from it.
    fn drive(&mut self, token: u64, handler: &mut dyn Handler, act: impl FnOnce(&mut Connection) -> Step) {
        let Some(client) = self.connections.get_mut(&token) else {
            return;
        };
        self.turns += 1;
        client.last_turn = self.turns;
        match act(&mut client.connection) {
            Step::Close => self.close(token),
            Step::Wait => self.update_interest(token),
            Step::Handle(request) => {
                self.update_interest(token);
                let responder = Responder::new(token, self.reply_sender.clone(), Arc::clone(&self.wake));
                handler.handle(request, responder);
            }
        }
    }

    fn update_interest(&mut self, token: u64) {
        let Some(client) = self.connections.get_mut(&token) else {
            return;
        };
        let interest = client.connection.interest();
        if interest == client.registered {
            return;
        }
        client.registered = interest;
        if let Err(error) = self.poller.modify(&client.connection, token, interest) {
            log::warn!("Closing an API connection: {error}");
            self.close(token);
        }
    }

    fn close(&mut self, token: u64) {
        let closed = self.connections.remove(&token);
        if closed.is_some_and(|client| client.connection.is_handled()) {
            self.abandoned.insert(token);
        }
    }

    /// Brings an answer, or a part of one, to its connection.
    fn deliver(&mut self, reply: Reply, handler: &mut dyn Handler) {
        let Reply { connection, message } = reply;
        if !self.abandoned.remove(&connection) {
            self.drive(connection, handler, |connection| connection.answer(message));
        } else if let Message::Stream { backlog, .. } = message {
            backlog.close();
        }
    }

    fn accept(&mut self, handler: &mut dyn Handler) -> Result<(), ServerError> {
        if self.stopping {
            return Ok(());
        }
        match self.listener.accept() {
            Ok((stream, _)) => self.admit(stream, handler),
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionAborted
                ) => {}
            Err(error) => {
                // The listener stays readable: polling it further would be a busy loop.
                log::warn!("Cannot accept an API connection, trying again in {ACCEPT_RETRY:?}: {error}");
                self.poller.remove(&self.listener)?;
                self.accept_again = Some(Instant::now() + ACCEPT_RETRY);
            }
        }
        Ok(())
    }

    fn admit(&mut self, stream: UnixStream, handler: &mut dyn Handler) {
        if let Err(error) = stream.set_nonblocking(true) {
            log::warn!("Closing an API connection: {error}");
            return;
        }
        self.make_room(handler);
        let limit = self.config.max_connections;
        // Those that are leaving have a limit of their own, or clients could pile them up.
        let has_room = self.connections.len() + self.abandoned.len() < limit.saturating_mul(2);
        let mut connection = Connection::new(stream, &self.config);
        if self.served() >= limit || !has_room {
            let message =
                format!("Too many open connections: this server takes {limit}. Close one and try again.");
            let step = connection.refuse(&Response::fault(503, &message));
            if matches!(step, Step::Close) || !has_room {
                return;
            }
        }
        self.register(connection);
    }

    /// If all places are taken, closes the connection that has been idle for longest.
    fn make_room(&mut self, handler: &mut dyn Handler) {
        while self.served() >= self.config.max_connections {
            let Some(token) = self.longest_idle() else {
                return;
            };
            // Its next request may be in the socket already: it is taken, and the connection not idle any more.
            self.drive(token, handler, |connection| connection.ready(EventSet::IN));
            if self.is_idle(token) {
                self.close(token);
            }
        }
    }

    /// How many places are taken.
    fn served(&self) -> usize {
        let clients = self.connections.values();
        let staying = clients.filter(|client| !client.connection.is_leaving());
        staying.count() + self.abandoned.len()
    }

    fn longest_idle(&self) -> Option<u64> {
        let clients = self.connections.iter();
        let idle = clients.filter(|(_, client)| client.connection.is_idle());
        idle.min_by_key(|(_, client)| client.last_turn)
            .map(|(token, _)| *token)
    }

    fn is_idle(&self, token: u64) -> bool {
        let client = self.connections.get(&token);
        client.is_some_and(|client| client.connection.is_idle())
    }

    fn register(&mut self, connection: Connection) {
        let token = self.next_token;
        self.next_token += 1;
        self.turns += 1;
        let registered = connection.interest();
        match self.poller.add(&connection, token, registered) {
            Ok(()) => {
                self.connections.insert(
                    token,
                    Client {
                        connection,
                        registered,
                        last_turn: self.turns,
                    },
                );
            }
            Err(error) => log::warn!("Closing an API connection: {error}"),
        }
    }

    /// Another thread has sent answers or a stop request.
    fn woken(&mut self, handler: &mut dyn Handler) -> Result<(), ServerError> {
        // Reset before looking, so that what comes later wakes again. Failure means that the counter is zero
        // already.
        let _ = self.wake.event.read();
        // What was sent before the request to stop is still written, the last words of streams above all.
        let stop = self.wake.stop_requested() && !self.stopping;
        while let Ok(reply) = self.replies.try_recv() {
            self.deliver(reply, handler);
        }
        if stop {
            self.begin_stop()?;
        }
        Ok(())
    }

    fn begin_stop(&mut self) -> Result<(), ServerError> {
        self.stopping = true;
        self.stop_by = Instant::now().checked_add(self.config.stop_timeout);
        if self.accept_again.take().is_none() {
            self.poller.remove(&self.listener)?;
        }
        self.connections.retain(|_, client| client.connection.finish());
        Ok(())
    }

    fn next_deadline(&self) -> Option<Instant> {
        let connections = self
            .connections
            .values()
            .filter_map(|client| client.connection.deadline());
        connections.chain(self.accept_again).chain(self.stop_by).min()
    }

    /// Sees to every deadline that has passed.
    fn expire(&mut self, handler: &mut dyn Handler) -> Result<(), ServerError> {
        if self.next_deadline().is_none() {
            return Ok(());
        }
        let now = Instant::now();
        let due = |deadline: Option<Instant>| deadline.is_some_and(|deadline| deadline <= now);
        let expired: Vec<u64> = self
            .connections
            .iter()
            .filter(|(_, client)| due(client.connection.deadline()))
            .map(|(token, _)| *token)
            .collect();
        for token in expired {
            self.drive(token, handler, Connection::expire);
        }
        if due(self.accept_again) {
            self.accept_again = None;
            self.poller.add(&self.listener, LISTENER, EventSet::IN)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
