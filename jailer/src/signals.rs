//! Signals that the jailer receives in place of the monitor.

use std::io;

use rustix::process::{Pid, Signal};

/// Those that are passed on.
const PASSED_ON: [libc::c_int; 7] = [
    libc::SIGTERM,
    libc::SIGINT,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGWINCH,
];

/// Signals held back, and which were before.
#[derive(Clone, Copy)]
pub struct Blocked {
    set: libc::sigset_t,
    before: libc::sigset_t,
}

impl std::fmt::Debug for Blocked {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("Blocked")
    }
}

impl Blocked {
    /// Holds back what will be passed on, and the end of children.
    pub fn new() -> io::Result<Self> {
        // SAFETY: needed because no wrapper in use has signal masks. Both sets are initialized by the calls, which cannot
        // fail for valid signals.
        unsafe {
            let mut set = std::mem::zeroed();
            let mut before = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            for signal in PASSED_ON.iter().chain(&[libc::SIGCHLD]) {
                libc::sigaddset(&mut set, *signal);
            }
            match libc::sigprocmask(libc::SIG_BLOCK, &set, &mut before) {
                0 => Ok(Self { set, before }),
                _ => Err(io::Error::last_os_error()),
            }
        }
    }

    /// Lets through what was let through before.
    pub fn restore(&self) -> io::Result<()> {
        // SAFETY: needed as above; the set was filled by the kernel.
        match unsafe { libc::sigprocmask(libc::SIG_SETMASK, &self.before, std::ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Waits for one of the signals. Returns the one to be passed on: not the end of a child, and not what the terminal
    /// sends, which the monitor has received too.
    pub fn wait(&self) -> Option<libc::c_int> {
        let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
        // SAFETY: needed because no wrapper in use waits for signals. The set is initialized, and the kernel fills in the
        // structure, of which all bit patterns are valid.
        let (signal, code) = unsafe {
            (
                libc::sigwaitinfo(&self.set, info.as_mut_ptr()),
                info.assume_init().si_code,
            )
        };
        let from_terminal = code == libc::SI_KERNEL;
        (PASSED_ON.contains(&signal) && !from_terminal).then_some(signal)
    }

    /// Ends this process by a signal, as the monitor was ended.
    pub fn die_by(&self, signal: Signal) -> ! {
        // Who starts the jailer may have made it ignore the signal, and the monitor has not.
        // SAFETY: needed because no wrapper in use changes actions. It takes plain numbers.
        unsafe { libc::signal(signal.as_raw(), libc::SIG_DFL) };
        // It ends the process by the second call at the latest.
        drop(self.restore());
        let _ = rustix::process::kill_process(rustix::process::getpid(), signal);
        std::process::exit(128 + signal.as_raw())
    }
}

/// Sends a signal; the process may have ended.
pub fn send(pid: Pid, signal: libc::c_int) {
    if let Some(signal) = Signal::from_named_raw(signal) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}
