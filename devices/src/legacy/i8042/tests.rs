use serde_json::{Value, json};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    COMMAND, CTR_AFTER_TEST, CTR_AUX_OFF, CTR_KEYBOARD_INTERRUPT, CTR_KEYBOARD_OFF, CTR_TRANSLATE,
    CtrlAltDelError, DATA, I8042, STATUS_AUX, STATUS_COMMAND, STATUS_OUTPUT_FULL, STATUS_UNLOCKED,
};
use crate::bus::BusDevice;

const FULL: u8 = STATUS_OUTPUT_FULL;

struct Machine {
    i8042: I8042,
    reset: EventFd,
    irq: EventFd,
}

impl Machine {
    fn new() -> Self {
        let reset = EventFd::new(EFD_NONBLOCK).unwrap();
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let i8042 = I8042::new(reset.try_clone().unwrap(), irq.try_clone().unwrap());
        Self { i8042, reset, irq }
    }

    /// As the driver leaves it for `i8042.noaux i8042.nomux i8042.dumbkbd`.
    fn booted() -> Self {
        let mut machine = Self::new();
        machine.linux_sets_up_keyboard();
        machine
    }

    fn status(&mut self) -> u8 {
        let mut data = [0];
        self.i8042.read(COMMAND, &mut data);
        data[0]
    }

    fn data(&mut self) -> u8 {
        let mut data = [0];
        self.i8042.read(DATA, &mut data);
        data[0]
    }

    fn command(&mut self, command: u8) {
        self.i8042.write(COMMAND, &[command]);
    }

    fn send(&mut self, value: u8) {
        self.i8042.write(DATA, &[value]);
    }

    fn ask(&mut self, command: u8) -> u8 {
        self.command(command);
        assert_eq!(self.status() & FULL, FULL, "no answer to {command:#x}");
        self.data()
    }

    fn set_ctr(&mut self, ctr: u8) {
        self.command(0x60);
        self.send(ctr);
    }

    /// Reads until the output buffer is empty, like the driver's flush; more than 16 bytes is "no controller".
    fn flush(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while self.status() & FULL != 0 {
            bytes.push(self.data());
            assert!(bytes.len() <= 16);
        }
        bytes
    }

    fn linux_sets_up_keyboard(&mut self) {
        assert!(self.flush().is_empty());
        let ctr = self.ask(0x20);
        assert_eq!(self.ask(0x20), ctr);
        assert_eq!(self.status() & STATUS_UNLOCKED, STATUS_UNLOCKED);
        let ctr = (ctr | CTR_KEYBOARD_OFF) & !CTR_KEYBOARD_INTERRUPT;
        self.set_ctr(ctr);
        assert!(self.flush().is_empty());
        self.set_ctr((ctr & !CTR_KEYBOARD_OFF) | CTR_KEYBOARD_INTERRUPT);
    }

    fn interrupted(&self) -> bool {
        self.irq.read().is_ok()
    }

    /// Reads one byte per interrupt, as an interrupt handler does, and so hangs on a lost edge.
    fn handle_interrupts(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while self.interrupted() {
            if self.status() & FULL != 0 {
                bytes.push(self.data());
            }
        }
        bytes
    }
}

#[test]
fn command_fe_resets_the_machine() {
    let mut machine = Machine::new();
    machine.command(0xfe);
    assert_eq!(machine.reset.read().unwrap(), 1);
    assert_eq!(machine.i8042.metrics().reset_count, 1);
}

#[test]
fn pulsing_other_lines_does_not_reset() {
    let mut machine = Machine::new();
    machine.command(0xff);
    machine.command(0xfd);
    assert!(machine.reset.read().is_err());
    assert_eq!(machine.i8042.metrics().error_count, 0);
}

#[test]
fn pulling_the_reset_line_of_the_output_port_resets() {
    let mut machine = Machine::new();
    machine.command(0xd1);
    machine.send(0xfe);
    assert_eq!(machine.reset.read().unwrap(), 1);
    assert_eq!(machine.ask(0xd0), 0xff);
}

#[test]
fn the_self_test_passes_and_leaves_the_interfaces_off() {
    let mut machine = Machine::booted();
    assert_eq!(machine.ask(0xaa), 0x55);
    assert_eq!(machine.ask(0x20), CTR_AFTER_TEST);
    assert_eq!(machine.ask(0xab), 0x00);
}

