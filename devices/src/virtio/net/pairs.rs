//! [`Pairs`]: what the parts of a card with several pairs of queues share, and the control queue by which the driver says
//! how many of them it uses (virtio 1.2 §5.1.6.5.5).
//!
//! Each part has a queue of the tap. The host's kernel spreads what comes over those that are attached, so the queues of
//! pairs that are not in use are detached. All of that is done by the first part, which has the control queue; the others
//! look up whether they are in use, and take over what a change has left for them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{BACKEND_TOKEN, Backend, Config, LinkState, Net, QUEUE_SIZE, RX, TX, feature};
use crate::virtio::{Chain, DeviceError, Io, QueueError, Ring, Vector};

/// Class and command by which the driver says how many pairs it uses, and the answers.
const CLASS_MQ: u8 = 4;
const VQ_PAIRS_SET: u8 = 0;
const OK: u8 = 0;
const ERR: u8 = 1;
/// Entries of the control queue.
const CONTROL_SIZE: u16 = 64;
/// Where `max_virtqueue_pairs` is in the configuration space.
const MAX_PAIRS_FIELD: std::ops::Range<usize> = 8..10;

/// What the parts share.
pub(super) struct Pairs<B> {
    count: u16,
    /// How many the driver uses, the first ones of all.
    used: AtomicU16,
    /// A bit for each pair of which the driver has set up both queues.
    ready: AtomicU16,
    is_down: AtomicBool,
    host: Mutex<Host<B>>,
    /// For each pair what its part holds while it puts frames into its queue.
    turns: Vec<Mutex<()>>,
}

/// The host's ends.
struct Host<B> {
    queues: HostQueues,
    /// For each pair the end that its part is to take.
    ends: Vec<Option<B>>,
}

/// The queues of an interface, and whether each is attached.
pub(super) type HostQueues = Vec<(OwnedFd, bool)>;

impl<B: Backend> Pairs<B> {
    pub(super) fn new(backends: &[B]) -> io::Result<Self> {
        let host = Host {
            queues: host_queues(backends)?,
            ends: Vec::new(),
        };
        Ok(Self {
            count: u16::try_from(backends.len()).map_err(io::Error::other)?,
            used: 1.into(),
            ready: 0.into(),
            is_down: false.into(),
            host: host.into(),
            turns: backends.iter().map(|_| Mutex::default()).collect(),
        })
    }

    /// How many there are.
    pub(super) fn count(&self) -> u16 {
        self.count
    }

    /// How many the driver uses.
    pub(super) fn used(&self) -> u16 {
        self.used.load(Ordering::Acquire)
    }

    /// Whether the driver uses this one.
    pub(super) fn uses(&self, pair: u16) -> bool {
        pair < self.used()
    }

