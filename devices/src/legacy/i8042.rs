//! The i8042 keyboard controller: the guest's reset button, and the host's Ctrl-Alt-Del.
//!
//! The bus maps ports 0x60..0x65 and calls it on vCPU threads; the control thread calls
//! [`I8042::trigger_ctrl_alt_del`]. There is a keyboard and no mouse: probing for one is answered at
//! once with "nothing connected", because silence would cost Linux half a second per probe with
//! interrupts off. Translation covers the scan codes that this keyboard can send.
//!
//! Replies of the controller itself are polled for by all known drivers and raise no interrupt.

mod keyboard;

use std::io;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use self::keyboard::{CTRL_ALT_DEL, Keyboard};
use super::{InvalidState, read_bytes, write_bytes};
use crate::bus::BusDevice;

/// Size of the register window, in ports.
pub const PORTS: u64 = 5;

/// Port 0x60: read the output buffer, write the keyboard or a command's parameter.
const DATA: u64 = 0;
/// Port 0x64: read the status, write a command.
const COMMAND: u64 = 4;

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_COMMAND: u8 = 1 << 3;
const STATUS_UNLOCKED: u8 = 1 << 4;
const STATUS_AUX: u8 = 1 << 5;

const CTR_KEYBOARD_INTERRUPT: u8 = 1 << 0;
const CTR_SYSTEM: u8 = 1 << 2;
const CTR_KEYBOARD_OFF: u8 = 1 << 4;
const CTR_AUX_OFF: u8 = 1 << 5;
const CTR_TRANSLATE: u8 = 1 << 6;
/// What the self test leaves: translation on, both interfaces off, no interrupts.
const CTR_AFTER_TEST: u8 = CTR_SYSTEM | CTR_KEYBOARD_OFF | CTR_AUX_OFF | CTR_TRANSLATE;

/// Bit 0 of the output port is the CPU's reset line, active low; bit 1 opens the A20 gate.
const OUTPUT_NO_RESET: u8 = 1 << 0;
const OUTPUT_A20: u8 = 1 << 1;

const SELF_TEST_PASSED: u8 = 0x55;
const KEYBOARD_LINE_GOOD: u8 = 0x00;
const AUX_CLOCK_STUCK: u8 = 0x01;
const NO_AUX_DEVICE: u8 = 0xfe;

/// What precedes the code of a released key in scan code set 2.
const BREAK_PREFIX: u8 = 0xf0;

/// Counters since the device was made.
#[derive(Serialize, Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Metrics {
    /// Unknown commands, lost keyboard answers and failures to raise an interrupt.
    pub error_count: u64,
    /// Reads of ports in the window that are not the controller's.
    pub missed_read_count: u64,
    /// Writes to ports in the window that are not the controller's.
    pub missed_write_count: u64,
    /// Reads of the controller's ports.
    pub read_count: u64,
    /// Resets that the guest asked for.
    pub reset_count: u64,
    /// Writes to the controller's ports.
    pub write_count: u64,
}

/// Why Ctrl-Alt-Del could not be typed.
#[derive(Debug, thiserror::Error)]
pub enum CtrlAltDelError {
    /// The guest has no keyboard driver running (yet).
    #[error(
        "the guest has not enabled its keyboard: wait until its i8042 driver is up, or press the power button"
    )]
    KeyboardOff,
    /// The guest has not read what was typed before.
    #[error("the keyboard queue is full: the guest has not yet read what was typed before, try again later")]
    QueueFull,
    /// The interrupt's eventfd refused.
    #[error("failed to raise the keyboard interrupt")]
    Interrupt {
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// A byte that the controller itself puts into the output buffer.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
struct Reply {
    byte: u8,
    aux: bool,
}

/// The command whose parameter the next write to the data port is.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
enum Parameter {
    Ctr,
    OutputPort,
    KeyboardLoop,
    AuxLoop,
    AuxSend,
}

/// What a snapshot keeps.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct State {
    ctr: u8,
    output_port: u8,
    reply: Option<Reply>,
    parameter: Option<Parameter>,
    last_write_was_command: bool,
    keyboard: Keyboard,
}

