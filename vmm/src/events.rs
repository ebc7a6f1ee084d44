//! The events of the machine, as `GET /events` streams them: one JSON object per line.
//!
//! Whoever sees something happen publishes it, on any thread; that never waits, and costs a look at a number while
//! nobody listens. A subscriber that does not keep up loses events, and then is told how many.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api_server::{Stream, StreamError};
use serde::Serialize;

use crate::clock;

/// Streams at a time. Connections are few, and requests need some too.
pub const MAX_SUBSCRIBERS: usize = 4;
/// The media type of a stream of events.
pub const CONTENT_TYPE: &str = "application/x-ndjson";

/// What happened.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event<'a> {
    /// The first event of a stream: how things are.
    Subscribed {
        /// The instance.
        id: &'a str,
        /// As in `GET /`.
        state: &'a str,
    },
    /// The machine runs for the first time.
    Started,
    /// The guest stands still.
    Paused,
    /// The guest goes on.
    Resumed,
    /// A device was attached to the running machine.
    DeviceAttached {
        /// Its kind.
        kind: &'a str,
        /// Its id.
        id: &'a str,
    },
    /// A device is gone.
    DeviceDetached {
        /// Its kind.
        kind: &'a str,
        /// Its id.
        id: &'a str,
    },
    /// A device was changed over the API.
    DeviceUpdated {
        /// Its kind.
        kind: &'a str,
        /// Its id.
        id: &'a str,
    },
    /// A device has stopped working until its driver resets it.
    DeviceNeedsReset {
        /// Its kind.
        kind: &'a str,
        /// Its id.
        id: &'a str,
        /// What went wrong.
        reason: &'a str,
    },
    /// The guest has said that it is up.
    BootTimer {
        /// Time since the start of the process.
        boot_us: u64,
    },
    /// The guest has reset the machine, which ends it.
    GuestReset,
    /// The guest has powered the machine off.
    GuestPowerOff,
    /// A vCPU cannot go on.
    VcpuFailed,
    /// Events were lost because this subscriber did not keep up.
    Lagged {
        /// How many.
        dropped: u64,
    },
    /// The last event: the process ends.
    Exit {
        /// With this exit code,
        #[serde(skip_serializing_if = "Option::is_none")]
        code: Option<u8>,
        /// or by this signal.
        #[serde(skip_serializing_if = "Option::is_none")]
        signal: Option<i32>,
    },
}

#[derive(Serialize)]
struct Line<'a> {
    timestamp_us: u64,
    #[serde(flatten)]
    event: &'a Event<'a>,
}

impl Event<'_> {
    fn line(&self) -> Vec<u8> {
        let line = Line {
            timestamp_us: clock::unix_us(),
            event: self,
        };
        let mut bytes = serde_json::to_vec(&line).expect("texts and numbers");
        bytes.push(b'\n');
        bytes
    }
}

/// Where a subscriber's lines go.
trait Outlet: Send {
    fn send(&self, line: &[u8]) -> Result<(), StreamError>;
    fn is_closed(&self) -> bool;
}

impl Outlet for Stream {
    fn send(&self, line: &[u8]) -> Result<(), StreamError> {
        Stream::send(self, line)
    }

    fn is_closed(&self) -> bool {
        Stream::is_closed(self)
    }
}

struct Subscriber {
    outlet: Box<dyn Outlet>,
    /// Events that found no room since the last one that did.
    dropped: u64,
}

impl Subscriber {
    /// False once nobody listens any more.
    fn send(&mut self, line: &[u8]) -> bool {
        let lagged = (self.dropped > 0).then(|| {
            Event::Lagged {
                dropped: self.dropped,
            }
            .line()
        });
        let text = lagged.map_or_else(|| line.to_vec(), |lagged| [&lagged, line].concat());
        match self.outlet.send(&text) {
            Ok(()) => self.dropped = 0,
            Err(StreamError::Full) => self.dropped += 1,
            Err(StreamError::Closed) => return false,
        }
        true
    }
}

#[derive(Default)]
struct Bus {
    subscribers: Mutex<Vec<Subscriber>>,
    /// How many there are, to be read without the lock.
    count: AtomicUsize,
}

/// The way to all subscribers; clones lead to the same ones.
#[derive(Clone, Default)]
pub struct EventBus(Arc<Bus>);

impl fmt::Debug for EventBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.0.count.load(Ordering::Relaxed);
        write!(f, "EventBus({count} subscribers)")
    }
}

impl EventBus {
    /// Tells every subscriber.
    pub fn publish(&self, event: &Event<'_>) {
        if self.0.count.load(Ordering::Acquire) == 0 {
            return;
        }
        let line = event.line();
        let mut subscribers = self.lock();
        subscribers.retain_mut(|subscriber| subscriber.send(&line));
        self.0.count.store(subscribers.len(), Ordering::Release);
    }

    /// Whether one more subscriber is welcome.
    pub fn has_room(&self) -> bool {
        let mut subscribers = self.lock();
        subscribers.retain(|subscriber| !subscriber.outlet.is_closed());
        subscribers.len() < MAX_SUBSCRIBERS
    }

