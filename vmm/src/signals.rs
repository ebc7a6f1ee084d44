//! What signals do to the process.
//!
//! SIGTERM and SIGINT wait in a signalfd for the control thread, which ends the process in order. Faults and resource
//! limits end it at once with the exit code that orchestrators know. SIGPIPE is only counted.
//!
//! A thread that a signal ends says so and hands over to the control thread, as only that one may remove files and set
//! the terminal back.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::register_signal_handler;

use crate::logger::LOGGER;
use crate::metrics::last_words;
use crate::{seccomp, terminal};

/// Signals that end the process, with its exit code and the name of their counter.
const FATAL: [(c_int, c_int, &str); 7] = [
    (libc::SIGSYS, 148, "num_faults"),
    (libc::SIGBUS, 149, "sigbus"),
    (libc::SIGSEGV, 150, "sigsegv"),
    (libc::SIGXFSZ, 151, "sigxfsz"),
    (libc::SIGXCPU, 154, "sigxcpu"),
    (libc::SIGHUP, 156, "sighup"),
    (libc::SIGILL, 157, "sigill"),
];
/// The exit code after a signal that nobody has reason to send, such as a SIGSYS that is not from a filter.
const UNEXPECTED: c_int = 2;
/// `SYS_SECCOMP` of `siginfo_t`: a filter has refused a system call.
const BY_FILTER: c_int = 1;
/// How long a thread waits for the control thread to end the process, in seconds.
const PATIENCE: libc::c_uint = 1;

/// The exit code that the first fatal signal has chosen; 0 before.
static DYING: AtomicI32 = AtomicI32::new(0);
static PIPES: AtomicU64 = AtomicU64::new(0);
/// The sockets of the API and of the vsock device, to be removed by a fatal signal's handler.
static SOCKETS: [OnceLock<CString>; 2] = [const { OnceLock::new() }; 2];

/// Broken pipes so far.
pub fn broken_pipes() -> u64 {
    PIPES.load(Ordering::Relaxed)
}

/// Lets a fatal signal remove a socket file: that of the API, or that of the vsock device.
pub fn remove_on_fault(socket: &Path) {
    if let Ok(path) = CString::new(socket.as_os_str().as_bytes()) {
        let free = SOCKETS.iter().find(|place| place.get().is_none());
        // Each of the two sockets comes once, from the control thread.
        let _ = free.map(|place| place.set(path));
    }
}

extern "C" fn on_fatal(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: needed to know the cause. The kernel passes a valid value to a handler of this type.
    let by_filter = signal == libc::SIGSYS && unsafe { (*info).si_code } == BY_FILTER;
    let known = FATAL.into_iter().find(|(known, _, _)| *known == signal);
    let (_, code, counter) = known
        .filter(|_| by_filter || signal != libc::SIGSYS)
        .unwrap_or((signal, UNEXPECTED, ""));
    let first = DYING.compare_exchange(0, code, Ordering::SeqCst, Ordering::SeqCst);
    if first.is_ok() {
        if by_filter {
            // SAFETY: the kernel has passed both values for a signal of this kind.
            let refused = unsafe { seccomp::Refused::new(info, context) };
            LOGGER.last_words(format_args!("{refused}"));
        }
        last_words::write(counter);
        say(signal);
    }
    if hand_over(signal) {
        terminal::restore();
        remove_sockets();
    }
    // SAFETY: needed because only async-signal-safe calls are allowed here; this is one.
    unsafe { libc::_exit(DYING.load(Ordering::SeqCst)) }
}

/// Lets the control thread take `signal` too, and waits for it to end the process. True on the control thread, which
/// goes on at once; false on others when it has not come to it.
fn hand_over(signal: c_int) -> bool {
    if on_control_thread() {
        return true;
    }
    // SAFETY: needed because only async-signal-safe calls are allowed here; these are. The first thread of a process
    // has the number of the process.
    unsafe {
        libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::getpid(), signal);
        libc::sleep(PATIENCE);
    }
    false
}