/// The controller with its keyboard.
pub struct I8042 {
    state: State,
    metrics: Metrics,
    reset: EventFd,
    irq: EventFd,
}

impl I8042 {
    /// Makes a controller after power-on. It writes `reset` when the guest resets the machine and
    /// `irq` for the keyboard's interrupt (IRQ 1, edge-triggered).
    pub fn new(reset: EventFd, irq: EventFd) -> Self {
        let state = State {
            ctr: CTR_AFTER_TEST,
            output_port: OUTPUT_NO_RESET | OUTPUT_A20,
            reply: None,
            parameter: None,
            last_write_was_command: false,
            keyboard: Keyboard::new(),
        };
        Self {
            state,
            metrics: Metrics::default(),
            reset,
            irq,
        }
    }

    /// Presses and releases Ctrl-Alt-Del.
    ///
    /// # Errors
    /// Fails, with nothing typed, while the guest has its keyboard off or has not read earlier keys.
    pub fn trigger_ctrl_alt_del(&mut self) -> Result<(), CtrlAltDelError> {
        let on = self.state.ctr & (CTR_KEYBOARD_OFF | CTR_KEYBOARD_INTERRUPT) == CTR_KEYBOARD_INTERRUPT;
        if !on || !self.state.keyboard.scanning {
            return Err(CtrlAltDelError::KeyboardOff);
        }
        if !self.state.keyboard.send(&CTRL_ALT_DEL) {
            return Err(CtrlAltDelError::QueueFull);
        }
        self.irq
            .write(1)
            .map_err(|source| CtrlAltDelError::Interrupt { source })
    }

    /// The counters.
    pub fn metrics(&self) -> Metrics {
        self.metrics
    }

    /// The state for a snapshot.
    pub fn save(&self) -> State {
        self.state.clone()
    }

    /// Takes over a saved state and raises the interrupt again if a key was waiting.
    ///
    /// # Errors
    /// Fails, and changes nothing, when `state` is not one that the controller can be in.
    pub fn load(&mut self, state: State) -> Result<(), InvalidState> {
        if let Some((field, value)) = state.keyboard.invalid_field() {
            return Err(InvalidState {
                device: "i8042",
                field,
                value,
            });
        }
        self.state = state;
        self.raise_for_key();
        Ok(())
    }

    fn key_waits(&self) -> bool {
        self.state.ctr & CTR_KEYBOARD_OFF == 0 && !self.state.keyboard.queue.is_empty()
    }

    fn raise_for_key(&mut self) {
        let enabled = self.state.ctr & CTR_KEYBOARD_INTERRUPT != 0;
        if enabled && self.key_waits() && self.irq.write(1).is_err() {
            self.metrics.error_count += 1;
        }
    }

    fn status(&self) -> u8 {
        let mut status = STATUS_UNLOCKED;
        if self.state.ctr & CTR_SYSTEM != 0 {
            status |= STATUS_SYSTEM;
        }
        if self.state.last_write_was_command {
            status |= STATUS_COMMAND;
        }
        match self.state.reply {
            Some(reply) if reply.aux => status | STATUS_OUTPUT_FULL | STATUS_AUX,
            Some(_) => status | STATUS_OUTPUT_FULL,
            None if self.key_waits() => status | STATUS_OUTPUT_FULL,
            None => status,
        }
    }

    /// Empties the output buffer: a reply first, so that a key cannot be taken for it.
    fn read_data(&mut self) -> u8 {
        if let Some(reply) = self.state.reply.take() {
            self.raise_for_key();
            return reply.byte;
        }
        if !self.key_waits() {
            return 0;
        }
        let byte = self.take_key();
        self.raise_for_key();
        byte
    }

    /// Takes the next byte of the keyboard, in scan code set 1 if translation is on.
    fn take_key(&mut self) -> u8 {
        let translate_codes = self.state.ctr & CTR_TRANSLATE != 0;
        let mut release = 0;
        // The keyboard queues whole codes, so a break prefix never stands last.
        while let Some(byte) = self.state.keyboard.take() {
            match byte {
                BREAK_PREFIX if translate_codes => release = 0x80,
                _ if translate_codes => return translate(byte) | release,
                _ => return byte,
            }
        }
        0
    }

