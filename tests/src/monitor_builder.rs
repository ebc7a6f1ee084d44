//! How a `mayfly` process is started.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use crate::monitor::{LOG, METRICS, Monitor, SOCKET};
use crate::terminal::{Terminal, take_terminal};
use crate::{Client, Failure, HOST_TIMEOUT, Result, Scratch, binary, wait_until};

/// What runs in the new process before it becomes the monitor.
type Prepare = Box<dyn FnMut() -> std::io::Result<()> + Send + Sync>;

/// Describes a process to be started.
pub struct MonitorBuilder {
    scratch: Scratch,
    args: Vec<String>,
    api: bool,
    log_file: bool,
    metrics: bool,
    terminal: Option<OwnedFd>,
    prepare: Option<Prepare>,
}

impl MonitorBuilder {
    /// A monitor with an API socket and a log file in a new folder of its own.
    pub fn new(name: &str) -> Result<Self> {
        let scratch = Scratch::new(name)?;
        Ok(Self {
            scratch,
            args: Vec::new(),
            api: true,
            log_file: true,
            metrics: false,
            terminal: None,
            prepare: None,
        })
    }

    /// Adds command line arguments.
    pub fn args<S: Into<String>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Passes no `--api-sock`.
    pub fn without_api_socket(mut self) -> Self {
        self.api = false;
        self
    }

    /// Lets the log go to standard output, where the guest's console is too.
    pub fn log_to_stdout(mut self) -> Self {
        self.log_file = false;
        self
    }

    /// Writes metrics, for [`Monitor::metrics`].
    pub fn metrics(mut self) -> Self {
        self.metrics = true;
        self
    }

    /// Connects the process to a terminal of its own instead of pipes; what it writes is seen there only.
    pub fn terminal(mut self, terminal: &Terminal) -> Result<Self> {
        self.terminal = Some(terminal.program()?);
        Ok(self.prepare(take_terminal))
    }

    /// Runs this in the new process before it becomes the monitor; it may make system calls only.
    pub fn prepare(mut self, prepare: impl FnMut() -> std::io::Result<()> + Send + Sync + 'static) -> Self {
        self.prepare = Some(Box::new(prepare));
        self
    }

    /// Passes an open file on to the process, under this number.
    pub fn inherit(self, file: Arc<File>, number: RawFd) -> Self {
        self.prepare(move || {
            // SAFETY: needed as the standard library passes no other files on than the first three. The call is allowed
            // between fork and exec, and a copy under another number stays open on exec.
            match unsafe { libc::dup2(file.as_raw_fd(), number) } {
                -1 => Err(std::io::Error::last_os_error()),
                _ => Ok(()),
            }
        })
    }

    /// Lets a process of any user create files in its folder.
    pub fn open_to_all(self) -> Result<Self> {
        self.scratch.open_to_all()?;
        Ok(self)
    }

    /// The folder of the process, for files that its arguments name.
    pub fn dir(&self) -> &Path {
        &self.scratch
    }

    /// Starts the process, and waits until its API can be reached.
    pub fn start(self) -> Result<Monitor> {
        let monitor = self.spawn()?;
        let mut ended = false;
        wait_until("the API socket", HOST_TIMEOUT, || {
            ended = monitor.has_ended();
            ended || Client::connect(&monitor.socket()).is_ok()
        })
        .and_then(|()| {
            if ended {
                Err(Failure::new("the monitor ended early"))
            } else {
                Ok(())
            }
        })
        .map_err(|failure| monitor.failure(&failure.to_string()))?;
        Ok(monitor)
    }

    /// Starts the process, which may end at once.
    pub fn spawn(mut self) -> Result<Monitor> {
        let mut command = self.command()?;
        let mut prepare = self.prepare.take();
        let before_exec = move || {
            heed_signals()?;
            prepare.as_mut().map_or(Ok(()), |prepare| prepare())?;
            die_with_parent()
        };
        // SAFETY: needed to set up what the standard library cannot. The closure makes system calls only, as its
        // documentation asks of callers, and neither allocates nor locks.
        unsafe { command.pre_exec(before_exec) };
        let child = command.spawn()?;
        Ok(Monitor::new(self.scratch, child))
    }

    fn command(&self) -> Result<Command> {
        let mut command = Command::new(binary()?);
        let dir = self.scratch.display();
        if self.api {
            command.arg("--api-sock").arg(self.scratch.join(SOCKET));
        }
        if self.log_file {
            command.arg(format!("--log-path={dir}/{LOG}"));
        }
        if self.metrics {
            command.arg(format!("--metrics-path={dir}/{METRICS}"));
        }
        command.args(&self.args).current_dir(&*self.scratch);
        let stream = || match &self.terminal {
            Some(terminal) => terminal.try_clone().map(Stdio::from),
            None => Ok(Stdio::piped()),
        };
        command.stdin(stream()?).stdout(stream()?).stderr(stream()?);
        Ok(command)
    }
}

/// Lets signals of a terminal end the process also where the tests run in the background: shells have such jobs ignore
/// them. To be called between fork and exec.
pub(crate) fn heed_signals() -> std::io::Result<()> {
    for signal in [libc::SIGINT, libc::SIGQUIT] {
        // SAFETY: needed because the standard library cannot do it. The call is allowed between fork and exec.
        if unsafe { libc::signal(signal, libc::SIG_DFL) } == libc::SIG_ERR {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Makes the process die with the thread that started it, even if the test is killed.
fn die_with_parent() -> std::io::Result<()> {
    // SAFETY: needed because the standard library cannot ask for it. The call changes one setting of the process, and
    // is allowed between fork and exec.
    match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
