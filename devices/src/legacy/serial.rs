//! The first serial port (COM1): a 16550A UART, the guest's console.
//!
//! The register model is `vm-superio`'s; this file gives it a bus, a host side and a state. The bus
//! calls it on vCPU threads; the control thread calls [`Serial::enqueue`] with host input, and waits
//! for [`Serial::room`] whenever the guest did not take all of it.
//!
//! Every byte goes to the output at once, with one write each: a prompt has no newline to wait for
//! and a guest that crashes must not take its last words with it. Hand over the bare file (not
//! `std::io::Stdout`, which adds a lock and a buffer for nothing).
//!
//! A failing output is counted and never stops the guest. Blocking is up to the output: a stdout pipe
//! that nobody reads holds the writing vCPU until somebody does, like a terminal stopped by Ctrl-S, or
//! until a signal comes, which costs the byte. Who must not wait for this device's lock meanwhile has the
//! [`Counters`]. A file opened with `O_NONBLOCK` loses the bytes that do not fit instead. [`Serial::limit`] bounds the bytes written; those beyond the limit are dropped and counted.

mod limit;

use std::convert::Infallible;
use std::io::{self, Write};
use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{SerialEvents, SerialState};
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::limit::Limited;
use super::{InvalidState, read_bytes, write_bytes};
use crate::bus::BusDevice;
use crate::rate_limiter::{BucketState, TokenBucket, TokenBucketConfig};
use crate::timer::Clock;

/// Size of the register window, in ports.
pub const PORTS: u64 = 8;

/// Bytes that the receive FIFO of the register model holds.
const FIFO_BYTES: usize = 64;
/// Interrupt enable register and its bit for received data.
const IER: u8 = 1;
const IER_RECEIVED: u8 = 1;
/// Interrupt identification register: nothing pending, received data.
const IIR: u8 = 2;
const IIR_NONE: u8 = 1;
const IIR_RECEIVED: u8 = 4;
/// Line control register and its bit that puts the divisor in the place of other registers.
const LCR: u8 = 3;
const LCR_DIVISOR: u8 = 1 << 7;
/// Modem control register and its loopback bit.
const MCR: u8 = 4;
const MCR_LOOP: u8 = 1 << 4;
/// The interrupts that a 16550A has.
const IER_BITS: u8 = 0x0f;

/// Where the guest's output goes.
pub type Output = Box<dyn Write + Send>;

/// Counters since the device was made.
#[derive(Serialize, Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Metrics {
    /// Failures to write the output or to raise the interrupt.
    pub error_count: u64,
    /// Flushes of the output.
    pub flush_count: u64,
    /// Reads of ports that the device does not have.
    pub missed_read_count: u64,
    /// Writes that were lost: the output failed, or the device has no such port.
    pub missed_write_count: u64,
    /// Bytes of host input that the guest read.
    pub read_count: u64,
    /// Bytes of guest output written.
    pub write_count: u64,
    /// Bytes of guest output dropped by the rate limiter.
    pub rate_limiter_dropped_bytes: u64,
}

/// What a snapshot keeps.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Divisor latch, low byte.
    pub baud_divisor_low: u8,
    /// Divisor latch, high byte.
    pub baud_divisor_high: u8,
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Host input that the guest has not read yet, oldest first.
    pub in_buffer: Vec<u8>,
    /// What is left of the limit of the output.
    pub rate_limiter: Option<BucketState>,
}

/// The serial port.
pub struct Serial {
    uart: Uart<Interrupt, Arc<Host>, Limited>,
    host: Arc<Host>,
    loopback: bool,
    /// Received data interrupts.
    receives: bool,
}

/// The counters of a port, which it goes on counting in.
#[derive(Default)]
pub struct Counters {
    errors: AtomicU64,
    bytes_read: AtomicU64,
    /// What the register model takes for written: with what was dropped.
    bytes_written: AtomicU64,
    bytes_dropped: AtomicU64,
    reads_missed: AtomicU64,
    /// With the bytes that the output did not take.
    writes_missed: AtomicU64,
}

impl Counters {
    /// Their values.
    pub fn metrics(&self) -> Metrics {
        let dropped = get(&self.bytes_dropped);
        let written = get(&self.bytes_written).saturating_sub(dropped);
        Metrics {
            error_count: get(&self.errors),
            flush_count: written,
            missed_read_count: get(&self.reads_missed),
            missed_write_count: get(&self.writes_missed),
            read_count: get(&self.bytes_read),
            write_count: written,
            rate_limiter_dropped_bytes: dropped,
        }
    }
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

/// What the register model calls back: the interrupt, the host's wait for room and the counters.
/// Shared between `Serial` and its model, which lends no mutable access to it.
struct Host {
    irq: EventFd,
    room: EventFd,
    awaits_room: AtomicBool,
    counters: Arc<Counters>,
}

/// The interrupt line. It cannot fail for the model, so that a restore cannot fail half-way.
struct Interrupt(Arc<Host>);

impl Trigger for Interrupt {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        if let Err(error) = self.0.irq.write(1) {
            self.0.count_error("raise the interrupt", &error);
        }
        Ok(())
    }
}

impl SerialEvents for Host {
    fn buffer_read(&self) {
        add(&self.counters.bytes_read, 1);
    }

    fn out_byte(&self) {
        add(&self.counters.bytes_written, 1);
    }

    fn tx_lost_byte(&self) {
        add(&self.counters.writes_missed, 1);
    }

    fn in_buffer_empty(&self) {
        self.offer_room();
    }
}

impl Host {
    fn offer_room(&self) {
        if self.awaits_room.swap(false, Ordering::Relaxed) {
            // It fails only when the counter is full, and then the reader is awake already.
            let _ = self.room.write(1);
        }
    }

