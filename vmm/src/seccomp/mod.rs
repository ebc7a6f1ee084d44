//! System call filters: each thread gives up, as its first statement, all system calls that its kind does not need.
//!
//! A thread also has the filters of the thread that started it, and the strictest verdict counts. So the filter of the
//! control thread holds those of the threads that it starts; the `api` thread is started before. See
//! `docs/security.md` for what the rules are, and `docs/adr/0007-system-call-filters.md` for why it is done so.

pub mod compiler;
pub mod image;
mod refused;

use std::borrow::Cow;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use devices::catalog::KINDS;
use devices::virtio::DeviceKind;

use crate::error::remedy;
use compiler::{CompileError, Instruction};
use image::Reader;
pub use refused::Refused;

/// The filters of `resources/seccomp/x86_64.json`.
static BUILT_IN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/seccomp"));

/// The group of what io threads do for disks that have a backend.
const BACKENDS: &str = "vhost_user";

/// The groups of what the control thread does only until the machine runs, when nobody can ask it for more.
const BEGINNING: [&str; 2] = ["start", "threads"];

/// The groups of devices that call sockets. The control thread needs rules of the others when it takes devices away.
const CALLERS: [&str; 3] = ["net", "vsock", BACKENDS];

/// How groups end that have what io threads do only when a client asks for a change of a device.
const CHANGES: &str = " changes";

/// Why filters cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The file of own filters.
    #[error("cannot read the system call filters in '{}': {}", path.display(), remedy(source))]
    Read {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is neither compiled nor text.
    #[error("cannot use the system call filters in '{}'", path.display())]
    Compile {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: CompileError,
    },
    /// It begins like compiled filters.
    #[error(
        "the system call filters are damaged, or of another version of Mayfly: compile them again with --compile-seccomp"
    )]
    Damaged,
    /// The kernel.
    #[error(
        "the kernel does not take the system call filter of thread '{thread}'; \
         one that has none (CONFIG_SECCOMP_FILTER) needs --no-seccomp"
    )]
    Install {
        /// For which thread.
        thread: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// A kind of thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thread {
    /// Owns the machine.
    Control,
    /// The same, once the machine runs and nobody can ask for anything.
    Settled,
    /// Speaks HTTP.
    Api,
    /// Runs devices.
    Io,
    /// Runs guest code.
    Vcpu,
    /// Waits for a disk.
    Flush,
}

impl Thread {
    fn name(self) -> &'static str {
        match self {
            Self::Control | Self::Settled => "control",
            Self::Api => "api",
            Self::Io => "io",
            Self::Vcpu => "vcpu",
            Self::Flush => "flush",
        }
    }
}

/// The filters of a process, for its threads to install.
#[derive(Debug, Clone, Default)]
pub struct Filters {
    image: Option<Arc<Cow<'static, [u8]>>>,
    /// Kinds of devices that never come.
    others: Vec<DeviceKind>,
    /// Whether devices can be changed.
    changes: bool,
    /// Whether there can be disks with a backend.
    backends: bool,
}

impl Filters {
    /// Those that Mayfly is built with.
    pub fn built_in() -> Self {
        Self::of(Cow::Borrowed(BUILT_IN))
    }

    /// None: every thread may do everything.
    pub fn none() -> Self {
        Self::default()
    }

    /// Those of a file, text or compiled.
    pub fn from_file(path: &Path) -> Result<Self, SeccompError> {
        let image = compile_file(path)?;
        let filters = Self::none();
        if THREADS
            .iter()
            .any(|thread| filters.program(&image, *thread).is_none())
        {
            return Err(SeccompError::Damaged);
        }
        Ok(Self::of(Cow::Owned(image)))
    }

    fn of(image: Cow<'static, [u8]>) -> Self {
        Self {
            image: Some(Arc::new(image)),
            others: Vec::new(),
            changes: true,
            backends: true,
        }
    }

    /// Whether there are any.
    pub fn is_on(&self) -> bool {
        self.image.is_some()
    }

