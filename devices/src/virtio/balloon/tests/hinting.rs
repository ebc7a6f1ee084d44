//! Free page hinting: whose commands count, and when.

use super::*;

/// The queue of hints, with hinting as the only feature.
const HINTS: u16 = 2;
/// Where the command id is.
const CMD_ID: usize = 8;

fn hinting() -> Config {
    Config {
        free_page_hinting: true,
        ..config()
    }
}

fn start(acknowledge_on_stop: bool) -> Patch {
    Patch::StartHinting(StartHinting { acknowledge_on_stop })
}

impl Guest<'_> {
    fn say(&mut self, command: u32) {
        self.send(HINTS, &command.to_le_bytes());
    }

    fn hint(&mut self, page: u64) {
        self.offer(HINTS, &[writable(FIRST + page * PAGE, 4096)]);
    }

    fn commands(&self) -> Value {
        self.status()["hinting"].clone()
    }
}

#[test]
fn a_run_gives_hinted_pages_back_and_ends_with_done() {
    let mem = memory();
    let mut guest = Guest::new(&mem, &hinting());
    assert_eq!(guest.commands(), json!({"host_cmd": 0, "guest_cmd": null}));
    guest.patch(&start(true)).unwrap();
    assert_eq!(guest.field(CMD_ID), 2);
    guest.say(2);
    guest.hint(0);
    guest.hint(2);
    assert_eq!(guest.commands(), json!({"host_cmd": 2, "guest_cmd": 2}));
    assert_eq!(guest.recorder.config.load(Ordering::Relaxed), 0);
    guest.say(0);
    assert_eq!(guest.commands(), json!({"host_cmd": 1, "guest_cmd": 0}));
    let mut shown = [0; 4];
    guest.recorder.space.read(CMD_ID as u64, &mut shown);
    assert_eq!(
        (shown, guest.recorder.config.load(Ordering::Relaxed)),
        ([1, 0, 0, 0], 1)
    );
    assert_eq!(guest.zeroed(4), [true, false, true, false]);
    let counted = ["count", "freed", "fails"].map(|name| guest.count(&format!("free_page_hint_{name}")));
    assert_eq!(counted, [2, 8192, 0]);
    assert_eq!(guest.drivers[2].used(), Some((0, 0)));
}

#[test]
fn the_guest_keeps_its_pages_until_the_stop_when_it_is_told_to() {
    let mem = memory();
    let mut guest = Guest::new(&mem, &hinting());
    guest.patch(&start(false)).unwrap();
    guest.say(2);
    guest.say(0);
    assert_eq!(guest.commands(), json!({"host_cmd": 2, "guest_cmd": 0}));
    guest.patch(&Patch::StopHinting).unwrap();
    assert_eq!(guest.field(CMD_ID), 1);
}

#[test]
fn hints_before_the_command_after_the_end_and_of_another_run_are_ignored() {
    let mem = memory();
    let mut guest = Guest::new(&mem, &hinting());
    guest.hint(0);
    guest.patch(&start(true)).unwrap();
    guest.hint(1);
    guest.say(3);
    guest.hint(2);
    guest.say(2);
    guest.patch(&start(true)).unwrap();
    guest.hint(3);
    // The end of the former run is not that of this one.
    guest.say(0);
    assert_eq!(guest.field(CMD_ID), 3);
    guest.say(3);
    guest.patch(&Patch::StopHinting).unwrap();
    guest.hint(4);
    assert_eq!(guest.zeroed(5), [false; 5]);
    assert_eq!(
        (
            guest.count("free_page_hint_fails"),
            guest.count("free_page_hint_freed")
        ),
        (5, 0)
    );
}

#[test]
fn reserved_commands_of_the_guest_start_nothing() {
    let mem = memory();
    let mut guest = Guest::new(&mem, &hinting());
    for command in [0, 1] {
        guest.say(command);
        guest.hint(0);
    }
    guest.patch(&Patch::StopHinting).unwrap();
    guest.say(1);
    guest.hint(0);
    assert_eq!(guest.zeroed(1), [false]);
}

#[test]
fn a_command_that_is_too_short_is_counted() {
    let mem = memory();
    let mut guest = Guest::new(&mem, &hinting());
    guest.send(HINTS, &[2, 0, 0]);
    assert_eq!(guest.count("free_page_hint_fails"), 1);
    assert_eq!(guest.commands()["guest_cmd"], Value::Null);
}

#[test]
fn a_reset_ends_the_run_and_its_id_does_not_come_back() {
    let mem = memory();
    let mut guest = Guest::new(&mem, &hinting());
    guest.patch(&start(true)).unwrap();
    guest.say(2);
    guest.device.reset();
    assert_eq!(guest.commands(), json!({"host_cmd": 0, "guest_cmd": null}));
    assert_eq!(guest.field(CMD_ID), 0);
    guest.patch(&start(true)).unwrap();
    assert_eq!(guest.field(CMD_ID), 3);
}

#[test]
fn refuses_commands_that_were_not_offered() {
    let mem = memory();
    let mut guest = Guest::new(&mem, &config());
    for patch in [start(true), Patch::StopHinting] {
        let refusal = guest.patch(&patch).unwrap_err();
        assert!(
            refusal.starts_with("Attempting to use hinting when not enabled"),
            "{refusal}"
        );
    }
    assert_eq!(guest.commands(), Value::Null);
}
