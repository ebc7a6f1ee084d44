//! The log: one line per record, to standard output or to a file.
//!
//! ```text
//! 2026-11-21T01:50:35.702229931 [ID:THREAD:LEVEL:FILE:LINE] message
//! ```
//! Level and origin appear when asked for. Every thread logs; a line that cannot be written is counted and lost,
//! and never stops the machine.
//!
//! What a guest can cause is limited, so that it cannot fill the host's disk: on the threads that called
//! [`limit_this_thread`], each place in the code logs at most ten messages in five seconds, and then says how many it
//! has held back. Requests and their answers come from the operator and are never held back; nor is what ends the
//! process ([`FATAL`]).

mod limit;
mod line;

use std::cell::Cell;
use std::ffi::CString;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use log::{LevelFilter, Log, Metadata, Record};

use crate::clock;
use crate::config::LoggerConfig;
use limit::{RateLimit, Verdict};
use line::{Escaped, Line, Timestamp};

/// The process's only logger.
pub static LOGGER: Logger = Logger::new();

/// The target of messages that are never held back: they say why the process ends.
pub const FATAL: &str = "fatal";

thread_local! {
    static LIMITED: Cell<bool> = const { Cell::new(false) };
}

/// From now on the guest can cause what this thread logs.
pub fn limit_this_thread() {
    LIMITED.set(true);
}

/// Reads the host's time zone, which the C library else does with the first line.
pub fn load_time_zone() {
    drop(Timestamp::now().to_string());
}

/// Changed before the machine starts, so that later no thread waits for another one here.
struct Settings {
    id: String,
    /// Standard output without its buffer and lock, or a file; none before [`Logger::install`].
    out: Option<File>,
    show_level: bool,
    show_origin: bool,
    module: Option<String>,
}

/// The logger's state.
pub struct Logger {
    settings: RwLock<Settings>,
    limit: RateLimit,
    missed: AtomicU64,
}

impl Logger {
    const fn new() -> Self {
        Self {
            settings: RwLock::new(Settings {
                id: String::new(),
                out: None,
                show_level: false,
                show_origin: false,
                module: None,
            }),
            limit: RateLimit::new(),
            missed: AtomicU64::new(0),
        }
    }

    /// Makes this the process's logger, at level `Info`, with the instance id in every line.
    pub fn install(&'static self, id: &str) {
        let stdout = io::stdout().as_fd().try_clone_to_owned();
        self.change(|settings| {
            settings.id = id.into();
            settings.out = stdout.ok().map(File::from);
        });
        // A second call finds it installed already.
        let _ = log::set_logger(self);
        log::set_max_level(LevelFilter::Info);
    }

    /// Applies a config wholly, or not at all when its file cannot be opened.
    pub fn configure(&self, config: &LoggerConfig) -> io::Result<()> {
        let file = config.log_path.as_deref().map(open_sink).transpose()?;
        self.change(|settings| {
            if file.is_some() {
                settings.out = file;
            }
            settings.show_level = config.show_level.unwrap_or(settings.show_level);
            settings.show_origin = config.show_log_origin.unwrap_or(settings.show_origin);
            if config.module.is_some() {
                settings.module.clone_from(&config.module);
            }
        });
        log::set_max_level(config.level.map_or(LevelFilter::Info, |level| level.0));
        Ok(())
    }

    /// Writes a line from the handler of a fatal signal, if the log can be reached from where the thread stands.
    pub fn last_words(&self, message: std::fmt::Arguments<'_>) {
        if let Ok(settings) = self.settings.try_read() {
            let record = Record::builder().level(log::Level::Error).build();
            self.write(&settings, &record, message);
        }
    }

    /// Lines that could not be written.
    pub fn missed(&self) -> u64 {
        self.missed.load(Ordering::Relaxed)
    }

    /// Messages that were held back.
    pub fn rate_limited(&self) -> u64 {
        self.limit.total()
    }

    fn change(&self, change: impl FnOnce(&mut Settings)) {
        change(&mut self.settings.write().unwrap_or_else(PoisonError::into_inner));
    }

    fn write(&self, settings: &Settings, record: &Record<'_>, message: std::fmt::Arguments<'_>) {
        let mut line = Line::new();
        // Writing to a line does not fail; an argument that cannot be shown leaves the line short.
        let _ = settings
            .begin(&mut line, record)
            .and_then(|()| Escaped(&mut line).write_fmt(message));
        line.end();
        if settings.write(line.bytes()).is_err() {
            self.missed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Log for Logger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let settings = self.settings.read().unwrap_or_else(PoisonError::into_inner);
        let target = record.module_path().unwrap_or_else(|| record.target());
        let module = settings.module.as_ref();
        if module.is_some_and(|module| !target.starts_with(module.as_str())) {
            return;
        }
        if LIMITED.get() && record.target() != FATAL {
            match self.limit.judge(record, clock::now_us()) {
                Verdict::Suppress => return,
                Verdict::Pass { suppressed: 0 } => {}
                Verdict::Pass { suppressed } => {
                    self.write(
                        &settings,
                        record,
                        format_args!("{suppressed} messages suppressed"),
                    );
                }
            }
        }
        self.write(&settings, record, *record.args());
    }

    /// Tells of the messages that were held back last; for the end of the process.
    fn flush(&self) {
        let untold = self.limit.take_untold();
        if untold > 0 {
            log::warn!("{untold} messages suppressed");
        }
    }
}

impl Settings {
    fn begin(&self, line: &mut Line, record: &Record<'_>) -> std::fmt::Result {
        let thread = std::thread::current();
        // Threads are started with a name; only the first is not.
        let name = thread.name().unwrap_or("main");
        write!(line, "{} [{}:{name}", Timestamp::now(), self.id)?;
        if self.show_level {
            write!(line, ":{}", record.level())?;
        }
        if self.show_origin {
            let (file, number) = (record.file().unwrap_or("?"), record.line().unwrap_or(0));
            write!(line, ":{file}:{number}")?;
        }
        line.write_str("] ")
    }

    /// One call for a whole line, so that those of several threads do not mix, without a lock.
    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let mut out = self.out.as_ref().ok_or(io::ErrorKind::NotFound)?;
        out.write_all(bytes)
    }
}

/// Opens a file or FIFO for appending lines; never waits for a FIFO's reader.
pub fn open_sink(path: &Path) -> io::Result<File> {
    // Opening for reading too lets a FIFO be opened before its reader.
    OpenOptions::new()
        .create(true)
        .read(true)
        .append(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY)
        .open(path)
}

/// Whether [`open_sink`] would succeed. The file is neither made nor opened: who waits at the other end of a FIFO would
/// notice.
pub fn check_sink(path: &Path) -> io::Result<()> {
    match path.metadata() {
        Ok(found) if found.is_dir() => Err(io::Error::from_raw_os_error(libc::EISDIR)),
        Ok(_) => access(path, libc::R_OK | libc::W_OK),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            access(parent.unwrap_or(Path::new(".")), libc::W_OK | libc::X_OK)
        }
        Err(error) => Err(error),
    }
}

/// Whether this process may use the file so.
fn access(path: &Path, mode: libc::c_int) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: needed because the standard library has no such call. The path ends with zero and lives across it.
    match unsafe { libc::faccessat(libc::AT_FDCWD, path.as_ptr(), mode, libc::AT_EACCESS) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests;
