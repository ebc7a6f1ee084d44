//! Stands in for a monitor that its guest has taken over: tries to get out of where it runs, and prints a line for each way:
//! its name, and `done` or why not. `process_jailer_escape` runs it in a jail, where nothing may be done, and outside, where
//! everything may.
//!
//! usage: escapee ... -- FACTS (the words before belong to the monitor); FACTS name what there is outside, as KEY=VALUE:
//! file (of the host), pid (a process of the host), port (listens on 127.0.0.1), abstract (name of a listening socket), key
//! (in the session's keyring), shm (a System V key), fd (left open).

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::net::TcpStream;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::{Path, PathBuf};

/// What there is outside.
struct Facts(BTreeMap<String, String>);

impl Facts {
    fn text(&self, key: &str) -> &str {
        self.0.get(key).map_or("", String::as_str)
    }

    fn number(&self, key: &str) -> libc::c_long {
        self.text(key).parse().unwrap_or(-1)
    }

    fn c_text(&self, key: &str) -> CString {
        CString::new(self.text(key)).unwrap_or_default()
    }
}

type Attempt = (&'static str, fn(&Facts) -> io::Result<()>);

/// Each way out.
const ATTEMPTS: [Attempt; 34] = [
    ("open a file of the host", |facts| {
        File::open(facts.text("file")).map(drop)
    }),
    ("open a file of the host by ..", |facts| {
        File::open(format!("{}{}", "../".repeat(40), facts.text("file"))).map(drop)
    }),
    ("read through a descriptor left open", |facts| {
        system(libc::SYS_lseek, [facts.number("fd"), 0, 0, 0, 0])
    }),
    ("find a variable of the environment", |_| {
        std::env::vars_os()
            .next()
            .map(drop)
            .ok_or_else(|| io::Error::other("there is none"))
    }),
    ("signal a process", |facts| {
        system(libc::SYS_kill, [facts.number("pid"), 0, 0, 0, 0])
    }),
    ("trace a process", |facts| {
        let seize = libc::c_long::from(libc::PTRACE_SEIZE);
        system(libc::SYS_ptrace, [seize, facts.number("pid"), 0, 0, 0])
    }),
    ("read the memory of a process", |facts| {
        read_memory(facts.number("pid"))
    }),
    ("get a handle of a process", |facts| {
        system(libc::SYS_pidfd_open, [facts.number("pid"), 0, 0, 0, 0])
    }),
    ("read what /proc says about a process", |facts| {
        fs::read(format!("/proc/{}/status", facts.text("pid"))).map(drop)
    }),
    ("mount a file system", |_| mount(c"none", c"/run", c"tmpfs")),
    ("mount /proc", |_| mount(c"none", c"/run", c"proc")),
    ("remount the root", |_| {
        own_mounts();
        let flags = libc::c_long::try_from(libc::MS_REMOUNT | libc::MS_BIND).unwrap_or(0);
        system(libc::SYS_mount, [0, c"/".as_ptr() as libc::c_long, 0, flags, 0])
    }),
    ("change the root", |_| {
        system(libc::SYS_chroot, [c"/run".as_ptr() as libc::c_long, 0, 0, 0, 0])
    }),
    ("make a block device", |_| mknod(libc::S_IFBLK)),
    ("make a character device", |_| mknod(libc::S_IFCHR)),
    ("open another device", |_| File::open("/dev/zero").map(drop)),
    ("add a file to /dev", |_| {
        made(
            File::create("/dev/mayfly-escapee").map(drop),
            "/dev/mayfly-escapee",
        )
    }),
    ("make a mount namespace", |_| unshare(libc::CLONE_NEWNS)),
    ("make a network namespace", |_| unshare(libc::CLONE_NEWNET)),
    ("make a user namespace", |_| unshare(libc::CLONE_NEWUSER)),
    ("make a process in a user namespace", |_| {
        child(libc::CLONE_NEWUSER)
    }),
    ("enter a namespace of another process", |facts| {
        let file = File::open(format!("/proc/{}/ns/ipc", facts.text("pid")))?;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        system(libc::SYS_setns, [fd.into(), 0, 0, 0, 0])
    }),
    ("become root", |_| system(libc::SYS_setresuid, [0, 0, 0, 0, 0])),
    ("join a group", |_| {
        let groups = [0_u32];
        system(libc::SYS_setgroups, [1, groups.as_ptr() as libc::c_long, 0, 0, 0])
    }),
    ("connect to a port of the host", |facts| {
        TcpStream::connect(("127.0.0.1", u16::try_from(facts.number("port")).unwrap_or(0))).map(drop)
    }),
    ("connect to an abstract socket of the host", |facts| {
        UnixStream::connect_addr(&SocketAddr::from_abstract_name(facts.text("abstract"))?).map(drop)
    }),
    ("find a key of the session", |facts| {
        const SEARCH: libc::c_long = 10;
        const SESSION_KEYRING: libc::c_long = -3;
        let name = facts.c_text("key");
        let (kind, name) = (c"user".as_ptr() as libc::c_long, name.as_ptr() as libc::c_long);
        system(libc::SYS_keyctl, [SEARCH, SESSION_KEYRING, kind, name, 0])
    }),
    ("find shared memory", |facts| {
        system(libc::SYS_shmget, [facts.number("shm"), 0, 0, 0, 0])
    }),
    ("change the host's name", |_| {
        let name = c"escapee".as_ptr() as libc::c_long;
        system(libc::SYS_sethostname, [name, 7, 0, 0, 0])
    }),
    ("change the own program", |_| {
        let program = own_program();
        fs::set_permissions(&program, fs::metadata(&program)?.permissions())
    }),
    ("execute a new file", |_| {
        let path = new_file();
        fs::copy(own_program(), &path)?;
        let executed = std::process::Command::new(&path).arg(NOTHING).status();
        made(executed.map(drop), &path)
    }),
    ("make a symbolic link", |_| {
        let path = new_file();
        made(std::os::unix::fs::symlink("/etc", &path), &path)
    }),
    ("make a file outside of /run", |_| {
        let path = "/mayfly-escapee";
        made(File::create(path).map(drop), path)
    }),
    ("load a BPF program", |_| load_bpf()),
];

/// Ways to what the jailer leaves open, and only the monitor's own filter closes.
const FILTERED: [Attempt; 5] = [
    ("make a socket of the internet", |_| {
        let (family, kind) = (libc::AF_INET.into(), libc::SOCK_DGRAM.into());
        system(libc::SYS_socket, [family, kind, 0, 0, 0])
    }),
    ("add a key to the own keyring", |_| {
        const PROCESS_KEYRING: libc::c_long = -2;
        let (kind, name) = (
            c"user".as_ptr() as libc::c_long,
            c"escapee".as_ptr() as libc::c_long,
        );
        system(libc::SYS_add_key, [kind, name, name, 7, PROCESS_KEYRING])
    }),
    ("make a process", |_| child(0)),
    ("set up io_uring", |_| {
        let mut parameters = [0_u8; 120];
        system(
            libc::SYS_io_uring_setup,
            [1, parameters.as_mut_ptr() as libc::c_long, 0, 0, 0],
        )
    }),
    ("trace itself from a child", |_| {
        system(libc::SYS_ptrace, [0, 0, 0, 0, 0])
    }),
];

/// An argument that makes this program do nothing.
const NOTHING: &str = "--nothing";

fn main() {
    if std::env::args().nth(1).is_some_and(|word| word == NOTHING) {
        return;
    }
    let words = std::env::args().skip_while(|word| word != "--");
    let pairs = words.filter_map(|word| {
        let (key, value) = word.split_once('=')?;
        Some((key.to_owned(), value.to_owned()))
    });
    let facts = Facts(pairs.collect());
    for (group, attempts) in [("jail", &ATTEMPTS[..]), ("filter", &FILTERED[..])] {
        for (name, attempt) in attempts {
            match in_child(|| attempt(&facts)) {
                Ok(()) => println!("{group}: {name}: done"),
                Err(error) => println!("{group}: {name}: {error}"),
            }
        }
    }
}

/// Makes an attempt in a process of its own, so that one does not change what the next finds.
fn in_child(attempt: impl Fn() -> io::Result<()>) -> io::Result<()> {
    // SAFETY: needed so that attempts are independent. This process has one thread.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let code = match attempt() {
                Ok(()) => 0,
                Err(error) => error.raw_os_error().unwrap_or(255),
            };
            // SAFETY: needed to end without what the parent has at its exit.
            unsafe { libc::_exit(code) }
        }
        pid => {
            let mut status = 0;
            // SAFETY: needed as the standard library waits for its own children only; the status is alive.
            unsafe { libc::waitpid(pid, &mut status, 0) };
            match (libc::WIFEXITED(status), libc::WEXITSTATUS(status)) {
                (true, 0) => Ok(()),
                (true, 255) => Err(io::Error::other("not there")),
                (true, code) => Err(io::Error::from_raw_os_error(code)),
                (false, _) => Err(io::Error::other(format!(
                    "died by signal {}",
                    libc::WTERMSIG(status)
                ))),
            }
        }
    }
}