    /// To be held by the part of `pair` from asking whether the driver uses it to the last frame that it puts into the
    /// queue: a driver that has been told of its command's end finds no more there.
    pub(super) fn turn(&self, pair: u16) -> MutexGuard<'_, ()> {
        lock(&self.turns[usize::from(pair)])
    }

    /// Takes over how many a saved driver uses; false when there are not so many.
    pub(super) fn load(&self, used: u16) -> bool {
        let exists = (1..=self.count).contains(&used);
        if exists {
            self.used.store(used, Ordering::Release);
        }
        exists
    }

    /// Forgets the driver.
    pub(super) fn reset(&self) {
        self.used.store(1, Ordering::Release);
        self.ready.store(0, Ordering::Release);
    }

    /// The driver is ready, and has set up this pair or not.
    fn begin(&self, pair: u16, is_ready: bool) -> io::Result<()> {
        self.ready.fetch_or(u16::from(is_ready) << pair, Ordering::AcqRel);
        if pair > 0 {
            return Ok(());
        }
        self.align(&mut self.lock().queues)
    }

    /// Whether the driver has set up all of the first `count` pairs.
    fn are_ready(&self, count: u16) -> bool {
        let ready = self.ready.load(Ordering::Acquire);
        ready.trailing_ones() >= u32::from(count)
    }

    /// Attaches the queues of pairs that are in use, and no others.
    fn align(&self, queues: &mut HostQueues) -> io::Result<()> {
        for (pair, (queue, is_attached)) in (0..).zip(queues) {
            let wanted = self.uses(pair);
            if *is_attached != wanted {
                B::set_attached(queue.as_fd(), wanted)?;
                *is_attached = wanted;
            }
        }
        Ok(())
    }

    /// The driver uses that many pairs from now on, or as many as before when the host refuses.
    pub(super) fn select(&self, used: u16) -> io::Result<()> {
        // The parts must know first: what comes to a part that is not in use waits until more comes.
        let before = self.used.swap(used, Ordering::AcqRel);
        let mut host = self.lock();
        self.align(&mut host.queues).inspect_err(|_| {
            self.used.store(before, Ordering::Release);
            // What cannot be set back costs frames of pairs that no driver uses.
            let _ = self.align(&mut host.queues);
        })?;
        (used..before).for_each(|pair| drop(self.turn(pair)));
        Ok(())
    }

    /// Answers one command, as each may take the host milliseconds; true when there are more.
    fn serve(&self, ring: &mut Ring<'_, '_>, may_select: bool) -> Result<bool, QueueError> {
        let mut chain = Chain::new();
        if ring.pop(&mut chain)? {
            let count = self.requested(&chain).filter(|_| may_select);
            let answer = match count.map(|count| self.select(count)) {
                Some(Ok(())) => OK,
                Some(Err(error)) => {
                    log::warn!("a tap does not give its card as many queues as the driver uses: {error}");
                    ERR
                }
                None => ERR,
            };
            let written = chain.writable.write(0, &[answer]);
            ring.push(chain.head(), u32::try_from(written).expect("one byte"));
        }
        ring.publish();
        ring.enable_notify()
    }

    /// How many pairs a command asks for; none when it is another one, or asks for what there is not.
    fn requested(&self, chain: &Chain<'_>) -> Option<u16> {
        let mut command = [0; 4];
        let is_whole = chain.readable.len() == command.len() && chain.readable.read(0, &mut command) == 4;
        let [class, kind, low, high] = command;
        let count = u16::from_le_bytes([low, high]);
        let is_valid = is_whole && (class, kind) == (CLASS_MQ, VQ_PAIRS_SET);
        (is_valid && (1..=self.count).contains(&count) && self.are_ready(count)).then_some(count)
    }

    /// All that can fail of a move to the ends of another interface. Only while the driver is ready are those detached
    /// that it does not use.
    pub(super) fn prepare(&self, backends: &[B], is_running: bool) -> io::Result<HostQueues> {
        let mut queues = host_queues(backends)?;
        if is_running {
            self.align(&mut queues)?;
        }
        Ok(queues)
    }

    /// Moves to what was prepared; the parts but the first take their ends, `others`, when they follow.
    pub(super) fn adopt(&self, queues: HostQueues, others: impl Iterator<Item = B>) {
        let ends = std::iter::once(None).chain(others.map(Some)).collect();
        *self.lock() = Host { queues, ends };
    }

    fn take_end(&self, pair: u16) -> Option<B> {
        self.lock().ends.get_mut(usize::from(pair))?.take()
    }

    /// Plugs the cable of all parts in or pulls it; they follow.
    pub(super) fn set_link(&self, link: LinkState) {
        self.is_down.store(link == LinkState::Down, Ordering::Release);
    }

    fn link(&self) -> LinkState {
        if self.is_down.load(Ordering::Acquire) {
            LinkState::Down
        } else {
            LinkState::Up
        }
    }

    fn lock(&self) -> MutexGuard<'_, Host<B>> {
        lock(&self.host)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All of them take part at first, as they were just opened.