fn on_control_thread() -> bool {
    // Not the C library's function: the standard library refers to it weakly, and a static link then leaves it out.
    // SAFETY: needed because the standard library does not tell. Both calls only give a number.
    unsafe { libc::syscall(libc::SYS_gettid) == libc::c_long::from(libc::getpid()) }
}

fn say(signal: c_int) {
    let mut text = *b"mayfly: shutting down after signal   \n";
    let digits = u8::try_from(signal).unwrap_or(0);
    text[35] = b'0' + digits / 10 % 10;
    text[36] = b'0' + digits % 10;
    // SAFETY: needed because only async-signal-safe calls are allowed here; this is one. The pointer is to live data of
    // the given length.
    unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
}

/// Removes the sockets on a way out that passes by their owners. Async-signal-safe.
fn remove_sockets() {
    for path in SOCKETS.iter().filter_map(OnceLock::get) {
        // SAFETY: needed because the standard library's call takes memory. The path ends with zero.
        unsafe { libc::unlink(path.as_ptr()) };
    }
}

/// Makes a panic, which ends the process, leave a line in the log and in the metrics, and nothing else behind.
pub fn on_panic() {
    std::panic::set_hook(Box::new(move |panic| {
        if on_control_thread() {
            terminal::restore();
        }
        // Not the hook of the standard library, which may read files for a backtrace.
        eprintln!("mayfly: {panic}");
        log::error!(target: crate::logger::FATAL, "Mayfly has panicked: {panic}");
        last_words::write("panic_count");
    }));
}

/// Sees to it that an abort leaves no sockets and no raw terminal behind.
extern "C" fn on_abort(signal: c_int, _: *mut siginfo_t, _: *mut c_void) {
    if hand_over(signal) {
        terminal::restore();
        remove_sockets();
    }
    // SAFETY: needed because only async-signal-safe calls are allowed here; these are, and take plain numbers. The
    // signal is blocked until this handler returns, and then ends the process.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

extern "C" fn on_pipe(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    PIPES.fetch_add(1, Ordering::Relaxed);
}

/// Installs all handlers. Called before the first thread is started, so that all threads inherit the mask.
pub fn install() -> io::Result<Termination> {
    let failed = |error: vmm_sys_util::errno::Error| io::Error::from_raw_os_error(error.errno());
    for (signal, _, _) in FATAL {
        register_signal_handler(signal, on_fatal).map_err(failed)?;
    }
    register_signal_handler(libc::SIGABRT, on_abort).map_err(failed)?;
    register_signal_handler(libc::SIGPIPE, on_pipe).map_err(failed)?;
    Termination::new()
}

/// SIGTERM and SIGINT, waiting to be read.
pub struct Termination(OwnedFd);

impl Termination {
    fn new() -> io::Result<Self> {
        // SAFETY: needed because the standard library knows no signals. The set is initialized before its use, and
        // the descriptor is new and ours.
        unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, libc::SIGTERM);
            libc::sigaddset(&mut set, libc::SIGINT);
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            match libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
                fd if fd < 0 => Err(io::Error::last_os_error()),
                fd => Ok(Self(OwnedFd::from_raw_fd(fd))),
            }
        }
    }

    /// The signal that arrived.
    pub fn read(&self) -> Option<c_int> {
        let mut info = std::mem::MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: needed to read a kernel structure; the buffer has room for one, and is taken only when it was
        // written wholly.
        unsafe {
            let count = libc::read(self.0.as_raw_fd(), info.as_mut_ptr().cast(), size);
            (usize::try_from(count) == Ok(size)).then(|| info.assume_init().ssi_signo.cast_signed())
        }
    }
}

impl AsRawFd for Termination {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Ends the process by `signal`, as its parent expects of a process that does not handle it. The first process of a PID
/// namespace does not die by its own signals: it exits with the code that shells give for the signal.
pub fn die_by(signal: c_int) -> ! {
    // SAFETY: needed to restore the default action and unblock the signal. The set is initialized before its use.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, signal);
        libc::raise(signal);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
    }
    std::process::exit(128 + signal)
}
