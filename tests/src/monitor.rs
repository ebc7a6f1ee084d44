//! One `mayfly` process, from its start to its end.

use std::fs;
use std::io::Write;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde_json::Value;

use crate::{
    Client, Console, Failure, GUEST_TIMEOUT, HOST_TIMEOUT, Response, Result, Scratch, binary, wait_until,
};

/// What runs in the new process before it becomes the monitor.
type Prepare = Box<dyn FnMut() -> std::io::Result<()> + Send + Sync>;

/// Describes a process to be started.
pub struct MonitorBuilder {
    scratch: Scratch,
    args: Vec<String>,
    api: bool,
    log_file: bool,
    metrics: bool,
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

    /// Runs this in the new process before it becomes the monitor; it may make system calls only.
    pub fn prepare(mut self, prepare: impl FnMut() -> std::io::Result<()> + Send + Sync + 'static) -> Self {
        self.prepare = Some(Box::new(prepare));
        self
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
            prepare.as_mut().map_or(Ok(()), |prepare| prepare())?;
            die_with_parent()
        };
        // SAFETY: needed to set up what the standard library cannot. The closure makes system calls only, as its
        // documentation asks of callers, and neither allocates nor locks.
        unsafe { command.pre_exec(before_exec) };
        let mut child = command.spawn()?;
        let stdin = child
            .stdin
            .take()
            .ok_or_else(|| Failure::new("no standard input"))?;
        let stdout = child
            .stdout
            .take()
            .ok_or_else(|| Failure::new("no standard output"))?;
        let stderr = child
            .stderr
            .take()
            .ok_or_else(|| Failure::new("no standard error"))?;
        Ok(Monitor {
            scratch: self.scratch,
            child: Mutex::new(child),
            stdin: Mutex::new(Some(stdin)),
            console: Console::record(stdout),
            stderr: Console::record(stderr),
            client: Mutex::new(None),
        })
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
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Ok(command)
    }
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

const SOCKET: &str = "api.sock";
const LOG: &str = "log";
const METRICS: &str = "metrics";

/// A started process. It is killed when dropped.
#[derive(Debug)]
pub struct Monitor {
    scratch: Scratch,
    child: Mutex<Child>,
    stdin: Mutex<Option<ChildStdin>>,
    console: Console,
    stderr: Console,
    client: Mutex<Option<Client>>,
}

impl Monitor {
    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.scratch
    }

    /// Where its API socket is while it runs.
    pub fn socket(&self) -> PathBuf {
        self.scratch.join(SOCKET)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        lock(&self.child).id()
    }

    /// Its standard output: the guest's console.
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// Its standard error.
    pub fn stderr(&self) -> &Console {
        &self.stderr
    }

    /// Its log file so far.
    pub fn log(&self) -> String {
        fs::read(self.scratch.join(LOG))
            .map(|log| String::from_utf8_lossy(&log).into_owned())
            .unwrap_or_default()
    }

    /// Its metrics so far, a value per line written.
    pub fn metrics(&self) -> Result<Vec<Value>> {
        let text = fs::read_to_string(self.scratch.join(METRICS))?;
        text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }

    /// Sends bytes to its standard input: the guest's keyboard, so to speak.
    pub fn type_in(&self, bytes: &[u8]) -> Result {
        let mut stdin = lock(&self.stdin);
        let stdin = stdin
            .as_mut()
            .ok_or_else(|| Failure::new("standard input is closed"))?;
        stdin.write_all(bytes)?;
        Ok(stdin.flush()?)
    }

    /// Closes its standard input.
    pub fn close_stdin(&self) {
        *lock(&self.stdin) = None;
    }

    /// A connection of its own to the API.
    pub fn connect(&self) -> Result<Client> {
        Client::connect(&self.socket())
    }

    /// A request to the API, over a connection that stays open.
    pub fn request(&self, method: &str, path: &str, body: &str) -> Result<Response> {
        let mut client = lock(&self.client);
        let mut connected = match client.take() {
            Some(connected) => connected,
            None => self.connect()?,
        };
        let answer = connected.request(method, path, body);
        let response = answer.map_err(|failure| self.failure(&format!("{method} {path}: {failure}")))?;
        *client = Some(connected);
        Ok(response)
    }

    /// A GET request.
    pub fn get(&self, path: &str) -> Result<Response> {
        self.request("GET", path, "")
    }

    /// A PUT request.
    pub fn put(&self, path: &str, body: &Value) -> Result<Response> {
        self.request("PUT", path, &body.to_string())
    }

    /// A PATCH request.
    pub fn patch(&self, path: &str, body: &Value) -> Result<Response> {
        self.request("PATCH", path, &body.to_string())
    }

    /// One of the actions of `PUT /actions`, carried out.
    pub fn action(&self, action_type: &str) -> Result {
        self.put("/actions", &serde_json::json!({"action_type": action_type}))?
            .success()
            .map(drop)
    }

    /// Pauses the machine.
    pub fn pause(&self) -> Result {
        self.patch("/vm", &serde_json::json!({"state": "Paused"}))?
            .success()
            .map(drop)
    }

    /// Lets the machine go on.
    pub fn resume(&self) -> Result {
        self.patch("/vm", &serde_json::json!({"state": "Resumed"}))?
            .success()
            .map(drop)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: i32) -> Result {
        let pid = i32::try_from(self.pid())?;
        // SAFETY: needed because the standard library sends SIGKILL only. The child was not waited for by anybody
        // else, so the id is still its own.
        match unsafe { libc::kill(pid, signal) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error().into()),
        }
    }

    /// True once the process has ended.
    pub fn has_ended(&self) -> bool {
        !matches!(lock(&self.child).try_wait(), Ok(None))
    }

    /// Waits for the end of the process, and returns its exit code; for a signal, its number with a minus.
    pub fn wait_exit(&self) -> Result<i32> {
        wait_until("the monitor's end", GUEST_TIMEOUT, || self.has_ended())
            .map_err(|failure| self.failure(&failure.to_string()))?;
        let deadline = Instant::now() + HOST_TIMEOUT;
        self.console.wait_end(deadline);
        self.stderr.wait_end(deadline);
        let status = lock(&self.child).wait()?;
        status
            .code()
            .or(status.signal().map(|signal| -signal))
            .ok_or_else(|| Failure::new("no exit code"))
    }

    /// A failure that shows what the process has said.
    pub fn failure(&self, what: &str) -> Failure {
        let log = self.log();
        let start = log.len().saturating_sub(4000);
        let log = log.get(start..).unwrap_or(&log);
        let (console, stderr) = (self.console.tail(), self.stderr.tail());
        Failure::new(format!(
            "{what}\n--- console:\n{console}\n--- log:\n{log}\n--- standard error:\n{stderr}\n---"
        ))
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.failure("the monitor of the failed test:"));
        }
        let child = self.child.get_mut().unwrap_or_else(PoisonError::into_inner);
        // It may have ended before.
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