fn host_queues<B: Backend>(backends: &[B]) -> io::Result<HostQueues> {
    let queue = |backend: &B| Ok((backend.as_fd().try_clone_to_owned()?, true));
    backends.iter().map(queue).collect()
}

impl<B: Backend> Net<B> {
    /// A card with a pair of queues for each of `backends`, which are of one interface.
    pub fn with_pairs(config: &Config, backends: Vec<B>) -> io::Result<Self> {
        let pairs = Arc::new(Pairs::new(&backends)?);
        pairs.set_link(config.link_state.unwrap_or_default());
        let part = |(pair, backend)| {
            let mut part = Self::new(config, backend);
            part.info.features |= feature::MQ | feature::CTRL_VQ;
            part.info.queue_sizes = vec![QUEUE_SIZE; usize::from(2 * pairs.count)];
            part.info.queue_sizes.push(CONTROL_SIZE);
            part.config_space[MAX_PAIRS_FIELD].copy_from_slice(&pairs.count.to_le_bytes());
            (part.pair, part.pairs) = (pair, Some(Arc::clone(&pairs)));
            part
        };
        let mut parts = (0..).zip(backends).map(part);
        let mut first = parts.next().ok_or(io::ErrorKind::InvalidInput)?;
        for mut part in parts {
            part.rx.throttle = first.rx.throttle.share()?;
            part.tx.throttle = first.tx.throttle.share()?;
            first.siblings.push(part);
        }
        Ok(first)
    }

    pub(super) fn rx_queue(&self) -> u16 {
        2 * self.pair + RX
    }

    pub(super) fn tx_queue(&self) -> u16 {
        2 * self.pair + TX
    }

    /// The control queue, which follows the queues that the driver knows of (virtio 1.2 §5.1.2).
    pub(super) fn control_queue(&self, features: u64) -> Option<u16> {
        let pairs = self.pairs.as_ref()?;
        Some(if features & feature::MQ == 0 {
            2
        } else {
            2 * pairs.count
        })
    }

    /// Whether the driver uses this pair.
    pub(super) fn is_used(&self) -> bool {
        self.pairs.as_ref().is_none_or(|pairs| pairs.uses(self.pair))
    }

    /// Begins with the pair that this part serves; the first one begins for the card.
    pub(super) fn begin_pair(&self, io: &Io<'_>) -> io::Result<()> {
        let Some(pairs) = &self.pairs else { return Ok(()) };
        let is_ready = |queue: u16| {
            let queue = io.queues.get(usize::from(queue));
            queue.is_some_and(|queue| queue.config().ready)
        };
        pairs.begin(self.pair, is_ready(self.rx_queue()) && is_ready(self.tx_queue()))
    }

    /// The driver has kicked the control queue. Without MQ it is where another part has a queue, which then refuses all.
    pub(super) fn control(&self, queue: u16, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let Some(pairs) = &self.pairs else { return Ok(()) };
        let needed = feature::MQ | feature::CTRL_VQ;
        let mut ring = io.queues[usize::from(queue)].open(io.mem)?;
        let more = pairs.serve(&mut ring, io.features & needed == needed)?;
        if ring.needs_interrupt() {
            io.irq.raise(Vector::Queue(queue));
        }
        if more {
            io.again = Some(queue);
        }
        Ok(())
    }

    /// Follows the first part, which has changed or was loaded.
    pub(super) fn follow(&mut self, io: &Io<'_>) {
        self.rx.throttle.refresh();
        self.tx.throttle.refresh();
        let Some(pairs) = self.pairs.clone() else { return };
        if let Some(end) = pairs.take_end(self.pair) {
            // A descriptor that the loop does not know has nothing to be removed.
            let _ = io.watch.remove(self.backend.as_fd().as_raw_fd());
            self.fault = io.watch.add(end.as_fd().as_raw_fd(), BACKEND_TOKEN).err();
            self.backend = end;
        }
        self.set_link(pairs.link());
        self.note_link();
    }
}
