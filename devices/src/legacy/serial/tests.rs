use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{FIFO_BYTES, MCR, MCR_LOOP, Metrics, Serial, State};
use crate::bus::BusDevice;
use crate::rate_limiter::TokenBucketConfig;
use crate::testing::{Recorder, recorder};
use crate::timer::{Clock, HostClock};

const RBR: u64 = 0;
const THR: u64 = 0;
const IER: u64 = 1;
const IIR: u64 = 2;
const LCR: u64 = 3;
const LSR: u64 = 5;
const SCRATCH: u64 = 7;

const IER_RECEIVED: u8 = 1;
const IER_SENT: u8 = 2;
const LSR_DATA_READY: u8 = 1;

#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Screen {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

struct Broken;

impl Write for Broken {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Port {
    serial: Serial,
    irq: EventFd,
    screen: Screen,
}

impl Port {
    fn new() -> Self {
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let screen = Screen::default();
        let serial = Serial::new(Box::new(screen.clone()), irq.try_clone().unwrap()).unwrap();
        Self { serial, irq, screen }
    }

    fn read(&mut self, port: u64) -> u8 {
        let mut data = [0];
        self.serial.read(port, &mut data);
        data[0]
    }

    fn write(&mut self, port: u64, value: u8) {
        self.serial.write(port, &[value]);
    }

    fn print(&mut self, text: &str) {
        text.bytes().for_each(|byte| self.write(THR, byte));
    }

    /// Limits the output to 10 bytes a second.
    fn limit(&mut self, clock: impl Clock + Send + 'static) {
        let bucket = TokenBucketConfig {
            size: 10,
            one_time_burst: None,
            refill_time: 1000,
        };
        self.serial.limit(&bucket, Box::new(clock));
    }

    fn drain(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while self.read(LSR) & LSR_DATA_READY != 0 {
            bytes.push(self.read(RBR));
        }
        bytes
    }

    fn interrupted(&self) -> bool {
        self.irq.read().is_ok()
    }

