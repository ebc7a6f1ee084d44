//! A card with several pairs of queues in its slot, each part in a lane of its own.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::super::feature::{CTRL_VQ, MAC, MQ};
use super::super::pairs::Pairs;
use super::super::{MMDS_TOKEN, State};
use super::*;
use crate::SharedMemory;
use crate::mmds::tests::client::{ADDRESS, SYN, arp, tcp};
use crate::mmds::tests::service;
use crate::mmds::{DEFAULT_ADDRESS, Version};
use crate::testing::{Inline, Piece, readable};
use crate::virtio::slot::status;
use crate::virtio::{Blob, VirtioSlot, feature};

const PAIRS: u16 = 3;
const CONTROL: u16 = 2 * PAIRS;
const ALL: u64 = MRG_RXBUF | GUEST_CSUM | GUEST_TSO4 | CTRL_VQ | MQ;
/// Where commands are, and behind them the byte for the answer.
const COMMAND: u64 = BUFFERS + 0x1_0000;
const ANSWER: u64 = COMMAND + 0x100;
const SENT: u64 = BUFFERS + 0x2_0000;
const READY: u8 = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
/// The token of the backend, of the limiter of what is sent, and of the metadata service, as the lane knows them.
const BACKEND: u32 = 1 << 16;
const TX_LIMITER: u32 = BACKEND + 2;
const MMDS: u32 = BACKEND + MMDS_TOKEN;

struct Card<'m> {
    mem: &'m GuestMemory,
    drivers: Vec<Driver<'m>>,
    host: Arc<Inline>,
    slot: VirtioSlot,
    wires: Vec<UnixDatagram>,
    others: Arc<Mutex<Vec<UnixDatagram>>>,
    inodes: Vec<u64>,
}

fn net(rest: &str) -> (Net<FakeTap>, Vec<UnixDatagram>) {
    let (mut taps, wires): (Vec<_>, Vec<_>) = (0..PAIRS).map(|_| FakeTap::new()).unzip();
    let others = Arc::clone(&taps[0].others);
    for tap in &mut taps {
        tap.others = Arc::clone(&others);
    }
    (Net::with_pairs(&config(rest), taps).unwrap(), wires)
}

impl<'m> Card<'m> {
    /// A card whose driver has set up all queues, and has said nothing yet.
    fn new(mem: &'m GuestMemory) -> Self {
        let mut card = Self::idle(mem, "", |net| net);
        card.set_up(ALL, 0..=CONTROL);
        card
    }

    fn idle(mem: &'m GuestMemory, rest: &str, change: impl FnOnce(Net<FakeTap>) -> Net<FakeTap>) -> Self {
        // The test before may have run on this thread.
        SWITCHED.take();
        REFUSES.set(false);
        let (net, wires) = net(rest);
        let others = Arc::clone(&net.backend.others);
        let mut inodes = vec![inode(net.backend.as_fd())];
        inodes.extend(net.siblings.iter().map(|part| inode(part.backend.as_fd())));
        let host = Arc::new(Inline::default());
        let irq = testing::recorder();
        let lanes = Arc::clone(&host) as _;
        let slot = VirtioSlot::new(Box::new(change(net)), irq, SharedMemory::new(mem.clone()), lanes);
        Self {
            mem,
            drivers: Vec::new(),
            host,
            slot: slot.unwrap(),
            wires,
            others,
            inodes,
        }
    }

    /// A driver comes that accepts `features` and sets up these queues.
    fn set_up(&mut self, features: u64, queues: impl IntoIterator<Item = u16>) {
        self.slot.set_status(0);
        self.slot.set_status(status::ACKNOWLEDGE | status::DRIVER);
        let features = features | feature::VERSION_1;
        for half in 0..2 {
            self.slot.driver.driver_features_select = half;
            let word = u32::try_from(features >> (32 * half) & 0xffff_ffff).unwrap();
            self.slot.set_driver_features(word);
        }
        self.slot.set_status(READY);
        let lay_out = |queue| Driver::new(self.mem, 0x1000 * (1 + u64::from(queue)), 16);
        self.drivers = (0..=CONTROL).map(lay_out).collect();
        for queue in queues {
            self.slot.driver.queue_select = queue;
            let config = self.slot.queue_mut().unwrap();
            let max_size = config.max_size;
            *config = self.drivers[usize::from(queue)].config();
            config.max_size = max_size;
        }
        self.slot.set_status(READY | status::DRIVER_OK);
    }

