//! One `mayfly` process, from its start to its end.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde_json::Value;

use crate::{
    Client, Console, EventStream, Failure, GUEST_TIMEOUT, HOST_TIMEOUT, Response, Result, Scratch, wait_until,
};

pub(crate) const SOCKET: &str = "api.sock";
pub(crate) const LOG: &str = "log";
pub(crate) const METRICS: &str = "metrics";

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
    /// Takes over a process; its folder is `scratch`.
    pub(crate) fn new(scratch: Scratch, mut child: Child) -> Self {
        // On a terminal there is nothing to record.
        let nothing = || Console::record(std::io::empty());
        let stdout = child.stdout.take().map_or_else(nothing, Console::record);
        let stderr = child.stderr.take().map_or_else(nothing, Console::record);
        Self {
            scratch,
            stdin: Mutex::new(child.stdin.take()),
            child: Mutex::new(child),
            console: stdout,
            stderr,
            client: Mutex::new(None),
        }
    }

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

    /// Processor time that its first thread has used so far, in ticks of 10 ms.
    pub fn control_ticks(&self) -> Result<u64> {
        let pid = self.pid();
        ticks(Path::new(&format!("/proc/{pid}/task/{pid}")))
    }

    /// Processor time that its threads have used so far which run devices, in ticks of 10 ms.
    pub fn io_ticks(&self) -> Result<u64> {
        let (mut total, mut threads) = (0, 0);
        for task in fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let task = task?.path();
            if fs::read_to_string(task.join("comm"))?.starts_with("io ") {
                total += ticks(&task)?;
                threads += 1;
            }
        }
        if threads == 0 {
            return Err(self.failure("no thread runs devices"));
        }
        Ok(total)
    }

    /// How often its io threads have gone to sleep so far.
    pub fn io_sleeps(&self) -> Result<u64> {
        let mut sleeps = 0;
        for thread in fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let status = fs::read_to_string(thread?.path().join("status"))?;
            if !status.starts_with("Name:\tio ") {
                continue;
            }
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            sleeps += line.unwrap_or_default().trim().parse::<u64>()?;
        }
        Ok(sleeps)
    }

    /// Bytes of memory that the host has given it, the guest's included.
    pub fn resident_bytes(&self) -> Result<u64> {
        let statm = fs::read_to_string(format!("/proc/{}/statm", self.pid()))?;
        let pages = statm.split(' ').nth(1).unwrap_or_default();
        Ok(pages.parse::<u64>()? * 4096)
    }

    /// How often each thread but the vCPUs' has gone to sleep so far, by thread id and name.
    pub fn wakeups(&self) -> Result<BTreeMap<(u32, String), u64>> {
        let mut wakeups = BTreeMap::new();
        for task in fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let task = task?;
            let status = fs::read_to_string(task.path().join("status"))?;
            let field = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name));
                line.map(str::trim).unwrap_or_default()
            };
            let name = field("Name:").to_owned();
            if !name.starts_with("vcpu ") {
                let id = task.file_name().to_string_lossy().parse()?;
                wakeups.insert((id, name), field("voluntary_ctxt_switches:").parse()?);
            }
        }
        Ok(wakeups)
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

    /// A counter of the metrics, from the start until now: the sum over all lines, which hold differences.
    pub fn counted(&self, group: &str, name: &str) -> Result<u64> {
        self.action("FlushMetrics")?;
        Ok(self
            .metrics()?
            .iter()
            .filter_map(|line| line[group][name].as_u64())
            .sum())
    }

    /// All samples of `GET /metrics`, by name and labels.
    pub fn samples(&self) -> Result<BTreeMap<String, f64>> {
        let text = self.get("/metrics")?.success()?.body;
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        Ok(samples
            .filter_map(|line| line.rsplit_once(' '))
            .map(|(name, value)| (name.to_owned(), value.parse().unwrap_or(f64::NAN)))
            .collect())
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

    /// Its events from now on.
    pub fn events(&self) -> Result<EventStream> {
        EventStream::open(self.connect()?)
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

    /// The number of its thread of this name.
    pub fn thread(&self, name: &str) -> Result<i32> {
        for task in std::fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let task = task?;
            if std::fs::read_to_string(task.path().join("comm"))?.trim() == name {
                return Ok(task.file_name().to_string_lossy().parse()?);
            }
        }
        Err(self.failure(&format!("no thread '{name}'")))
    }

    /// Sends a signal to one of its threads.
    pub fn signal_thread(&self, name: &str, signal: i32) -> Result {
        let (pid, thread) = (i32::try_from(self.pid())?, self.thread(name)?);
        // SAFETY: needed because the standard library sends no signals; the call takes and gives plain numbers.
        match unsafe { libc::syscall(libc::SYS_tgkill, pid, thread, signal) } {
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

    /// A failure that shows what the process has said, and what it does.
    pub fn failure(&self, what: &str) -> Failure {
        let log = self.log();
        let start = log.len().saturating_sub(4000);
        let log = log.get(start..).unwrap_or(&log);
        let (console, stderr, threads) = (self.console.tail(), self.stderr.tail(), self.threads());
        Failure::new(format!(
            "{what}\n--- console:\n{console}\n--- log:\n{log}\n--- standard error:\n{stderr}\n--- threads:\n{threads}---"
        ))
    }

    /// A line for each thread: its name, the processor time that it has had, and where in the kernel it waits.
    fn threads(&self) -> String {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid()));
        let line = |task: &Path| {
            let read = |file| fs::read_to_string(task.join(file)).unwrap_or_default();
            let ticks = ticks(task).unwrap_or_default();
            format!("{}: {ticks} ticks, {}\n", read("comm").trim_end(), read("wchan"))
        };
        let tasks = tasks.into_iter().flatten().flatten();
        tasks.map(|task| line(&task.path())).collect()
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

/// Processor time of the thread with this folder in /proc, in ticks of 10 ms.
fn ticks(thread: &Path) -> Result<u64> {
    let stat = fs::read_to_string(thread.join("stat"))?;
    // What follows the name, which is in parentheses: the user's and the kernel's time are fields 14 and 15 of all.
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