    fn reply(&mut self, byte: u8) {
        self.state.reply = Some(Reply { byte, aux: false });
    }

    fn reply_aux(&mut self, byte: u8) {
        self.state.reply = Some(Reply { byte, aux: true });
    }

    fn command(&mut self, command: u8) {
        self.state.last_write_was_command = true;
        self.state.parameter = None;
        match command {
            0x20 => self.reply(self.state.ctr),
            0x60 => self.state.parameter = Some(Parameter::Ctr),
            0xa7 => self.set_ctr(self.state.ctr | CTR_AUX_OFF),
            0xa8 => self.set_ctr(self.state.ctr & !CTR_AUX_OFF),
            0xa9 => self.reply(AUX_CLOCK_STUCK),
            0xaa => {
                self.set_ctr(CTR_AFTER_TEST);
                self.reply(SELF_TEST_PASSED);
            }
            0xab => self.reply(KEYBOARD_LINE_GOOD),
            0xad => self.set_ctr(self.state.ctr | CTR_KEYBOARD_OFF),
            0xae => self.set_ctr(self.state.ctr & !CTR_KEYBOARD_OFF),
            0xd0 => self.reply(self.state.output_port),
            0xd1 => self.state.parameter = Some(Parameter::OutputPort),
            0xd2 => self.state.parameter = Some(Parameter::KeyboardLoop),
            0xd3 => self.state.parameter = Some(Parameter::AuxLoop),
            0xd4 => self.state.parameter = Some(Parameter::AuxSend),
            // Pulses the output port's lines whose bit is clear; only the reset line matters.
            0xf0..=0xff if command & OUTPUT_NO_RESET == 0 => self.reset_machine(),
            0xf0..=0xff => {}
            _ => self.metrics.error_count += 1,
        }
    }

    fn write_data(&mut self, value: u8) {
        self.state.last_write_was_command = false;
        match self.state.parameter.take() {
            Some(Parameter::Ctr) => self.set_ctr(value),
            Some(Parameter::OutputPort) => {
                self.state.output_port = value | OUTPUT_NO_RESET;
                if value & OUTPUT_NO_RESET == 0 {
                    self.reset_machine();
                }
            }
            Some(Parameter::KeyboardLoop) => self.reply(value),
            Some(Parameter::AuxLoop | Parameter::AuxSend) => self.reply_aux(NO_AUX_DEVICE),
            None => self.write_keyboard(value),
        }
    }

    fn write_keyboard(&mut self, value: u8) {
        // Talking to the keyboard turns its interface on.
        self.state.ctr &= !CTR_KEYBOARD_OFF;
        if !self.state.keyboard.receive(value) {
            self.metrics.error_count += 1;
        }
        self.raise_for_key();
    }

    fn set_ctr(&mut self, value: u8) {
        self.state.ctr = value;
        self.raise_for_key();
    }

    fn reset_machine(&mut self) {
        self.metrics.reset_count += 1;
        if let Err(error) = self.reset.write(1) {
            self.metrics.error_count += 1;
            log::error!("i8042: failed to signal the guest's reset: {error}");
        }
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |port| {
            match port {
                DATA | COMMAND => self.metrics.read_count += 1,
                _ => self.metrics.missed_read_count += 1,
            }
            match port {
                DATA => self.read_data(),
                COMMAND => self.status(),
                _ => 0xff,
            }
        });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |port, value| {
            match port {
                DATA | COMMAND => self.metrics.write_count += 1,
                _ => self.metrics.missed_write_count += 1,
            }
            match port {
                DATA => self.write_data(value),
                COMMAND => self.command(value),
                _ => {}
            }
        });
    }
}

/// Scan code set 2 to set 1, for the bytes that the keyboard sends; answers stay as they are.
fn translate(byte: u8) -> u8 {
    match byte {
        0x14 => 0x1d,        // Ctrl
        0x11 => 0x38,        // Alt
        0x71 => 0x53,        // Delete
        0x83 | 0x02 => 0x41, // second byte of the identity; number of the scan code set
        other => other,
    }
}

#[cfg(test)]
mod tests;
