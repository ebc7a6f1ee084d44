//! The io loops: threads that own running devices ([`Lane`]) and feed them readiness events.
//!
//! Everything is edge-triggered, so a queue notification costs one `epoll_wait` and no read. The control thread and
//! the vCPU threads reach a loop by messages that carry their own reply; an idle loop sleeps without a time-out.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::thread::{self, JoinHandle};

use devices::virtio::{Job, Lane, LaneHost, LaneId, Watch};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::logger::{self, FATAL};
use crate::seccomp::{self, Filters};

/// Names a lane on its loop.
type Number = u32;
/// The number that no lane has: its events are messages.
const MESSAGES: Number = Number::MAX;
/// Events taken per `epoll_wait`.
const BATCH: usize = 32;

enum Message {
    Attach(Box<Lane>, SyncSender<Number>),
    Detach(Number, SyncSender<Box<Lane>>),
    Run(Number, Job),
    End,
}

/// The io loops of a machine. A lane goes to the loop that has the fewest at that moment, the first of several: so
/// devices spread, and so do the siblings of a device, which come one after the other.
pub struct IoLoops(Vec<IoLoop>);

impl IoLoops {
    /// Starts that many loops, at least one, on threads called `io 0`, `io 1` and so on, with these filters.
    pub fn spawn(count: u8, filters: &Filters) -> io::Result<Self> {
        let spawn = |index| IoLoop::spawn(&format!("io {index}"), filters.clone());
        Ok(Self((0..count.max(1)).map(spawn).collect::<io::Result<_>>()?))
    }

    /// The loop of a lane, and the lane's number there.
    fn find(&self, id: LaneId) -> (&IoLoop, Number) {
        let (place, number) = split(id);
        let io_loop = usize::try_from(place).ok().and_then(|place| self.0.get(place));
        (io_loop.expect("a slot names its own lane"), number)
    }
}

impl LaneHost for IoLoops {
    fn attach(&self, lane: Box<Lane>) -> LaneId {
        let loops = (0u32..).zip(&self.0);
        let (place, io_loop) = loops
            .min_by_key(|(_, io_loop)| io_loop.lanes.load(Ordering::Relaxed))
            .expect("there is a loop");
        io_loop.lanes.fetch_add(1, Ordering::Relaxed);
        join(place, io_loop.attach(lane))
    }

    fn detach(&self, id: LaneId) -> Box<Lane> {
        let (io_loop, number) = self.find(id);
        let lane = io_loop.detach(number);
        io_loop.lanes.fetch_sub(1, Ordering::Relaxed);
        lane
    }

    fn run(&self, id: LaneId, job: Job) {
        let (io_loop, number) = self.find(id);
        io_loop.send(Message::Run(number, job));
    }
}

/// A running io loop. Dropping it ends the loop and its lanes.
struct IoLoop {
    messages: Sender<Message>,
    wake: EventFd,
    thread: Option<JoinHandle<()>>,
    /// How many lanes it has; loose order, as it only guides where the next one goes.
    lanes: AtomicUsize,
}

impl IoLoop {
    fn spawn(name: &str, filters: Filters) -> io::Result<Self> {
        let (messages, inbox) = mpsc::channel();
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let epoll = Epoll::new()?;
        watch(&epoll, wake.as_raw_fd(), MESSAGES, 0)?;
        let mut worker = Worker {
            epoll,
            inbox,
            lanes: BTreeMap::new(),
            next: 0,
        };
        let builder = thread::Builder::new().name(name.into()).stack_size(256 << 10);
        let thread = Some(builder.spawn(move || {
            filters.confine_or_die(seccomp::Thread::Io);
            logger::limit_this_thread();
            worker.work();
        })?);
        Ok(Self {
            messages,
            wake,
            thread,
            lanes: AtomicUsize::new(0),
        })
    }

    fn attach(&self, lane: Box<Lane>) -> Number {
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(Message::Attach(lane, reply));
        answer.recv().expect("an io loop answers every message")
    }

    fn detach(&self, number: Number) -> Box<Lane> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(Message::Detach(number, reply));
        answer.recv().expect("an io loop answers every message")
    }

    fn send(&self, message: Message) {
        self.messages.send(message).expect("a loop ends with its owner");
        // Only a full counter refuses, and then the loop is awake already.
        let _ = self.wake.write(1);
    }
}