    /// Lets io threads do without the groups of rules that are named after other kinds of devices than these, and,
    /// where nobody can ask for changes, without those for changes. When it has settled, the control thread does
    /// without the former where they call sockets.
    #[must_use]
    pub fn for_devices(mut self, possible: impl Fn(DeviceKind) -> bool, changes: bool) -> Self {
        self.others = KINDS.into_iter().filter(|kind| !possible(*kind)).collect();
        self.changes = changes;
        self
    }

    /// Lets io threads do without what only disks with a vhost-user backend need, unless there can be some.
    #[must_use]
    pub fn for_backends(mut self, possible: bool) -> Self {
        self.backends = possible;
        self
    }

    /// Whether a thread can do without a group of rules.
    fn is_unneeded(&self, thread: Thread, group: &str) -> bool {
        let never_comes = |kind| {
            self.others.iter().any(|other| other.name() == kind) || (kind == BACKENDS && !self.backends)
        };
        match thread {
            Thread::Io => match group.strip_suffix(CHANGES) {
                Some(kind) => !self.changes || never_comes(kind),
                None => never_comes(group),
            },
            Thread::Settled => BEGINNING.contains(&group) || (CALLERS.contains(&group) && never_comes(group)),
            Thread::Control | Thread::Api | Thread::Vcpu | Thread::Flush => false,
        }
    }

    /// Installs the filter of the calling thread, for the rest of its life.
    pub fn confine(&self, thread: Thread) -> Result<(), SeccompError> {
        let Some(image) = &self.image else { return Ok(()) };
        let program = self.program(image, thread).ok_or(SeccompError::Damaged)?;
        install(&program).map_err(|source| SeccompError::Install {
            thread: thread.name(),
            source,
        })
    }

    /// The program of a thread; `None` when the image is damaged.
    fn program(&self, image: &[u8], thread: Thread) -> Option<Vec<libc::sock_filter>> {
        let reader = Reader::new(image)?;
        let (head, tail) = compiler::frame(reader.mismatch);
        let pid = std::process::id();
        let groups = reader.thread(thread.name())?;
        let code = groups
            .into_iter()
            .filter(|group| !self.is_unneeded(thread, group.name))
            .flat_map(|group| group.code(pid));
        let filter = |Instruction { code, jt, jf, k }| libc::sock_filter { code, jt, jf, k };
        let all = head.into_iter().chain(code).chain([tail]);
        Some(all.map(filter).collect())
    }

    /// As [`Filters::confine`], where nobody can be told: a thread that has more rights than it should must not run.
    pub fn confine_or_die(&self, thread: Thread) {
        if let Err(error) = self.confine(thread) {
            log::error!(target: crate::logger::FATAL, "{}", crate::error::chain(&error));
            std::process::abort();
        }
    }
}

const THREADS: [Thread; 5] = [
    Thread::Control,
    Thread::Api,
    Thread::Io,
    Thread::Vcpu,
    Thread::Flush,
];

/// The compiled form of a file in either form.
pub fn compile_file(path: &Path) -> Result<Vec<u8>, SeccompError> {
    let content = fs::read(path).map_err(|source| SeccompError::Read {
        path: path.into(),
        source,
    })?;
    if content.starts_with(&image::MAGIC[..image::MAGIC.len() - 1]) {
        return Ok(content);
    }
    compiler::compile(&content).map_err(|source| SeccompError::Compile {
        path: path.into(),
        source,
    })
}

/// Gives the calling thread a filter.
fn install(program: &[libc::sock_filter]) -> io::Result<()> {
    let length = libc::c_ushort::try_from(program.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
    let program = libc::sock_fprog {
        len: length,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: needed because the standard library knows no filters. The kernel reads `len` instructions behind the
    // pointer, which live over the call, and changes nothing of ours.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            std::ptr::from_ref(&program),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Forbids this process and what it starts to gain rights by a program that has more (set-user-id). Without it, only
/// root may install filters.
pub fn give_up_new_privileges() -> io::Result<()> {
    // SAFETY: needed because the standard library has no such call, which takes and gives plain numbers.
    match unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests;