    /// Kicks a queue, and lets the device go on as long as it asks for that.
    fn kick(&mut self, queue: u16) {
        self.slot.kick(queue);
        while self.slot.kicks()[usize::from(queue)].read().is_ok() {
            self.host.event(queue.into());
        }
    }

    fn offer_command(&mut self, queue: u16, command: &[u8], pieces: &[Piece]) {
        self.mem.write_slice(command, GuestAddress(COMMAND)).unwrap();
        self.mem.write_obj(0xeeu8, GuestAddress(ANSWER)).unwrap();
        self.drivers[usize::from(queue)].offer(pieces);
    }

    /// The answer to a command as Linux sends it; `None` when there is none.
    fn command(&mut self, command: &[u8]) -> Option<u8> {
        self.command_to(CONTROL, command)
    }

    fn command_to(&mut self, queue: u16, command: &[u8]) -> Option<u8> {
        let len = u32::try_from(command.len()).unwrap();
        let pieces = match len {
            0..=2 => vec![readable(COMMAND, len), writable(ANSWER, 1)],
            _ => vec![
                readable(COMMAND, 2),
                readable(COMMAND + 2, len - 2),
                writable(ANSWER, 1),
            ],
        };
        self.offer_command(queue, command, &pieces);
        self.kick(queue);
        let (_, written) = self.drivers[usize::from(queue)].used()?;
        let answer = self.mem.read_obj(GuestAddress(ANSWER)).unwrap();
        (written == 1).then_some(answer)
    }

    fn use_pairs(&mut self, count: u8) -> Option<u8> {
        self.command(&[4, 0, count, 0])
    }

    /// Which queues of the tap were attached (true) or detached since the last look.
    fn switched(&self) -> Vec<(usize, bool)> {
        let switched = SWITCHED.take();
        let place = |inode| self.inodes.iter().position(|known| *known == inode).unwrap();
        switched
            .into_iter()
            .map(|(inode, on)| (place(inode), on))
            .collect()
    }

    /// A frame comes from the network to a pair, which has a buffer for it; whether the guest gets it.
    fn receives(&mut self, pair: u16) -> bool {
        self.wires[usize::from(pair)].send(&frame(100, 1)).unwrap();
        self.offer_room(pair);
        self.host.event(BACKEND);
        let driver = &mut self.drivers[usize::from(2 * pair)];
        std::iter::from_fn(|| driver.used()).count() > 0
    }

    fn offer_room(&mut self, pair: u16) {
        let place = BUFFERS + 0x1000 * u64::from(pair);
        self.drivers[usize::from(2 * pair)].offer(&[writable(place, 1536)]);
    }

    /// The guest sends a frame by a pair; whether it is on the wire.
    fn sends(&mut self, pair: u16) -> bool {
        self.send(pair, &frame(100, 1));
        self.wires[usize::from(pair)].recv(&mut [0; 200]).is_ok()
    }

    fn send(&mut self, pair: u16, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(SENT)).unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        self.drivers[usize::from(2 * pair + 1)].offer(&[readable(SENT, len)]);
        self.kick(2 * pair + 1);
    }

    fn patch(&mut self, fields: &str) -> Result<(), String> {
        let body = format!(r#"{{"iface_id":"eth0",{fields}}}"#);
        let patched = self.slot.update(serde_json::from_str(&body).unwrap());
        patched.map_err(|error| error.to_string())
    }

    fn is_broken(&self) -> bool {
        self.slot.status() & status::NEEDS_RESET != 0
    }

    fn link_status(&self) -> u8 {
        let mut status = [0];
        self.slot.read_config(6, &mut status);
        status[0]
    }
}

#[test]
fn offers_the_pairs_that_there_are_and_a_control_queue() {
    let (net, _wires) = net(r#","guest_mac":"02:00:00:00:00:01""#);
    let info = net.info();
    assert_eq!(info.features & (MQ | CTRL_VQ | MAC), MQ | CTRL_VQ | MAC);
    assert_eq!(info.queue_sizes, [256, 256, 256, 256, 256, 256, 64]);
    assert_eq!(net.config_space(), [2, 0, 0, 0, 0, 1, 1, 0, 3, 0, 0, 0]);
}

#[test]
fn uses_the_first_pair_only_until_the_driver_asks_for_more() {
    let mem = ram();
    let mut card = Card::new(&mem);
    assert_eq!(card.switched(), [(1, false), (2, false)]);
    assert_eq!((card.receives(0), card.receives(1)), (true, false));
    assert_eq!(card.use_pairs(2), Some(0));
    assert_eq!(card.switched(), [(1, true)]);
    assert_eq!(
        (card.receives(0), card.receives(1), card.receives(2)),
        (true, true, false)
    );
    assert_eq!(card.use_pairs(1), Some(0));
    assert_eq!(card.switched(), [(1, false)]);
    assert_eq!((card.receives(0), card.receives(1)), (true, false));
}

#[test]
fn a_pair_is_given_up_only_when_its_part_has_put_in_its_last_frame() {
    let taps: Vec<_> = (0..PAIRS).map(|_| FakeTap::new().0).collect();
    let pairs = Pairs::new(&taps).unwrap();
    pairs.select(3).unwrap();
    let turn = pairs.turn(1);
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            pairs.select(1).unwrap();
            is_done.store(true, Ordering::SeqCst);
        });
        while pairs.uses(1) {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(20));
        assert!(!is_done.load(Ordering::SeqCst));
        drop(turn);
    });
    assert!(is_done.into_inner());
}