impl Drop for IoLoop {
    fn drop(&mut self) {
        self.send(Message::End);
        if let Some(thread) = self.thread.take() {
            // A panic in the thread has ended the process already.
            drop(thread.join());
        }
    }
}

struct Running {
    lane: Box<Lane>,
    /// What the loop watches for the lane, to be forgotten with it.
    fds: Vec<RawFd>,
}

struct Worker {
    epoll: Epoll,
    inbox: Receiver<Message>,
    lanes: BTreeMap<Number, Running>,
    next: Number,
}

impl Worker {
    fn work(&mut self) {
        let mut events = [EpollEvent::default(); BATCH];
        loop {
            let count = match self.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    // Nothing the guest does leads here: the descriptor is ours and the buffer is valid.
                    log::error!(target: FATAL, "an io loop cannot wait for events: {error}");
                    std::process::abort();
                }
            };
            for event in &events[..count] {
                let (id, token) = split(event.data());
                if id == MESSAGES {
                    if self.read_messages().is_break() {
                        return;
                    }
                } else if let Some(Running { lane, fds }) = self.lanes.get_mut(&id) {
                    // A lane that was detached earlier in this batch is no longer there.
                    lane.on_event(
                        token,
                        &LaneWatch {
                            epoll: &self.epoll,
                            id,
                            fds: fds.into(),
                        },
                    );
                }
            }
        }
    }

    fn read_messages(&mut self) -> ControlFlow<()> {
        while let Ok(message) = self.inbox.try_recv() {
            // Whoever sent a message waits for its reply, so none of these sends fails.
            match message {
                Message::Attach(lane, reply) => {
                    let _ = reply.send(self.attach(lane));
                }
                Message::Detach(id, reply) => {
                    let _ = reply.send(self.detach(id));
                }
                Message::Run(id, job) => {
                    let Running { lane, fds } = self.lanes.get_mut(&id).expect("a slot names its own lane");
                    let fds = fds.into();
                    job(
                        lane,
                        &LaneWatch {
                            epoll: &self.epoll,
                            id,
                            fds,
                        },
                    );
                }
                Message::End => return ControlFlow::Break(()),
            }
        }
        ControlFlow::Continue(())
    }

    fn attach(&mut self, mut lane: Box<Lane>) -> Number {
        // An id comes again only after all others, so that an event of a former lane cannot reach a later one.
        let mut id = self.next;
        while id == MESSAGES || self.lanes.contains_key(&id) {
            id = id.wrapping_add(1);
        }
        self.next = id.wrapping_add(1);
        let mut fds = Vec::new();
        lane.start(&LaneWatch {
            epoll: &self.epoll,
            id,
            fds: (&mut fds).into(),
        });
        self.lanes.insert(id, Running { lane, fds });
        id
    }

    fn detach(&mut self, id: Number) -> Box<Lane> {
        let Running { mut lane, fds } = self.lanes.remove(&id).expect("a slot names its own lane");
        for fd in fds {
            // A descriptor that the device has closed is gone from the set already.
            let _ = self
                .epoll
                .ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
        lane.reset();
        lane
    }
}

/// Registers descriptors for one lane.
struct LaneWatch<'a> {
    epoll: &'a Epoll,
    id: Number,
    fds: RefCell<&'a mut Vec<RawFd>>,
}

impl Watch for LaneWatch<'_> {
    fn add(&self, fd: RawFd, token: u32) -> io::Result<()> {
        watch(self.epoll, fd, self.id, token)?;
        self.fds.borrow_mut().push(fd);
        Ok(())
    }

    fn remove(&self, fd: RawFd) -> io::Result<()> {
        self.fds.borrow_mut().retain(|watched| *watched != fd);
        self.epoll
            .ctl(ControlOperation::Delete, fd, EpollEvent::default())
    }
}

fn watch(epoll: &Epoll, fd: RawFd, id: Number, token: u32) -> io::Result<()> {
    let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
    epoll.ctl(
        ControlOperation::Add,
        fd,
        EpollEvent::new(events, join(id, token)),
    )
}

/// Two numbers as one: a lane's and a token, or a loop's and a lane's.
fn join(high: u32, low: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

fn split(both: u64) -> (u32, u32) {
    let [l0, l1, l2, l3, h0, h1, h2, h3] = both.to_le_bytes();
    (
        u32::from_le_bytes([h0, h1, h2, h3]),
        u32::from_le_bytes([l0, l1, l2, l3]),
    )
}

#[cfg(test)]
mod tests;