fn system(number: libc::c_long, arguments: [libc::c_long; 5]) -> io::Result<()> {
    flagged(number, arguments).map(drop)
}

/// A system call, and what it returns. The sixth argument is zero.
fn flagged(number: libc::c_long, [a, b, c, d, e]: [libc::c_long; 5]) -> io::Result<libc::c_long> {
    const NOTHING_MORE: libc::c_long = 0;
    // SAFETY: needed because these calls are made for being refused, and have no wrappers. Pointers among the arguments
    // are to memory that lives until the call has returned.
    match unsafe { libc::syscall(number, a, b, c, d, e, NOTHING_MORE) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

fn own_program() -> PathBuf {
    std::env::args_os().next().unwrap_or_default().into()
}

/// A file where files can be made: in a jail, that is `/run`.
fn new_file() -> PathBuf {
    let folder = if Path::new("/tmp").exists() {
        "/tmp"
    } else {
        "/run"
    };
    Path::new(folder).join(format!("mayfly-escapee-{}", std::process::id()))
}

/// The result of making a file, which is removed again.
fn made(result: io::Result<()>, path: impl AsRef<Path>) -> io::Result<()> {
    // It may not be there.
    let _ = fs::remove_file(path);
    result
}

fn unshare(namespaces: libc::c_int) -> io::Result<()> {
    system(libc::SYS_unshare, [namespaces.into(), 0, 0, 0, 0])
}

/// A new process that ends at once.
fn child(namespaces: libc::c_int) -> io::Result<()> {
    let flags = namespaces | libc::SIGCHLD;
    if flagged(libc::SYS_clone, [flags.into(), 0, 0, 0, 0])? == 0 {
        // SAFETY: needed to end the new process without what its parent has at its exit.
        unsafe { libc::_exit(0) }
    }
    Ok(())
}

/// Outside, what is mounted is to be seen by this process only. In a jail this fails, and what follows is tried there.
fn own_mounts() {
    let private = libc::c_long::try_from(libc::MS_REC | libc::MS_PRIVATE).unwrap_or(0);
    let made = unshare(libc::CLONE_NEWNS)
        .and_then(|()| system(libc::SYS_mount, [0, c"/".as_ptr() as libc::c_long, 0, private, 0]));
    drop(made);
}

fn mount(source: &std::ffi::CStr, target: &std::ffi::CStr, kind: &std::ffi::CStr) -> io::Result<()> {
    own_mounts();
    let text = |text: &std::ffi::CStr| text.as_ptr() as libc::c_long;
    system(libc::SYS_mount, [text(source), text(target), text(kind), 0, 0])
}

fn mknod(kind: libc::mode_t) -> io::Result<()> {
    let path = new_file();
    let mode = libc::c_long::from(kind | 0o600);
    let number = libc::c_long::try_from(libc::makedev(1, 1)).unwrap_or(0);
    let name = CString::new(path.as_os_str().as_encoded_bytes())?;
    made(
        system(
            libc::SYS_mknod,
            [name.as_ptr() as libc::c_long, mode, number, 0, 0],
        ),
        path,
    )
}

/// Reads from the start of a process's stack segment: the address is in its own `stat`, or a guess.
fn read_memory(pid: libc::c_long) -> io::Result<()> {
    let mut byte = [0_u8];
    let local = libc::iovec {
        iov_base: byte.as_mut_ptr().cast(),
        iov_len: 1,
    };
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Field 28 of all: the bottom of the stack; 26 fields follow the name.
    let stack = stat.rsplit(") ").next().unwrap_or_default().split(' ').nth(25);
    let remote = libc::iovec {
        iov_base: stack.and_then(|text| text.parse::<usize>().ok()).unwrap_or(4096) as *mut _,
        iov_len: 1,
    };
    let pointer = |vector: &libc::iovec| &raw const *vector as libc::c_long;
    system(
        libc::SYS_process_vm_readv,
        [pid, pointer(&local), 1, pointer(&remote), 1],
    )
}

/// A program that does nothing but return 0.
fn load_bpf() -> io::Result<()> {
    const PROG_LOAD: libc::c_long = 5;
    // Not one of the kinds that some hosts let everybody load.
    const XDP: u32 = 6;
    // r0 = 0; exit
    let program = [0xb7_u64, 0x95];
    let license = c"GPL";
    let mut attributes = [0_u64; 16];
    attributes[0] = u64::from(XDP) | 2 << 32;
    attributes[1] = program.as_ptr() as u64;
    attributes[2] = license.as_ptr() as u64;
    let size = libc::c_long::try_from(size_of_val(&attributes)).unwrap_or(0);
    system(
        libc::SYS_bpf,
        [PROG_LOAD, attributes.as_ptr() as libc::c_long, size, 0, 0],
    )
}
