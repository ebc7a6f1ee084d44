//! A guest that sends anything to the metadata service, in frames that are mostly right, while time passes: nothing
//! panics, what comes back are frames that an ordinary network carries, and nobody is waited for without end.
#![no_main]

use std::sync::Arc;
use std::time::Duration;

use arbitrary::Arbitrary;
use devices::mmds::{Config, MAC, Mmds, Now, Stack, Store};
use libfuzzer_sys::fuzz_target;

/// The longest frame of an ordinary Ethernet.
const FRAME_LEN: usize = 1514;
/// Waits after which every connection must have been given up: each is silent for a minute at most, and the shortest
/// wait between two attempts to be heard is longer than this fraction of it.
const WAITS: usize = 1000;

#[derive(Arbitrary, Debug)]
enum Step {
    /// A segment on the connection of a port, with flags, its data, and how far its numbers are off.
    Segment {
        port: u8,
        flags: u8,
        data: Data,
        seq_off: i8,
        ack_off: i8,
        window: u16,
    },
    /// A segment with any numbers and options.
    Odd {
        port: u16,
        numbers: (u32, u32),
        flags: u8,
        options: Vec<u8>,
    },
    /// Bytes behind the address of the service.
    Raw(Vec<u8>),
    Arp(u8),
    Wait(u16),
    /// The guest takes as many frames.
    Take(u8),
    Reset,
}

#[derive(Arbitrary, Debug)]
enum Data {
    Nothing,
    Get,
    Long,
    Token,
    Any(Vec<u8>),
}

impl Data {
    fn bytes(&self) -> &[u8] {
        match self {
            Data::Nothing => b"",
            Data::Get => b"GET /a HTTP/1.1\r\n\r\n",
            Data::Long => b"GET /long HTTP/1.1\r\n\r\n",
            Data::Token => b"PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 9\r\n\r\n",
            Data::Any(bytes) => &bytes[..bytes.len().min(1000)],
        }
    }
}

/// What the guest knows of a connection: its own next number, and the service's.
#[derive(Clone, Copy, Default)]
struct Numbers {
    seq: u32,
    ack: u32,
}

struct Guest {
    stack: Stack,
    now: Duration,
    peers: [Numbers; 256],
}

/// An IPv4 frame to the service around a TCP header and what is behind it.
fn frame(port: u16, numbers: Numbers, flags: u8, window: u16, options: &[u8], data: &[u8]) -> Vec<u8> {
    let options = &options[..options.len().min(40) / 4 * 4];
    let header_len = 20 + options.len();
    let total = u16::try_from(20 + header_len + data.len()).expect("short data");
    let mut ip = vec![0x45, 0];
    ip.extend_from_slice(&total.to_be_bytes());
    ip.extend_from_slice(&[0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 2, 169, 254, 169, 254]);
    let sum: u32 = ip
        .chunks(2)
        .map(|two| u32::from(two[0]) << 8 | u32::from(two[1]))
        .sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut frame = [&MAC[..], &[6, 0, 0, 0, 0, 2, 8, 0], &ip].concat();
    frame.extend_from_slice(&port.to_be_bytes());
    frame.extend_from_slice(&80u16.to_be_bytes());
    frame.extend_from_slice(&numbers.seq.to_be_bytes());
    frame.extend_from_slice(&numbers.ack.to_be_bytes());
    frame.extend_from_slice(&[(header_len << 2) as u8, flags]);
    frame.extend_from_slice(&window.to_be_bytes());
    frame.extend_from_slice(&[0; 4]);
    frame.extend_from_slice(options);
    frame.extend_from_slice(data);
    frame
}

impl Guest {
    fn new() -> Self {
        let config: Config = serde_json::from_str(r#"{"network_interfaces":["a"]}"#).expect("a config");
        let store = Store::new(1 << 20);
        store
            .put(serde_json::json!({"a": "b", "long": "x".repeat(100_000)}))
            .expect("it fits");
        let now = Duration::from_secs(1);
        Self {
            stack: Stack::new(Arc::new(Mmds::new(config, Arc::new(store))), 7, now),
            now,
            peers: [Numbers::default(); 256],
        }
    }

    fn time(&self) -> Now {
        Now {
            interface: self.now,
            tokens: self.now,
        }
    }

    fn send(&mut self, frame: &[u8]) {
        self.stack.receive(frame, self.time());
    }

    fn take(&mut self, count: usize) {
        for _ in 0..count {
            let Some(frame) = self.stack.take_frame(self.time()) else {
                return;
            };
            assert!((42..=FRAME_LEN).contains(&frame.len()) && frame[6..12] == MAC);
            if frame.len() >= 54 && frame[12..14] == [8, 0] {
                let word = |at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().expect("four bytes"));
                let data = frame.len() - 34 - usize::from(frame[46] >> 4) * 4;
                let marks = u32::from(frame[47] & 1) + u32::from(frame[47] >> 1 & 1);
                // The guest believes everything, and asks for no repetition.
                self.peers[usize::from(frame[37])].ack = word(38).wrapping_add(data as u32 + marks);
            }
        }
    }

    fn run(&mut self, step: &Step) {
        match step {
            Step::Segment {
                port,
                flags,
                data,
                seq_off,
                ack_off,
                window,
            } => {
                let known = &mut self.peers[usize::from(*port)];
                let sent = data.bytes().len() as u32 + u32::from(flags & 1) + u32::from(flags >> 1 & 1);
                let numbers = Numbers {
                    seq: known.seq.wrapping_add_signed(i32::from(*seq_off)),
                    ack: known.ack.wrapping_add_signed(i32::from(*ack_off)),
                };
                known.seq = numbers.seq.wrapping_add(sent);
                let frame = frame(
                    0x400 + u16::from(*port),
                    numbers,
                    *flags,
                    *window,
                    &[],
                    data.bytes(),
                );
                self.send(&frame);
            }
            Step::Odd {
                port,
                numbers: (seq, ack),
                flags,
                options,
            } => {
                let numbers = Numbers { seq: *seq, ack: *ack };
                self.send(&frame(*port, numbers, *flags, 1000, options, options));
            }
            Step::Raw(bytes) => {
                let mut frame = frame(1024, Numbers::default(), 2, 1000, &[], b"");
                frame.truncate(34);
                frame.extend_from_slice(bytes);
                let total = (frame.len() - 14).min(0xffff) as u16;
                frame[16..18].copy_from_slice(&total.to_be_bytes());
                self.send(&frame);
                self.send(bytes);
            }
            Step::Arp(operation) => {
                let arp = [0, 1, 8, 0, 6, 4, 0, *operation, 6, 0, 0, 0, 0, 2, 10, 0, 0, 2];
                let target = [0, 0, 0, 0, 0, 0, 169, 254, 169, 254];
                self.send(&[&[0xff; 6][..], &[6, 0, 0, 0, 0, 2, 8, 6], &arp, &target].concat());
            }
            Step::Wait(millis) => {
                self.now += Duration::from_millis(u64::from(*millis));
                self.stack.work(self.time());
            }
            Step::Take(count) => self.take(usize::from(*count)),
            Step::Reset => self.stack.reset(),
        }
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let mut guest = Guest::new();
    for step in &steps {
        guest.run(step);
    }
    // A guest that is silent from now on is forgotten.
    for _ in 0..WAITS {
        guest.take(usize::MAX);
        match guest.stack.next_work(guest.now) {
            Some(delay) => guest.now += delay,
            None => return,
        }
        guest.stack.work(guest.time());
    }
    panic!("the service still waits for a guest that is gone");
});
