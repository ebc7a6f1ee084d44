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

    fn wait_raw(&self) -> Result {
        wait_until("raw mode", HOST_TIMEOUT, || {
            self.terminal.is_raw().unwrap_or(false)
        })
    }

    /// Waits for the end, and asserts its code, that the terminal is as it was and that no socket is left.
    fn assert_ends(&self, code: i32) -> Result {
        assert_eq!(self.monitor.wait_exit()?, code);
        assert!(self.terminal.is_usual()?, "{code}");
        assert!(!self.monitor.socket().exists(), "{code}");
        Ok(())
    }
}

#[test]
fn the_terminal_is_raw_while_the_guest_runs() -> Result {
    let session = session(&TinyKernel::new().print("ready\n").echo())?;
    session.wait_screen("ready")?;
    session.wait_raw()?;
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
        session.wait_raw()?;
        session.monitor.signal(signal)?;
        session.assert_ends(code)?;
    }
    Ok(())
}

/// Signals that nobody expects: they end the process as they would without Mayfly's doing, and its parent sees that. The
/// first of the real-time ones is Mayfly's own.
const DEADLY: [i32; 14] = [
    libc::SIGQUIT,
    libc::SIGTRAP,
    libc::SIGABRT,
    libc::SIGFPE,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGSTKFLT,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGIO,
    libc::SIGPWR,
    35,
    64,
];

#[test]
fn the_terminal_is_restored_after_every_signal_that_ends_a_process() -> Result {
    for signal in DEADLY {
        let session = session(&TinyKernel::new().print("ready\n").halt())?;
        session.wait_raw()?;
        session.monitor.signal(signal)?;
        session.assert_ends(-signal)?;
    }
    Ok(())
}

#[test]
fn the_terminal_is_restored_after_a_signal_to_a_vcpu() -> Result {
    for signal in [libc::SIGQUIT, libc::SIGFPE, 64] {
        let session = session(&TinyKernel::new().print("ready\n").spin())?;
        session.wait_raw()?;
        session.wait_screen("ready")?;
        session.monitor.signal_thread("vcpu 0", signal)?;
        session.assert_ends(-signal)?;
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