#[test]
fn sends_by_every_pair_and_counts_what_all_of_them_do() {
    let mem = ram();
    let mut card = Card::new(&mem);
    assert_eq!(card.use_pairs(3), Some(0));
    assert!((0..PAIRS).all(|pair| card.sends(pair)));
    assert!((0..PAIRS).all(|pair| card.receives(pair)));
    let metrics = card.slot.metrics();
    assert_eq!(
        (&metrics["tx_count"], &metrics["rx_count"]),
        (&3.into(), &3.into())
    );
}

#[test]
fn refuses_commands_that_are_none_and_changes_nothing() {
    let mem = ram();
    let mut card = Card::new(&mem);
    assert_eq!(card.use_pairs(2), Some(0));
    card.switched();
    for command in [
        &[4, 0, 0, 0][..],
        &[4, 0, 4, 0],
        &[4, 0, 2, 1],
        &[4, 0, 0xff, 0xff],
        &[4, 1, 1, 0],
        &[3, 0, 1, 0],
        &[0, 0, 1],
        &[4, 0, 1],
        &[4, 0],
        &[4],
        &[4, 0, 1, 0, 0],
        &[4, 0, 1, 0, 0, 0, 0, 0, 0, 0],
    ] {
        assert_eq!(card.command(command), Some(1), "{command:?}");
    }
    assert_eq!((card.switched(), card.is_broken()), (vec![], false));
    assert!(card.receives(1));
}

#[test]
fn takes_a_command_in_any_pieces_and_one_that_leaves_no_room_for_the_answer() {
    let mem = ram();
    let mut card = Card::new(&mem);
    let bytes = [0, 1, 2, 3].map(|at| readable(COMMAND + at, 1));
    let mut pieces = bytes.to_vec();
    pieces.push(writable(ANSWER, 64));
    card.offer_command(CONTROL, &[4, 0, 3, 0], &pieces);
    card.kick(CONTROL);
    assert_eq!(card.drivers[6].used().map(|(_, written)| written), Some(1));
    assert_eq!(mem.read_obj::<u8>(GuestAddress(ANSWER)).unwrap(), 0);
    assert!(card.receives(2));

    card.offer_command(CONTROL, &[4, 0, 1, 0], &[readable(COMMAND, 4)]);
    card.offer_command(CONTROL, &[4, 0, 1, 0], &[writable(ANSWER, 1)]);
    card.kick(CONTROL);
    let written: Vec<_> = std::iter::from_fn(|| card.drivers[6].used())
        .map(|(_, len)| len)
        .collect();
    assert_eq!((written, card.is_broken()), (vec![0, 1], false));
    assert!(!card.receives(2));
}

#[test]
fn answers_every_command_that_waits_one_at_a_time() {
    let mem = ram();
    let mut card = Card::new(&mem);
    for _ in 0..10 {
        let pieces = [readable(COMMAND, 4), writable(ANSWER, 1)];
        card.offer_command(CONTROL, &[4, 0, 2, 0], &pieces);
    }
    card.host.event(CONTROL.into());
    assert_eq!(std::iter::from_fn(|| card.drivers[6].used()).count(), 1);
    card.kick(CONTROL);
    assert_eq!(std::iter::from_fn(|| card.drivers[6].used()).count(), 9);
}

#[test]
fn a_control_queue_that_is_malformed_asks_for_a_reset_and_works_after_it() {
    let mem = ram();
    let mut card = Card::new(&mem);
    card.drivers[6].offer(&[readable(u64::MAX - 1, 4), writable(ANSWER, 1)]);
    card.kick(CONTROL);
    assert!(card.is_broken());
    card.set_up(ALL, 0..=CONTROL);
    assert_eq!((card.is_broken(), card.use_pairs(3)), (false, Some(0)));
}