    fn room_signalled(&self) -> bool {
        self.serial.room().read().is_ok()
    }
}

#[test]
fn every_byte_of_output_arrives_at_once() {
    let mut port = Port::new();
    port.write(THR, b'#');
    assert_eq!(port.screen.text(), "#");
    port.write(THR, b' ');
    assert_eq!(port.screen.text(), "# ");
    assert_eq!(
        port.serial.counters().metrics(),
        Metrics {
            write_count: 2,
            flush_count: 2,
            ..Metrics::default()
        }
    );
}

#[test]
fn output_interrupts_when_the_guest_asked_for_it() {
    let mut port = Port::new();
    port.write(THR, b'a');
    assert!(!port.interrupted());
    port.write(IER, IER_SENT);
    assert!(port.interrupted());
    assert_eq!(port.read(IIR) & 0x0f, 0x02);
    port.write(THR, b'b');
    assert!(port.interrupted());
}

#[test]
fn a_failing_output_is_counted_and_the_guest_goes_on() {
    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    let mut serial = Serial::new(Box::new(Broken), irq.try_clone().unwrap()).unwrap();
    serial.write(IER, &[IER_SENT]);
    irq.read().unwrap();
    serial.read(IIR, &mut [0]);
    serial.write(THR, b"x");
    serial.write(THR, b"y");
    assert_eq!(
        serial.counters().metrics(),
        Metrics {
            error_count: 2,
            missed_write_count: 2,
            ..Metrics::default()
        }
    );
    assert_eq!(irq.read().unwrap(), 1);
}

#[test]
fn input_interrupts_and_reaches_the_guest_in_order() {
    let mut port = Port::new();
    port.write(IER, IER_RECEIVED);
    assert_eq!(port.serial.enqueue(b"ls\n"), 3);
    assert!(port.interrupted());
    assert_eq!(port.drain(), b"ls\n");
    assert_eq!(port.serial.counters().metrics().read_count, 3);
}

#[test]
fn input_is_announced_until_the_guest_has_read_all_of_it() {
    let mut port = Port::new();
    port.write(IER, IER_RECEIVED);
    port.serial.enqueue(b"a");
    assert_eq!(port.read(IIR) & 0xf, 4);
    // More comes before the guest reads, and it reads less than that in one go.
    port.serial.enqueue(b"bc");
    assert_eq!((port.read(RBR), port.read(IIR) & 0xf), (b'a', 4));
    assert_eq!(port.drain(), b"bc");
    assert_eq!(port.read(IIR) & 0xf, 1);
    // A divisor is not the interrupt enable register.
    port.write(LCR, 0x80);
    port.write(IER, 0);
    port.write(LCR, 0);
    port.serial.enqueue(b"d");
    assert_eq!((port.read(IIR) & 0xf, port.read(IIR) & 0xf), (4, 4));
    port.write(IER, 0);
    assert_eq!(port.read(IIR) & 0xf, 1);
}

#[test]
fn input_that_came_while_interrupts_were_masked_interrupts_on_unmask() {
    let mut port = Port::new();
    assert_eq!(port.serial.enqueue(b"x"), 1);
    assert!(!port.interrupted());
    port.write(IER, IER_RECEIVED);
    assert!(port.interrupted());
}

#[test]
fn input_beyond_the_fifo_stays_with_the_caller_until_room_is_signalled() {
    let mut port = Port::new();
    let input: Vec<u8> = (0..100).collect();
    assert_eq!(port.serial.enqueue(&input), FIFO_BYTES);
    assert_eq!(port.serial.enqueue(&input[FIFO_BYTES..]), 0);
    assert!(!port.serial.has_room());
    assert!(!port.room_signalled());

    let mut received = port.drain();
    assert!(port.room_signalled());
    assert!(port.serial.has_room());
    assert_eq!(port.serial.enqueue(&input[FIFO_BYTES..]), 100 - FIFO_BYTES);
    received.extend(port.drain());
    assert_eq!(received, input);
}

#[test]
fn room_is_signalled_only_to_a_caller_who_waits() {
    let mut port = Port::new();
    port.serial.enqueue(b"fits");
    port.drain();
    assert!(!port.room_signalled());
}

#[test]
fn input_waits_while_the_guest_tests_loopback() {
    let mut port = Port::new();
    port.write(MCR.into(), MCR_LOOP);
    assert!(!port.serial.has_room());
    assert_eq!(port.serial.enqueue(b"x"), 0);
    port.write(MCR.into(), 0);
    assert!(port.room_signalled());
    assert_eq!(port.serial.enqueue(b"x"), 1);
}

#[test]
fn loopback_output_comes_back_and_does_not_reach_the_host() {
    let mut port = Port::new();
    port.write(MCR.into(), MCR_LOOP);
    port.write(THR, b'z');
    assert_eq!(port.drain(), b"z");
    assert_eq!(port.screen.text(), "");
}

#[test]
fn wide_accesses_touch_consecutive_registers() {
    let mut port = Port::new();
    port.serial.write(LCR - 1, &[0, 0x1b]);
    port.write(SCRATCH, 0x5a);
    let mut data = [0; 4];
    port.serial.read(4, &mut data);
    assert_eq!(port.read(LCR), 0x1b);
    assert_eq!(data[3], 0x5a);
}

#[test]
fn accesses_outside_the_registers_are_counted() {
    let mut port = Port::new();
    port.serial.write(7, &[1, 2, 3]);
    port.serial.read(8, &mut [0]);
    port.serial.read(u64::MAX, &mut [0; 8]);
    let metrics = port.serial.counters().metrics();
    assert_eq!((metrics.missed_write_count, metrics.missed_read_count), (2, 2));
}

#[test]
fn a_saved_port_goes_on_where_it_stopped() {
    let mut port = Port::new();
    port.write(IER, IER_RECEIVED);
    port.write(SCRATCH, 0xa5);
    port.serial.enqueue(b"pending");
    let saved = serde_json::to_string(&port.serial.save()).unwrap();

    let mut restored = Port::new();
    restored
        .serial
        .load(serde_json::from_str(&saved).unwrap())
        .unwrap();
    assert!(restored.interrupted());
    assert_eq!(restored.read(SCRATCH), 0xa5);
    assert_eq!(restored.drain(), b"pending");
    restored.write(THR, b'k');
    assert_eq!(restored.screen.text(), "k");
}

#[test]
fn a_state_with_more_input_than_the_fifo_holds_is_refused() {
    let mut port = Port::new();
    let before = port.serial.save();
    let bad = State {
        in_buffer: vec![0; FIFO_BYTES + 1],
        ..before.clone()
    };
    let error = port.serial.load(bad).unwrap_err();
    assert_eq!((error.field, error.value.as_str()), ("length of in_buffer", "65"));
    assert_eq!(port.serial.save(), before);
}

#[test]
fn a_state_with_unknown_interrupts_is_refused() {
    let mut port = Port::new();
    let bad = State {
        interrupt_enable: 0x10,
        ..port.serial.save()
    };
    assert_eq!(port.serial.load(bad).unwrap_err().field, "interrupt_enable");
}

/// A clock that tests turn on.
struct Turned(Arc<Recorder>);

impl Clock for Turned {
    fn now(&self) -> std::time::Instant {
        self.0.now()
    }
}

#[test]
fn output_beyond_its_limit_is_dropped_and_counted_and_the_guest_goes_on() {
    let (mut port, time) = (Port::new(), recorder());
    port.limit(Turned(time.clone()));
    port.write(IER, IER_SENT);
    port.print("0123456789dropped");
    time.pass(Duration::from_millis(250));
    port.print("abc");
    assert_eq!(port.screen.text(), "0123456789ab");
    assert!(port.interrupted());
    assert_eq!(
        port.serial.counters().metrics(),
        Metrics {
            write_count: 12,
            flush_count: 12,
            rate_limiter_dropped_bytes: 8,
            ..Metrics::default()
        }
    );
}

#[test]
fn a_disabled_limit_is_none() {
    let mut port = Port::new();
    let disabled = TokenBucketConfig {
        size: 0,
        one_time_burst: None,
        refill_time: 1,
    };
    port.serial.limit(&disabled, Box::new(HostClock));
    port.print("all of it");
    assert_eq!(port.screen.text(), "all of it");
}

#[test]
fn a_restored_port_has_no_new_bucket() {
    let (mut port, time) = (Port::new(), recorder());
    port.limit(Turned(time.clone()));
    port.print("01234567");
    let saved = port.serial.save();

    let mut restored = Port::new();
    let error = restored.serial.load(saved.clone()).unwrap_err();
    assert_eq!(error.field, "rate_limiter");
    restored.limit(Turned(time));
    restored.serial.load(saved).unwrap();
    restored.print("abc");
    assert_eq!(restored.screen.text(), "ab");
    assert_eq!(restored.serial.counters().metrics().write_count, 2);
}
