//! The PS/2 keyboard behind the controller: answers commands, types Ctrl-Alt-Del, and nothing else.
//!
//! It speaks scan code set 2 only. The controller calls it; it knows neither ports nor interrupts.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Bytes that the keyboard keeps until the controller takes them.
pub(super) const QUEUE_BYTES: usize = 16;

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const ECHO: u8 = 0xee;
const TEST_PASSED: u8 = 0xaa;
const IDENTITY: [u8; 2] = [0xab, 0x83];
const SCAN_CODE_SET: u8 = 2;

const SET_LEDS: u8 = 0xed;
const SCAN_CODES: u8 = 0xf0;
const IDENTIFY: u8 = 0xf2;
const SET_RATE: u8 = 0xf3;
const ENABLE: u8 = 0xf4;
const DISABLE: u8 = 0xf5;
const SET_DEFAULTS: u8 = 0xf6;
const RESET: u8 = 0xff;

/// Left Ctrl, left Alt and Delete pressed in this order and released in the opposite one.
pub(super) const CTRL_ALT_DEL: [u8; 11] = [
    0x14, 0x11, 0xe0, 0x71, // make
    0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14, // break
];

/// The keyboard, which is also what a snapshot keeps of it.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq)]
#[serde(deny_unknown_fields)]
pub(super) struct Keyboard {
    /// Bytes on their way to the controller, oldest first.
    pub(super) queue: VecDeque<u8>,
    /// Whether keys are reported.
    pub(super) scanning: bool,
    /// The command whose argument comes next.
    pub(super) command: Option<u8>,
    /// The byte to send again on request.
    pub(super) last_sent: u8,
}

impl Keyboard {
    pub(super) fn new() -> Self {
        Self {
            queue: VecDeque::new(),
            scanning: true,
            command: None,
            last_sent: 0,
        }
    }

    /// Takes a byte from the host and queues the answer. Returns whether the queue had room for it.
    pub(super) fn receive(&mut self, byte: u8) -> bool {
        // A command in place of an argument starts anew.
        match self.command.take() {
            Some(command) if byte < SET_LEDS => self.argument(command, byte),
            _ => self.start(byte),
        }
    }

    /// Queues `bytes`, all or none.
    pub(super) fn send(&mut self, bytes: &[u8]) -> bool {
        let fits = self.queue.len() + bytes.len() <= QUEUE_BYTES;
        if fits {
            self.queue.extend(bytes);
        }
        fits
    }

    /// Hands the oldest byte to the controller.
    pub(super) fn take(&mut self) -> Option<u8> {
        let byte = self.queue.pop_front()?;
        self.last_sent = byte;
        Some(byte)
    }

    fn start(&mut self, command: u8) -> bool {
        match command {
            SET_LEDS | SET_RATE | SCAN_CODES => {
                self.command = Some(command);
                self.send(&[ACK])
            }
            ECHO => self.send(&[ECHO]),
            IDENTIFY => self.send(&[ACK, IDENTITY[0], IDENTITY[1]]),
            RESEND => self.send(&[self.last_sent]),
            RESET => {
                *self = Self::new();
                self.send(&[ACK, TEST_PASSED])
            }
            ENABLE | DISABLE | SET_DEFAULTS => {
                self.queue.clear();
                self.scanning = command != DISABLE;
                self.send(&[ACK])
            }
            // Make, break and repeat of all keys, or of those that follow: accepted without effect.
            0xf7..=0xfa => self.send(&[ACK]),
            _ => self.send(&[RESEND]),
        }
    }

    fn argument(&mut self, command: u8, value: u8) -> bool {
        match (command, value) {
            (SCAN_CODES, 0) => self.send(&[ACK, SCAN_CODE_SET]),
            (SCAN_CODES, SCAN_CODE_SET) | (SET_LEDS | SET_RATE, _) => self.send(&[ACK]),
            _ => self.send(&[RESEND]),
        }
    }

    /// The first field that cannot be, with its value.
    pub(super) fn invalid_field(&self) -> Option<(&'static str, String)> {
        if self.queue.len() > QUEUE_BYTES {
            return Some(("length of keyboard.queue", self.queue.len().to_string()));
        }
        match self.command {
            None | Some(SET_LEDS | SCAN_CODES | SET_RATE) => None,
            Some(other) => Some(("keyboard.command", other.to_string())),
        }
    }
}