#[test]
fn refuses_pairs_that_are_set_up_only_partly() {
    let mem = ram();
    let mut card = Card::idle(&mem, "", |net| net);
    card.set_up(ALL, [0, 1, 2, 4, 5, 6]);
    assert_eq!((card.use_pairs(2), card.use_pairs(3)), (Some(1), Some(1)));
    assert_eq!((card.use_pairs(1), card.receives(0)), (Some(0), true));
    card.slot.pause();
    card.slot.resume();
    assert!(!card.is_broken());
}

#[test]
fn a_driver_that_knows_no_pairs_has_one_and_its_control_queue_behind() {
    let mem = ram();
    for (features, answer) in [(0, None), (MQ, Some(1))] {
        let mut card = Card::idle(&mem, "", |net| net);
        card.set_up(ALL & !MQ & !CTRL_VQ | features, 0..=CONTROL);
        assert_eq!(card.use_pairs(2), answer);
        assert_eq!((card.receives(0), card.sends(0)), (true, true));
    }
    let mut card = Card::idle(&mem, "", |net| net);
    card.set_up(ALL & !MQ, 0..=2);
    assert_eq!(card.command_to(2, &[4, 0, 2, 0]), Some(1));
    assert_eq!((card.receives(0), card.receives(1)), (true, false));
    assert!(!card.is_broken());
}

#[test]
fn stays_with_the_pairs_that_it_has_when_the_host_refuses_more() {
    let mem = ram();
    let mut card = Card::new(&mem);
    assert_eq!(card.use_pairs(2), Some(0));
    REFUSES.set(true);
    assert_eq!(card.use_pairs(3), Some(1));
    assert_eq!((card.receives(1), card.receives(2)), (true, false));
    REFUSES.set(false);
    assert_eq!(card.use_pairs(3), Some(0));
    assert!(card.receives(2));
}

#[test]
fn a_reset_leaves_the_next_driver_with_one_pair() {
    let mem = ram();
    let mut card = Card::new(&mem);
    assert_eq!(card.use_pairs(3), Some(0));
    let pieces = [readable(COMMAND, 4), writable(ANSWER, 1)];
    card.offer_command(CONTROL, &[4, 0, 2, 0], &pieces);
    card.switched();
    card.set_up(ALL, 0..=CONTROL);
    assert_eq!(card.switched(), [(1, false), (2, false)]);
    assert_eq!((card.receives(0), card.receives(1)), (true, false));
    assert_eq!(card.use_pairs(3), Some(0));
}