#[test]
fn linux_finds_no_mouse_without_waiting() {
    let mut machine = Machine::new();
    machine.command(0xd3);
    machine.send(0x5a);
    assert_eq!(machine.status() & (FULL | STATUS_AUX), FULL | STATUS_AUX);
    assert_ne!(machine.data(), 0x5a);
    assert_eq!(machine.ask(0xa9), 0x01);
    machine.linux_sets_up_keyboard();
    assert!(machine.i8042.trigger_ctrl_alt_del().is_ok());
}

#[test]
fn the_mouse_interface_bit_follows_its_commands() {
    let mut machine = Machine::new();
    machine.command(0xa8);
    assert_eq!(machine.ask(0x20) & CTR_AUX_OFF, 0);
    machine.command(0xa7);
    assert_eq!(machine.ask(0x20) & CTR_AUX_OFF, CTR_AUX_OFF);
}

#[test]
fn a_byte_for_the_absent_mouse_is_answered() {
    let mut machine = Machine::new();
    machine.command(0xd4);
    machine.send(0xf4);
    assert_eq!(machine.status() & (FULL | STATUS_AUX), FULL | STATUS_AUX);
    assert_eq!(machine.data(), 0xfe);
}

#[test]
fn status_tells_whether_a_command_was_written_last() {
    let mut machine = Machine::new();
    machine.command(0x60);
    assert_eq!(machine.status() & STATUS_COMMAND, STATUS_COMMAND);
    machine.send(CTR_AFTER_TEST);
    assert_eq!(machine.status() & STATUS_COMMAND, 0);
}

#[test]
fn ctrl_alt_del_arrives_translated_one_byte_per_interrupt() {
    let mut machine = Machine::booted();
    machine.i8042.trigger_ctrl_alt_del().unwrap();
    assert_eq!(
        machine.handle_interrupts(),
        [0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d]
    );
    assert!(machine.flush().is_empty());
}

#[test]
fn ctrl_alt_del_arrives_as_set_2_without_translation() {
    let mut machine = Machine::booted();
    let ctr = machine.ask(0x20);
    machine.set_ctr(ctr & !CTR_TRANSLATE);
    machine.i8042.trigger_ctrl_alt_del().unwrap();
    let expected = [0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14];
    assert_eq!(machine.handle_interrupts(), expected);
}

#[test]
fn ctrl_alt_del_is_refused_before_the_guest_enables_its_keyboard() {
    let mut machine = Machine::new();
    let error = machine.i8042.trigger_ctrl_alt_del().unwrap_err();
    assert!(matches!(error, CtrlAltDelError::KeyboardOff));
    assert!(!machine.interrupted());
}

#[test]
fn ctrl_alt_del_is_refused_while_keys_are_switched_off() {
    let mut machine = Machine::booted();
    machine.send(0xf5);
    assert!(matches!(
        machine.i8042.trigger_ctrl_alt_del(),
        Err(CtrlAltDelError::KeyboardOff)
    ));
    machine.send(0xf4);
    assert!(machine.i8042.trigger_ctrl_alt_del().is_ok());
}

#[test]
fn a_second_ctrl_alt_del_waits_for_the_guest_to_read_the_first() {
    let mut machine = Machine::booted();
    machine.i8042.trigger_ctrl_alt_del().unwrap();
    assert!(matches!(
        machine.i8042.trigger_ctrl_alt_del(),
        Err(CtrlAltDelError::QueueFull)
    ));
    assert_eq!(machine.handle_interrupts().len(), 8);
    assert!(machine.i8042.trigger_ctrl_alt_del().is_ok());
}

#[test]
fn keys_wait_behind_a_disabled_interface_and_interrupt_when_it_opens() {
    let mut machine = Machine::booted();
    machine.i8042.trigger_ctrl_alt_del().unwrap();
    machine.command(0xad);
    assert!(machine.interrupted());
    assert_eq!(machine.status() & FULL, 0);
    machine.command(0xae);
    assert_eq!(machine.handle_interrupts().len(), 8);
}

#[test]
fn a_controller_reply_overtakes_waiting_keys() {
    let mut machine = Machine::booted();
    machine.i8042.trigger_ctrl_alt_del().unwrap();
    let ctr = machine.ask(0x20);
    assert_eq!(
        ctr & (CTR_KEYBOARD_INTERRUPT | CTR_KEYBOARD_OFF),
        CTR_KEYBOARD_INTERRUPT
    );
    assert_eq!(machine.handle_interrupts().len(), 8);
}

