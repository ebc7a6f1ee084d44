//! The person's terminal: raw while it is the guest's console, and as before at every end of the process.

use std::io::Write;

use mayfly_tests::{
    Console, HOST_TIMEOUT, Monitor, MonitorBuilder, Result, Terminal, TestVm, TinyKernel, wait_until,
};

/// A machine on a terminal, with its screen.
struct Session {
    monitor: Monitor,
    terminal: Terminal,
    screen: Console,
}

/// Starts a machine with this kernel by a config file, as a person would.
fn session(kernel: &TinyKernel) -> Result<Session> {
    let terminal = Terminal::new()?;
    let builder = MonitorBuilder::new("terminal")?.terminal(&terminal)?;
    let path = builder.dir().join("kernel");
    std::fs::write(&path, kernel.elf())?;
    std::fs::write(
        builder.dir().join("config.json"),
        TestVm::new("").kernel(&path).config()?.to_string(),
    )?;
    let screen = Console::record(terminal.person()?);
    let monitor = builder.args(["--config-file", "config.json"]).spawn()?;
    Ok(Session {
        monitor,
        terminal,
        screen,
    })
}

impl Session {
    fn wait_screen(&self, text: &str) -> Result {
        wait_until(text, HOST_TIMEOUT, || self.screen.text().contains(text)).map_err(|failure| {
            self.monitor
                .failure(&format!("{failure}; screen: {}", self.screen.tail()))
        })
    }

    /// Waits for the end, and asserts its code and that the terminal is as it was.
    fn assert_ends(&self, code: i32) -> Result {
        assert_eq!(self.monitor.wait_exit()?, code);
        assert!(self.terminal.is_usual()?);
        Ok(())
    }
}

#[test]
fn the_terminal_is_raw_while_the_guest_runs() -> Result {
    let session = session(&TinyKernel::new().print("ready\n").echo())?;
    session.wait_screen("ready")?;
    wait_until("raw mode", HOST_TIMEOUT, || {
        session.terminal.is_raw().unwrap_or(false)
    })?;
    // Ctrl-C and a key without a line's end go to the guest, which shows them.
    session.terminal.person()?.write_all(b"key\x03!")?;
    session.wait_screen("key\x03!")
}

#[test]
fn the_terminal_is_restored_when_the_guest_ends() -> Result {
    session(&TinyKernel::new().print("bye\n").reset())?.assert_ends(0)
}

#[test]
fn the_terminal_is_restored_when_a_signal_ends_the_process() -> Result {
    for (signal, code) in [
        (libc::SIGTERM, -libc::SIGTERM),
        (libc::SIGINT, -libc::SIGINT),
        (libc::SIGHUP, 156),
    ] {
        let session = session(&TinyKernel::new().print("ready\n").halt())?;
        wait_until("raw mode", HOST_TIMEOUT, || {
            session.terminal.is_raw().unwrap_or(false)
        })?;
        session.monitor.signal(signal)?;
        session.assert_ends(code)?;
    }
    Ok(())
}

#[test]
fn the_terminal_is_left_alone_until_the_machine_starts() -> Result {
    let terminal = Terminal::new()?;
    let monitor = MonitorBuilder::new("terminal")?.terminal(&terminal)?.start()?;
    assert!(terminal.is_usual()?);
    monitor.signal(libc::SIGTERM)?;
    assert_eq!(monitor.wait_exit()?, -libc::SIGTERM);
    Ok(())
}