    /// Sends all events to `stream` from now on, `first` before them.
    pub fn subscribe(&self, stream: Stream, first: &Event<'_>) {
        self.add(Box::new(stream), first);
    }

    fn add(&self, outlet: Box<dyn Outlet>, first: &Event<'_>) {
        let mut subscriber = Subscriber { outlet, dropped: 0 };
        let mut subscribers = self.lock();
        if subscriber.send(&first.line()) {
            subscribers.push(subscriber);
        }
        self.0.count.store(subscribers.len(), Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Subscriber>> {
        self.0.subscribers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use serde_json::{Value, json};

    use super::*;

    /// Takes so many lines at a time.
    #[derive(Clone, Default)]
    struct Fake {
        lines: Arc<Mutex<Vec<Value>>>,
        room: Arc<AtomicUsize>,
        closed: Arc<AtomicBool>,
    }

    impl Fake {
        fn with_room(room: usize) -> Self {
            let fake = Self::default();
            fake.room.store(room, Ordering::Relaxed);
            fake
        }

        /// The lines so far, without their times.
        fn take(&self) -> Vec<Value> {
            std::mem::take(&mut self.lines.lock().unwrap())
        }
    }

    impl Outlet for Fake {
        fn send(&self, text: &[u8]) -> Result<(), StreamError> {
            if self.is_closed() {
                return Err(StreamError::Closed);
            }
            let room = self.room.load(Ordering::Relaxed);
            self.room
                .store(room.checked_sub(1).ok_or(StreamError::Full)?, Ordering::Relaxed);
            for line in std::str::from_utf8(text).unwrap().lines() {
                let mut line: Value = serde_json::from_str(line).unwrap();
                let time = line.as_object_mut().unwrap().remove("timestamp_us");
                assert!(time.unwrap().as_u64() > Some(1_700_000_000_000_000));
                self.lines.lock().unwrap().push(line);
            }
            Ok(())
        }

        fn is_closed(&self) -> bool {
            self.closed.load(Ordering::Relaxed)
        }
    }

    fn hello() -> Event<'static> {
        Event::Subscribed {
            id: "vm",
            state: "Running",
        }
    }

    #[test]
    fn every_subscriber_gets_the_state_and_then_what_happens() {
        let (events, one, two) = (EventBus::default(), Fake::with_room(9), Fake::with_room(9));
        events.add(Box::new(one.clone()), &hello());
        events.publish(&Event::Paused);
        events.add(Box::new(two.clone()), &hello());
        events.publish(&Event::DeviceNeedsReset {
            kind: "block",
            id: "root",
            reason: "\"broken\"\n",
        });
        let hello = json!({"event": "subscribed", "id": "vm", "state": "Running"});
        let broken =
            json!({"event": "device_needs_reset", "kind": "block", "id": "root", "reason": "\"broken\"\n"});
        assert_eq!(
            one.take(),
            [hello.clone(), json!({"event": "paused"}), broken.clone()]
        );
        assert_eq!(two.take(), [hello, broken]);
    }

    #[test]
    fn a_slow_subscriber_is_told_how_much_it_missed_and_others_miss_nothing() {
        let (events, slow, prompt) = (EventBus::default(), Fake::with_room(2), Fake::with_room(99));
        events.add(Box::new(slow.clone()), &hello());
        events.add(Box::new(prompt.clone()), &hello());
        for _ in 0..5 {
            events.publish(&Event::Paused);
        }
        assert_eq!((slow.take().len(), prompt.take().len()), (2, 6));
        slow.room.store(2, Ordering::Relaxed);
        events.publish(&Event::Resumed);
        events.publish(&Event::Paused);
        let lagged = json!({"event": "lagged", "dropped": 4});
        assert_eq!(
            slow.take(),
            [lagged, json!({"event": "resumed"}), json!({"event": "paused"})]
        );
    }

    #[test]
    fn subscribers_that_have_gone_make_room() {
        let events = EventBus::default();
        let fakes: Vec<_> = (0..MAX_SUBSCRIBERS).map(|_| Fake::with_room(9)).collect();
        for fake in &fakes {
            assert!(events.has_room());
            events.add(Box::new(fake.clone()), &hello());
        }
        assert!(!events.has_room());
        fakes[0].closed.store(true, Ordering::Relaxed);
        assert!(events.has_room());
        fakes[1].closed.store(true, Ordering::Relaxed);
        events.publish(&Event::Started);
        assert_eq!(format!("{events:?}"), "EventBus(2 subscribers)");
    }

    #[test]
    fn the_end_tells_a_code_or_a_signal() {
        let (events, fake) = (EventBus::default(), Fake::with_room(9));
        events.add(Box::new(fake.clone()), &hello());
        let end = |code, signal| events.publish(&Event::Exit { code, signal });
        end(Some(0), None);
        end(None, Some(15));
        let expected = [
            json!({"event": "exit", "code": 0}),
            json!({"event": "exit", "signal": 15}),
        ];
        assert_eq!(fake.take()[1..], expected);
    }
}
