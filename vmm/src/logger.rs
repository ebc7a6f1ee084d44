//! The log: one line per record, to standard output or to a file.
//!
//! ```text
//! 2026-11-21T01:50:35.702229931 [ID:THREAD:LEVEL:FILE:LINE] message
//! ```
//! Level and origin appear when asked for. Every thread logs; a line that cannot be written is counted and lost,
//! and never stops the machine.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use log::{LevelFilter, Log, Metadata, Record};

use crate::config::LoggerConfig;

/// The process's only logger.
pub static LOGGER: Logger = Logger {
    settings: Mutex::new(Settings::new()),
    missed: AtomicU64::new(0),
};

struct Settings {
    id: String,
    file: Option<File>,
    show_level: bool,
    show_origin: bool,
    module: Option<String>,
}

impl Settings {
    const fn new() -> Self {
        Self {
            id: String::new(),
            file: None,
            show_level: false,
            show_origin: false,
            module: None,
        }
    }
}

/// The logger's state.
pub struct Logger {
    settings: Mutex<Settings>,
    missed: AtomicU64,
}

impl Logger {
    /// Makes this the process's logger, at level `Info`, with the instance id in every line.
    pub fn install(&'static self, id: &str) {
        self.lock().id = id.into();
        // A second call finds it installed already.
        let _ = log::set_logger(self);
        log::set_max_level(LevelFilter::Info);
    }

    /// Applies a config wholly, or not at all when its file cannot be opened.
    pub fn configure(&self, config: &LoggerConfig) -> io::Result<()> {
        let file = config.log_path.as_deref().map(open_sink).transpose()?;
        let mut settings = self.lock();
        if file.is_some() {
            settings.file = file;
        }
        settings.show_level = config.show_level.unwrap_or(settings.show_level);
        settings.show_origin = config.show_log_origin.unwrap_or(settings.show_origin);
        if config.module.is_some() {
            settings.module.clone_from(&config.module);
        }
        log::set_max_level(config.level.map_or(LevelFilter::Info, |level| level.0));
        Ok(())
    }

    /// Lines that could not be written.
    pub fn missed(&self) -> u64 {
        self.missed.load(Ordering::Relaxed)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Log for Logger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let mut settings = self.lock();
        let target = record.module_path().unwrap_or_else(|| record.target());
        if settings
            .module
            .as_ref()
            .is_some_and(|module| !target.starts_with(module.as_str()))
        {
            return;
        }
        let line = settings.line(record);
        let written = match &mut settings.file {
            Some(file) => file.write_all(line.as_bytes()),
            None => io::stdout().write_all(line.as_bytes()),
        };
        if written.is_err() {
            self.missed.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn flush(&self) {}
}

impl Settings {
    fn line(&self, record: &Record<'_>) -> String {
        let thread = std::thread::current();
        let mut line = format!("{} [{}:{}", timestamp(), self.id, thread.name().unwrap_or("?"));
        if self.show_level {
            line.push(':');
            line.push_str(record.level().as_str());
        }
        if self.show_origin {
            line.push_str(&format!(
                ":{}:{}",
                record.file().unwrap_or("?"),
                record.line().unwrap_or(0)
            ));
        }
        line.push_str(&format!("] {}\n", record.args()));
        line
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

/// The local time with nanoseconds.
fn timestamp() -> String {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    let seconds = libc::time_t::try_from(now.as_secs()).unwrap_or(0);
    // SAFETY: needed because the standard library knows no time zones. Both pointers are to live values of the right
    // type, and a zeroed `tm` is a valid one.
    let tm = unsafe {
        let mut tm = std::mem::zeroed();
        libc::localtime_r(&seconds, &mut tm);
        tm
    };
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:09}",
        tm.tm_year + 1900,
        tm.tm_mon + 1,
        tm.tm_mday,
        tm.tm_hour,
        tm.tm_min,
        tm.tm_sec,
        now.subsec_nanos()
    )
}