    fn count_error(&self, action: &str, error: &io::Error) {
        if self.counters.errors.fetch_add(1, Ordering::Relaxed) == 0 {
            log::warn!("serial port: failed to {action}: {error}; further failures are only counted");
        }
    }
}

impl Serial {
    /// Makes a port after power-on that writes to `out` and raises its interrupt by writing `irq`.
    ///
    /// # Errors
    /// Fails when no eventfd can be made.
    pub fn new(out: Output, irq: EventFd) -> io::Result<Self> {
        let host = Arc::new(Host {
            irq,
            room: EventFd::new(EFD_NONBLOCK)?,
            awaits_room: AtomicBool::new(false),
            counters: Arc::default(),
        });
        let out = Limited::new(out, Arc::clone(&host.counters));
        Ok(Self {
            uart: Uart::with_events(Interrupt(host.clone()), host.clone(), out),
            host,
            loopback: false,
            receives: false,
        })
    }

    /// Limits the bytes of output from now on, unless `bucket` is disabled. What is beyond the limit is dropped, as the
    /// guest must not wait for it.
    pub fn limit(&mut self, bucket: &TokenBucketConfig, clock: Box<dyn Clock + Send>) {
        if let Some(bucket) = TokenBucket::new(bucket) {
            self.uart.writer_mut().set_limit(bucket, clock);
        }
    }

    /// Puts host input into the receive FIFO and returns how many bytes it took, from the front.
    ///
    /// The rest stays with the caller, who offers it again after [`Serial::room`] was signalled.
    pub fn enqueue(&mut self, bytes: &[u8]) -> usize {
        // The model takes nothing in loopback mode and answers an error when the FIFO is full.
        let taken = self.uart.enqueue_raw_bytes(bytes).unwrap_or(0);
        if taken < bytes.len() {
            self.host.awaits_room.store(true, Ordering::Relaxed);
        }
        taken
    }

    /// Whether [`Serial::enqueue`] would take a byte now. A "no" also asks for a signal of [`Serial::room`].
    pub fn has_room(&self) -> bool {
        let has_room = !self.loopback && self.uart.fifo_capacity() > 0;
        if !has_room {
            self.host.awaits_room.store(true, Ordering::Relaxed);
        }
        has_room
    }

    /// The eventfd (non-blocking) that says room came back after input was refused.
    pub fn room(&self) -> &EventFd {
        &self.host.room
    }

    /// The counters.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.host.counters)
    }

    /// The state for a snapshot.
    pub fn save(&self) -> State {
        State {
            rate_limiter: self.uart.writer().save(),
            ..self.uart.state().into()
        }
    }

    /// Takes over a saved state and raises the interrupt again if it was pending.
    ///
    /// # Errors
    /// Fails, and changes nothing, when `state` is not one that a port can be in.
    pub fn load(&mut self, state: State) -> Result<(), InvalidState> {
        let check = |valid, field, value| InvalidState::unless(valid, "serial port", field, value);
        let fifo = state.in_buffer.len();
        check(fifo <= FIFO_BYTES, "length of in_buffer", fifo)?;
        let enabled = state.interrupt_enable;
        check(enabled & !IER_BITS == 0, "interrupt_enable", enabled.into())?;

        let limit = self.uart.writer_mut().load(state.rate_limiter);
        limit.map_err(|error| InvalidState {
            device: "serial port",
            field: "rate_limiter",
            value: error.to_string(),
        })?;

        self.loopback = state.modem_control & MCR_LOOP != 0;
        self.receives = enabled & IER_RECEIVED != 0;
        let out = mem::replace(
            self.uart.writer_mut(),
            Limited::new(Box::new(io::sink()), Arc::default()),
        );
        let interrupt = Interrupt(self.host.clone());
        self.uart = Uart::from_state(&state.into(), interrupt, self.host.clone(), out)
            .expect("the FIFO fits, as checked, and the interrupt cannot fail");
        self.host.offer_room();
        Ok(())
    }

    fn read_register(&mut self, register: u8) -> u8 {
        let value = self.uart.read(register);
        // The model forgets the interrupt at the first byte read. Drivers read so many bytes and look again: what came
        // meanwhile would wait for ever.
        if register == IIR && self.receives && self.uart.fifo_capacity() < FIFO_BYTES {
            return value & !IIR_NONE | IIR_RECEIVED;
        }
        value
    }

    fn write_register(&mut self, register: u8, value: u8) {
        if register == IER && self.uart.read(LCR) & LCR_DIVISOR == 0 {
            self.receives = value & IER_RECEIVED != 0;
        }
        if let Err(vm_superio::serial::Error::IOError(error)) = self.uart.write(register, value) {
            self.host.count_error("write the guest's output", &error);
        }
        if register == MCR {
            self.loopback = value & MCR_LOOP != 0;
            if !self.loopback {
                self.host.offer_room();
            }
        }
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |port| match register(port) {
            Some(register) => self.read_register(register),
            None => {
                add(&self.host.counters.reads_missed, 1);
                0xff
            }
        });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |port, value| match register(port) {
            Some(register) => self.write_register(register, value),
            None => add(&self.host.counters.writes_missed, 1),
        });
    }
}

fn register(port: u64) -> Option<u8> {
    u8::try_from(port)
        .ok()
        .filter(|register| u64::from(*register) < PORTS)
}

impl From<SerialState> for State {
    fn from(state: SerialState) -> Self {
        Self {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
            rate_limiter: None,
        }
    }
}

impl From<State> for SerialState {
    fn from(state: State) -> Self {
        Self {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        }
    }
}

#[cfg(test)]
mod tests;
