//! What signals do to the process.
//!
//! SIGTERM and SIGINT wait in a signalfd for the control thread, which ends the process in order. Faults and resource
//! limits end it at once with the exit code that orchestrators know. SIGPIPE is only counted.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::register_signal_handler;

use crate::metrics::last_words;
use crate::terminal;

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

extern "C" fn on_fatal(signal: c_int, _: *mut siginfo_t, _: *mut c_void) {
    let (_, code, counter) = FATAL
        .into_iter()
        .find(|(known, _, _)| *known == signal)
        .unwrap_or((signal, 2, ""));
    terminal::restore();
    last_words::write(counter);
    let mut text = *b"mayfly: shutting down after signal   \n";
    let digits = u8::try_from(signal).unwrap_or(0);
    text[35] = b'0' + digits / 10 % 10;
    text[36] = b'0' + digits % 10;
    // SAFETY: needed because only async-signal-safe calls are allowed here; these are. The pointers are to live data
    // of the given length, and to a string that ends with zero.
    unsafe {
        libc::write(2, text.as_ptr().cast(), text.len());
        remove_sockets();
        libc::_exit(code);
    }
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
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        terminal::restore();
        print(panic);
        log::error!(target: crate::logger::FATAL, "Mayfly has panicked: {panic}");
        last_words::write("panic_count");
        remove_sockets();
    }));
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

/// Ends the process by `signal`, as its parent expects of a process that does not handle it.
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
    std::process::exit(2)
}
