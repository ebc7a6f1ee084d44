//! These need the host's tap driver and CAP_NET_ADMIN, and fail where they are missing.

use std::path::PathBuf;
use std::process::Command;

use super::super::{OpenError, Tap};
use super::*;

/// Runs `ip` of the host's iproute2.
fn ip(args: &str) {
    let result = Command::new("ip").args(args.split_whitespace()).output();
    let output = result.expect("these tests need the command 'ip' (package iproute2)");
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "ip {args} (needs root): {message}");
}

/// A tap that is made outside, and removed at the end of the test.
struct Made(&'static str);

impl Made {
    fn new(name: &'static str, options: &str) -> Self {
        ip(&format!("tuntap add dev {name} mode {options}"));
        Self(name)
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        ip(&format!("link delete {}", self.0));
    }
}

fn interface(name: &str) -> PathBuf {
    PathBuf::from("/sys/class/net").join(name)
}

fn open(name: &str) -> Tap {
    Tap::open(name).expect("these tests need /dev/net/tun and CAP_NET_ADMIN: run them as root")
}

#[test]
fn creates_a_tap_that_vanishes_with_its_owner() {
    let tap = open("mayflyt0");
    assert!(interface("mayflyt0").exists());
    drop(tap);
    assert!(!interface("mayflyt0").exists());
}

#[test]
fn leaves_a_tap_that_was_there_before() {
    let made = Made::new("mayflyt1", "tap");
    drop(open(made.0));
    assert!(interface(made.0).exists());
}

#[test]
fn says_that_another_process_holds_the_tap() {
    let _holder = open("mayflyt2");
    let error = Tap::open("mayflyt2").unwrap_err();
    assert!(matches!(error, OpenError::Busy { .. }), "{error}");
}

#[test]
fn says_that_an_interface_is_not_a_single_queue_tap() {
    let (tun, queues) = (
        Made::new("mayflyt3", "tun"),
        Made::new("mayflyt4", "tap multi_queue"),
    );
    for name in ["lo", tun.0, queues.0] {
        let error = Tap::open(name).unwrap_err();
        assert!(matches!(error, OpenError::NotATap { .. }), "{name}: {error}");
    }
}

/// How many queues the kernel spreads frames over.
fn attached(name: &str) -> usize {
    let queues = std::fs::read_dir(interface(name).join("queues")).unwrap();
    let names = queues.map(|queue| queue.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("tx-")).count()
}

#[test]
fn opens_a_tap_with_several_queues_and_attaches_and_detaches_them() {
    let made = Made::new("mayflyta", "tap multi_queue");
    let queues = Tap::open_queues(made.0, 3).unwrap();
    assert_eq!((queues.len(), attached(made.0)), (3, 3));
    Tap::set_attached(queues[1].as_fd(), false).unwrap();
    Tap::set_attached(queues[2].as_fd(), false).unwrap();
    assert_eq!(attached(made.0), 1);
    assert!(Tap::set_attached(queues[1].as_fd(), false).is_err());
    Tap::set_attached(queues[2].as_fd(), true).unwrap();
    assert_eq!(attached(made.0), 2);
    drop(queues);
    assert_eq!(Tap::open_queues(made.0, 16).unwrap().len(), 16);
}

#[test]
fn creates_a_tap_with_several_queues_that_vanishes_with_its_owner() {
    let queues = Tap::open_queues("mayflytb", 2).unwrap();
    assert_eq!(attached("mayflytb"), 2);
    drop(queues);
    assert!(!interface("mayflytb").exists());
}

#[test]
fn says_that_an_interface_is_not_a_tap_with_several_queues() {
    let single = Made::new("mayflytc", "tap");
    for name in ["lo", single.0] {
        let error = Tap::open_queues(name, 2).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, OpenError::SingleQueue { .. }), "{name}: {text}");
        assert!(text.contains(&format!("'ip tuntap add dev {name} mode tap multi_queue'")));
    }
}