#[test]
fn the_link_is_that_of_all_pairs() {
    let mem = ram();
    let mut card = Card::new(&mem);
    card.use_pairs(2);
    card.patch(r#""link_state":"down""#).unwrap();
    assert_eq!(card.link_status(), 0);
    assert_eq!(
        (card.receives(0), card.receives(1), card.sends(0), card.sends(1)),
        (false, false, false, false)
    );
    card.patch(r#""link_state":"up""#).unwrap();
    assert_eq!(card.link_status(), 1);
    assert_eq!((card.sends(0), card.sends(1)), (true, true));
    assert_eq!((card.receives(0), card.receives(1)), (true, true));
    assert_eq!(card.slot.metrics()["tx_fails"], 2);
}

#[test]
fn all_pairs_move_to_another_tap_and_only_those_in_use_are_attached() {
    let mem = ram();
    let mut card = Card::new(&mem);
    card.use_pairs(2);
    card.switched();
    let refused = card
        .patch(r#""host_dev_name":"tap2","link_state":"down""#)
        .unwrap_err();
    assert!(refused.contains("the tap 'tap2' is in use already"), "{refused}");
    assert_eq!((card.sends(1), card.receives(1)), (true, true));

    card.patch(r#""host_dev_name":"tap1""#).unwrap();
    let detached = SWITCHED.take();
    assert!(matches!(detached[..], [(_, false)]), "{detached:?}");
    assert!(
        card.wires.iter().all(|wire| wire.send(&frame(100, 1)).is_err()),
        "the old tap is closed"
    );
    card.wires = std::mem::take(&mut *card.others.lock().unwrap());
    assert_eq!((card.sends(0), card.sends(1)), (true, true));
    assert_eq!(
        (card.receives(0), card.receives(1), card.receives(2)),
        (true, true, false)
    );
    assert_eq!(card.use_pairs(3), Some(0));
    assert!(card.receives(2));
}

#[test]
fn pairs_move_while_no_driver_is_there() {
    let mem = ram();
    let mut card = Card::idle(&mem, "", |net| net);
    card.patch(r#""host_dev_name":"tap1""#).unwrap();
    assert_eq!(card.switched(), []);
    card.wires = std::mem::take(&mut *card.others.lock().unwrap());
    card.set_up(ALL, 0..=CONTROL);
    assert_eq!(SWITCHED.take().len(), 2);
    card.use_pairs(3);
    assert!((0..PAIRS).all(|pair| card.receives(pair) && card.sends(pair)));
}

#[test]
fn pairs_share_what_a_limit_lets_through() {
    let mem = ram();
    let mut card = Card::new(&mem);
    card.use_pairs(2);
    card.patch(r#""tx_rate_limiter":{"ops":{"size":1,"refill_time":3600000}}"#)
        .unwrap();
    assert_eq!(
        (card.sends(1), card.sends(0), card.sends(1)),
        (true, false, false)
    );
    card.patch(r#""tx_rate_limiter":{"ops":{"size":0,"refill_time":0}}"#)
        .unwrap();
    card.host.event(TX_LIMITER);
    let sent = |wire: &UnixDatagram| wire.recv(&mut [0; 200]).is_ok();
    assert!(sent(&card.wires[0]) && sent(&card.wires[1]));
}

#[test]
fn the_metadata_service_answers_the_pair_that_asks() {
    let mem = ram();
    let mut card = Card::idle(&mem, "", |net| {
        net.with_mmds(Arc::new(service(Version::V1))).unwrap()
    });
    card.set_up(ALL, 0..=CONTROL);
    card.use_pairs(2);
    let ask = |card: &mut Card<'_>, frame: &[u8]| {
        card.offer_room(1);
        card.send(1, &[&[0; HEADER_LEN], frame].concat());
        card.drivers[2].used().map(|(_, len)| len)
    };
    assert_eq!(ask(&mut card, &arp(1, ADDRESS, DEFAULT_ADDRESS)), Some(12 + 42));
    assert!(ask(&mut card, &tcp(80, 1000, (1, 0), SYN, b"")).is_some());
    assert!(
        card.wires.iter().all(|wire| wire.recv(&mut [0; 200]).is_err()),
        "nothing leaks"
    );

    // One part watches the timer, and what is due comes by its pair.
    let timers = card
        .host
        .watch
        .watched
        .lock()
        .unwrap()
        .iter()
        .filter(|(_, token)| *token == MMDS)
        .count();
    assert_eq!(timers, 1);
    // Without room the answer waits for any pair that has some.
    card.send(
        1,
        &[&[0; HEADER_LEN][..], &arp(1, ADDRESS, DEFAULT_ADDRESS)].concat(),
    );
    card.offer_room(0);
    card.kick(0);
    assert_eq!(card.drivers[0].used().map(|(_, len)| len), Some(12 + 42));
}

#[test]
fn saves_how_many_pairs_are_used_and_goes_on_with_them() {
    let mem = ram();
    let mut card = Card::new(&mem);
    card.use_pairs(2);
    card.switched();
    card.slot.pause();
    let saved = card.slot.save();
    let mut restored = Card::idle(&mem, "", |net| net);
    restored.slot.load(saved).unwrap();
    restored.slot.resume();
    assert_eq!(restored.switched(), [(2, false)]);
    restored.drivers = std::mem::take(&mut card.drivers);
    assert_eq!((restored.receives(0), restored.receives(1)), (true, true));
    assert_eq!(restored.use_pairs(3), Some(0));
    assert!(restored.receives(2));
}

#[test]
fn refuses_a_saved_state_with_pairs_that_it_has_not() {
    let limits = || net("").0.rx.throttle.save();
    let state = |pairs| {
        let (rx_rate_limiter, tx_rate_limiter) = (limits(), limits());
        Blob::new(
            "net",
            1,
            &State {
                rx_rate_limiter,
                tx_rate_limiter,
                pairs,
            },
        )
    };
    for pairs in [None, Some(0), Some(4)] {
        let error = net("").0.load(state(pairs)).unwrap_err().to_string();
        assert!(
            error.contains("interface 'eth0' has other queues than at the snapshot"),
            "{error}"
        );
    }
    assert!(net("").0.load(state(Some(3))).is_ok());
    let mut single = Net::new(&config(""), FakeTap::new().0);
    assert!(single.load(state(Some(1))).is_err());
    assert!(single.load(state(None)).is_ok());
}
