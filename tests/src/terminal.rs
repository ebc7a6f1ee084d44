//! A pseudo-terminal: what a person's shell would give the monitor as its standard input and output.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::Result;

/// Both ends of a pseudo-terminal.
#[derive(Debug)]
pub struct Terminal {
    person: File,
    program: OwnedFd,
}

impl Terminal {
    /// A new terminal in its usual mode: lines are edited and echoed.
    pub fn new() -> Result<Self> {
        let (mut person, mut program) = (-1, -1);
        let none = std::ptr::null_mut();
        // SAFETY: needed because the standard library knows no terminals. The first two pointers are to room for a
        // descriptor each, and null stands for what is not wanted.
        check(unsafe { libc::openpty(&mut person, &mut program, none, none.cast(), none.cast()) })?;
        // SAFETY: the call above succeeded, so that both descriptors are new and nobody else's.
        unsafe {
            Ok(Self {
                person: File::from_raw_fd(person),
                program: OwnedFd::from_raw_fd(program),
            })
        }
    }

    /// The person's end: what is written to it is typed, what is read from it is shown.
    pub fn person(&self) -> Result<File> {
        Ok(self.person.try_clone()?)
    }

    /// The program's end, for its standard streams.
    pub fn program(&self) -> Result<OwnedFd> {
        Ok(self.program.try_clone()?)
    }

    /// Whether what is typed goes to the program at once, as it is and without an echo.
    pub fn is_raw(&self) -> Result<bool> {
        Ok(self.settings()?.c_lflag & (libc::ICANON | libc::ECHO | libc::ISIG) == 0)
    }

    /// Whether lines are edited and echoed, and Ctrl-C is a signal.
    pub fn is_usual(&self) -> Result<bool> {
        let usual = libc::ICANON | libc::ECHO | libc::ISIG;
        Ok(self.settings()?.c_lflag & usual == usual)
    }

    fn settings(&self) -> Result<libc::termios> {
        let mut settings = std::mem::MaybeUninit::uninit();
        // SAFETY: needed because the standard library cannot ask for terminal modes. The pointer is to room for one
        // value, which is taken only when it was written.
        unsafe {
            check(libc::tcgetattr(self.program.as_raw_fd(), settings.as_mut_ptr()))?;
            Ok(settings.assume_init())
        }
    }
}

/// Makes the terminal that is standard input the process's own, as a shell's is; for
/// [`MonitorBuilder::prepare`](crate::MonitorBuilder::prepare).
pub fn take_terminal() -> io::Result<()> {
    // SAFETY: needed because this runs between fork and exec, where only system calls may be made; these are, and take
    // plain numbers.
    unsafe {
        check(libc::setsid())?;
        check(libc::ioctl(0, libc::TIOCSCTTY, 0))
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