#[test]
fn linux_probes_the_keyboard_behind_translation() {
    let mut machine = Machine::booted();
    machine.send(0xf2);
    assert_eq!(machine.handle_interrupts(), [0xfa, 0xab, 0x41]);
    machine.send(0xf5);
    assert_eq!(machine.handle_interrupts(), [0xfa]);
    machine.send(0xed);
    machine.send(0x00);
    machine.send(0xf3);
    machine.send(0x00);
    assert_eq!(machine.handle_interrupts(), [0xfa; 4]);
    machine.send(0xf4);
    assert_eq!(machine.handle_interrupts(), [0xfa]);
}

#[test]
fn the_keyboard_answers_its_other_commands() {
    let mut machine = Machine::booted();
    let ctr = machine.ask(0x20);
    machine.set_ctr(ctr & !CTR_TRANSLATE);
    machine.send(0xff);
    assert_eq!(machine.handle_interrupts(), [0xfa, 0xaa]);
    machine.send(0xfe);
    assert_eq!(machine.handle_interrupts(), [0xaa]);
    machine.send(0xee);
    assert_eq!(machine.handle_interrupts(), [0xee]);
    machine.send(0xf0);
    machine.send(0x00);
    assert_eq!(machine.handle_interrupts(), [0xfa, 0xfa, 0x02]);
    machine.send(0xf0);
    machine.send(0x03);
    assert_eq!(machine.handle_interrupts(), [0xfa, 0xfe]);
    machine.send(0x12);
    assert_eq!(machine.handle_interrupts(), [0xfe]);
}

#[test]
fn a_command_in_place_of_an_argument_starts_anew() {
    let mut machine = Machine::booted();
    machine.send(0xed);
    machine.send(0xf2);
    assert_eq!(machine.handle_interrupts(), [0xfa, 0xfa, 0xab, 0x41]);
}

#[test]
fn a_guest_that_never_reads_loses_answers_and_nothing_else() {
    let mut machine = Machine::booted();
    for _ in 0..1000 {
        machine.send(0xee);
    }
    assert_eq!(machine.flush(), [0xee; 16]);
    assert_eq!(machine.i8042.metrics().error_count, 1000 - 16);
}

#[test]
fn an_empty_output_buffer_reads_as_zero() {
    let mut machine = Machine::new();
    assert_eq!(machine.data(), 0);
}

#[test]
fn accesses_and_misses_are_counted() {
    let mut machine = Machine::new();
    machine.i8042.write(1, &[0]);
    machine.i8042.read(2, &mut [0; 2]);
    machine.command(0x01);
    machine.status();
    let metrics = machine.i8042.metrics();
    assert_eq!((metrics.write_count, metrics.missed_write_count), (1, 1));
    assert_eq!((metrics.read_count, metrics.missed_read_count), (1, 2));
    assert_eq!((metrics.error_count, metrics.reset_count), (1, 0));
}

#[test]
fn a_saved_controller_goes_on_in_the_middle_of_a_command() {
    let mut machine = Machine::booted();
    machine.i8042.trigger_ctrl_alt_del().unwrap();
    assert_eq!(machine.data(), 0x1d);
    machine.command(0xd1);
    let saved = serde_json::to_string(&machine.i8042.save()).unwrap();

    let mut restored = Machine::new();
    restored
        .i8042
        .load(serde_json::from_str(&saved).unwrap())
        .unwrap();
    assert_eq!(
        restored.handle_interrupts(),
        [0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d]
    );
    restored.send(0xfe);
    assert!(restored.reset.read().is_ok());
}

fn saved_with(keyboard_field: &str, value: Value) -> super::State {
    let mut saved = serde_json::to_value(Machine::new().i8042.save()).unwrap();
    saved["keyboard"][keyboard_field] = value;
    serde_json::from_value(saved).unwrap()
}

#[test]
fn a_state_with_an_overlong_queue_is_refused() {
    let error = Machine::new()
        .i8042
        .load(saved_with("queue", vec![0xf0; 17].into()))
        .unwrap_err();
    assert_eq!(error.field, "length of keyboard.queue");
}

#[test]
fn a_state_with_an_unknown_keyboard_command_is_refused() {
    let error = Machine::new()
        .i8042
        .load(saved_with("command", json!(1)))
        .unwrap_err();
    assert_eq!(error.field, "keyboard.command");
}

#[test]
fn a_state_of_lone_break_prefixes_is_survived() {
    let mut machine = Machine::booted();
    let ctr = machine.ask(0x20);
    machine
        .i8042
        .load(saved_with("queue", vec![0xf0; 16].into()))
        .unwrap();
    machine.set_ctr(ctr);
    assert_eq!(machine.handle_interrupts(), [0]);
}
