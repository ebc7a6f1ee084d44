//! What signals do to the process.
//!
//! SIGTERM and SIGINT wait in a signalfd for the control thread, which ends the process in order. Faults and resource
//! limits end it at once with the exit code that orchestrators know. SIGPIPE is only counted. All others whose default is
//! to end a process do so, once sockets and terminal are as they were.
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

use crate::kvm::kick_signal;
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
/// Signals, besides the real-time ones, that end the process as they would without a handler, but leave nothing behind. So
/// does SIGABRT, by which other threads hand these over to the control thread.
const DEADLY: [c_int; 11] = [
    libc::SIGQUIT,
    libc::SIGTRAP,
    libc::SIGFPE,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGSTKFLT,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGIO,
    libc::SIGPWR,
];
/// The exit code after a signal that nobody has reason to send, such as a SIGSYS that is not from a filter.
const UNEXPECTED: c_int = 2;
/// `SYS_SECCOMP` of `siginfo_t`: a filter has refused a system call.
const BY_FILTER: c_int = 1;
/// How long a thread waits for the control thread to end the process, in seconds.
const PATIENCE: libc::c_uint = 1;

/// The exit code that the first fatal signal has chosen; 0 before.
static DYING: AtomicI32 = AtomicI32::new(0);
/// The first signal of those that the process dies of as if it had no handler; 0 before.
static DEATH: AtomicI32 = AtomicI32::new(0);
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

/// Sees to it that a death by a signal leaves no sockets and no raw terminal behind.
extern "C" fn on_deadly(signal: c_int, _: *mut siginfo_t, _: *mut c_void) {
    let _ = DEATH.compare_exchange(0, signal, Ordering::SeqCst, Ordering::SeqCst);
    // Not `signal`, whose action is the default again.
    if hand_over(libc::SIGABRT) {
        terminal::restore();
        remove_sockets();
    }
    let signal = DEATH.load(Ordering::SeqCst);
    if signal == libc::SIGABRT {
        // SAFETY: needed because only async-signal-safe calls are allowed here; this is one, and takes plain numbers.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    take(signal);
    // SAFETY: as above.
    unsafe { libc::_exit(128 + signal) }
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
    register_signal_handler(libc::SIGABRT, on_deadly).map_err(failed)?;
    register_signal_handler(libc::SIGPIPE, on_pipe).map_err(failed)?;
    let real_time = kick_signal() + 1..=libc::SIGRTMAX();
    for signal in DEADLY.into_iter().chain(real_time) {
        die_in_order_by(signal)?;
    }
    Termination::new()
}

/// Installs the handler of a deadly signal, which is for once: the filters of most threads do not let them restore the
/// default action. What the process was started to ignore, as background jobs are SIGQUIT, stays ignored.
fn die_in_order_by(signal: c_int) -> io::Result<()> {
    let checked = |result| match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: needed because no wrapper in use knows such handlers. The value is plain data of which all zeros are valid,
    // and the handler is of the type that SA_SIGINFO stands for.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        checked(libc::sigaction(signal, std::ptr::null(), &mut action))?;
        if action.sa_sigaction == libc::SIG_IGN {
            return Ok(());
        }
        action.sa_sigaction = on_deadly as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESETHAND;
        libc::sigfillset(&mut action.sa_mask);
        checked(libc::sigaction(signal, &action, std::ptr::null_mut()))
    }
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
    // SAFETY: needed to restore the default action; takes plain numbers.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
    take(signal);
    std::process::exit(128 + signal)
}

/// Lets `signal`, whose action is the default one, end this process. Returns in the first process of a PID namespace.
/// Async-signal-safe.
fn take(signal: c_int) {
    // SAFETY: needed to send and unblock the signal. The set is initialized before its use.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, signal);
        libc::raise(signal);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
    }
}