#[test]
fn accepts_every_subset_of_the_offloads_that_it_offers() {
    use super::super::feature::GUEST_OFFLOADS;
    let mut tap = open("mayflyt5");
    let bits: Vec<u64> = (0..64)
        .map(|i| 1 << i)
        .filter(|bit| GUEST_OFFLOADS & bit != 0)
        .collect();
    for choice in 0..1u32 << bits.len() {
        let chosen = (0..bits.len()).filter(|i| choice >> i & 1 != 0);
        let features = chosen.map(|i| bits[i]).sum::<u64>() & tap.offloads();
        tap.set_offloads(features)
            .unwrap_or_else(|error| panic!("{features:#x}: {error}"));
    }
}

/// A device on the tap `name`, which is up then.
fn device(name: &str) -> Box<dyn VirtioDevice> {
    let config = Config {
        host_dev_name: Some(name.into()),
        ..config("")
    };
    let net = config.build(None);
    ip(&format!("link set {name} up"));
    net.expect("these tests need /dev/net/tun and CAP_NET_ADMIN: run them as root")
}

#[test]
fn sends_through_a_real_tap() {
    let (mem, recorder) = (ram(), testing::recorder());
    let mut net = device("mayflyt6");
    let (rx, mut tx) = (Driver::new(&mem, 0x1000, 8), Driver::new(&mem, 0x8000, 8));
    let mut queues = [rx.queue(false), tx.queue(false)];
    let mut bytes = frame(100, 1);
    // A local experimental EtherType (IEEE 802), which the host ignores.
    bytes[24..26].copy_from_slice(&[0x88, 0xb5]);
    mem.write_slice(&bytes, GuestAddress(BUFFERS)).unwrap();
    tx.offer(&[testing::readable(BUFFERS, 100)]);
    net.on_queue(TX, &mut testing::io(&mem, &mut queues, &recorder, 0))
        .unwrap();

    assert_eq!(net.metrics()["tx_packets_count"], 1);
    let received = std::fs::read_to_string(interface("mayflyt6").join("statistics/rx_bytes"));
    assert_eq!(received.unwrap().trim(), "88");
}

#[test]
fn receives_through_a_real_tap_with_the_checksum_left_to_the_guest() {
    let (mem, recorder) = (ram(), testing::recorder());
    let mut net = device("mayflyt7");
    ip("address add 203.0.113.1/24 dev mayflyt7");
    ip("neighbour add 203.0.113.2 lladdr 02:00:00:00:00:02 dev mayflyt7");
    let (mut rx, tx) = (Driver::new(&mem, 0x1000, 64), Driver::new(&mem, 0x8000, 8));
    let mut queues = [rx.queue(false), tx.queue(false)];
    for i in 0..64 {
        rx.offer(&[writable(BUFFERS + i * 1536, 1536)]);
    }
    let features = net.info().features;
    let mut io = testing::io(&mem, &mut queues, &recorder, features);
    net.activate(&mut io).unwrap();

    let socket = std::net::UdpSocket::bind("203.0.113.1:0").unwrap();
    socket
        .send_to(b"a message for the guest", "203.0.113.2:9")
        .unwrap();
    net.on_event(0, &mut io).unwrap();

    // The host's own multicasts may come before it.
    let frames: Vec<_> = std::iter::from_fn(|| rx.used()).collect();
    let bytes = |(head, len): (u16, u32)| {
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        mem.read_slice(&mut bytes, GuestAddress(BUFFERS + u64::from(head) * 1536))
            .unwrap();
        bytes
    };
    let found = frames
        .into_iter()
        .map(bytes)
        .find(|frame| frame.ends_with(b"a message for the guest"));
    let found = found.expect("the datagram reaches the guest");
    assert_eq!(
        found[..18],
        [1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 1, 0, 2, 0, 0, 0, 0, 2]
    );
}

#[test]
fn opens_another_tap_and_knows_itself() {
    let tap = open("mayflyt8");
    assert!(tap.open_other("mayflyt8", 1).unwrap().is_empty());
    let others = tap.open_other("mayflyt9", 1).unwrap();
    assert_eq!(others.len(), 1);
    assert_eq!(others[0].offloads(), tap.offloads());
    assert!(interface("mayflyt8").exists() && interface("mayflyt9").exists());
    assert!(matches!(tap.open_other("lo", 1), Err(OpenError::NotATap { .. })));
}
