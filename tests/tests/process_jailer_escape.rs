//! A program in place of the monitor tries to get out of the jail; the same program outside can do all that it tries.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use mayfly_tests::jail::{JAIL_USER, Jail, Starter};
use mayfly_tests::{Result, Scratch};

const ESCAPEE: &str = env!("CARGO_BIN_EXE_escapee");
const DOCS: &str = include_str!("../../docs/jailer.md");
/// The number of the descriptor that is left open.
const LEFT_OPEN: i32 = 9;

/// Makes the names of two tests differ.
static COUNT: AtomicU32 = AtomicU32::new(0);

/// What there is outside for the escapee to reach.
struct Outside {
    scratch: Scratch,
    process: Child,
    tcp: TcpListener,
    name: String,
    _abstract: UnixListener,
    shm: i32,
}

impl Outside {
    fn new() -> Result<Self> {
        let scratch = Scratch::new("outside")?;
        let number = COUNT.fetch_add(1, Ordering::Relaxed) + std::process::id();
        let name = format!("mayfly-escape-{number}");
        // Waits as long as the test lives.
        let mut process = Command::new("/bin/cat");
        // The same user, so that nothing but the jail is in the way.
        process.uid(JAIL_USER).gid(JAIL_USER);
        process.stdin(Stdio::piped()).stdout(Stdio::null());
        Ok(Self {
            process: process.spawn()?,
            tcp: TcpListener::bind("127.0.0.1:0")?,
            _abstract: UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name)?)?,
            shm: share_memory(number)?,
            scratch,
            name,
        })
    }

    /// The words that tell the escapee.
    fn facts(&self) -> Result<Vec<String>> {
        let file = self.scratch.file("file", "of the host")?;
        add_key(&self.name)?;
        let (pid, port) = (self.process.id(), self.tcp.local_addr()?.port());
        let (name, shm) = (&self.name, self.shm);
        Ok(vec![
            "--".into(),
            format!("file={}", file.display()),
            format!("pid={pid}"),
            format!("port={port}"),
            format!("abstract={name}"),
            format!("key={name}"),
            format!("shm={shm}"),
            format!("fd={LEFT_OPEN}"),
        ])
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        // Nothing can be done about failures.
        let _ = self.process.kill();
        let _ = self.process.wait();
        // SAFETY: needed because the standard library knows no such memory. Nobody has it mapped.
        unsafe { libc::shmctl(libc::shmget(self.shm, 0, 0), libc::IPC_RMID, std::ptr::null_mut()) };
    }
}

/// System V memory that everybody may use; returns its key.
fn share_memory(number: u32) -> Result<i32> {
    let key = i32::try_from(number)?;
    // SAFETY: needed as above; the call takes numbers only.
    match unsafe { libc::shmget(key, 4096, libc::IPC_CREAT | 0o666) } {
        -1 => Err(std::io::Error::last_os_error().into()),
        _ => Ok(key),
    }
}

/// A key of the session, which children inherit.
fn add_key(name: &str) -> Result {
    const SESSION_KEYRING: libc::c_long = -3;
    let name = std::ffi::CString::new(name)?;
    // SAFETY: needed because the standard library knows no keys. The strings end with zero, and the content has 4 bytes.
    match unsafe {
        libc::syscall(
            libc::SYS_add_key,
            c"user".as_ptr(),
            name.as_ptr(),
            c"test".as_ptr(),
            4,
            SESSION_KEYRING,
        )
    } {
        -1 => Err(std::io::Error::last_os_error().into()),
        _ => Ok(()),
    }
}

/// Runs a command that inherits a descriptor, and returns the attempts that were made: group and name, and the result.
fn attempts(mut command: Command) -> Result<BTreeMap<(String, String), String>> {
    let file = File::open("/etc/passwd")?;
    let from = file.as_raw_fd();
    let leave_open = move || {
        // SAFETY: needed because the standard library opens nothing for children. The calls are system calls only. A copy
        // onto itself would stay one that is closed.
        match unsafe {
            match from {
                LEFT_OPEN => libc::fcntl(from, libc::F_SETFD, 0),
                _ => libc::dup2(from, LEFT_OPEN),
            }
        } {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        }
    };
    // SAFETY: needed as above; the closure makes a system call and nothing else.
    unsafe { command.pre_exec(leave_open) };
    let Output {
        stdout,
        stderr,
        status,
    } = command.stdin(Stdio::null()).output()?;
    let text = String::from_utf8(stdout)?;
    assert!(status.success(), "{text}{}", String::from_utf8_lossy(&stderr));
    let parse = |line: &str| {
        let mut parts = line.splitn(3, ": ").map(str::to_owned);
        Some(((parts.next()?, parts.next()?), parts.next()?))
    };
    Ok(text.lines().filter_map(parse).collect())
}

/// Asserts that nothing that succeeds outside does so in the jail, but for what is the monitor's own filter's to stop.
fn assert_no_escape(starter: Starter) -> Result {
    let outside = Outside::new()?;
    let jail = Jail::of("escape", starter, Path::new(ESCAPEE))?;
    fs::write(jail.dir().join("vm.json"), r#"{"drives": []}"#)?;
    let facts = outside.facts()?;
    let mut free = Command::new(ESCAPEE);
    free.args(&facts);
    let mut jailed = jail.command(&["--config-file=vm.json", "--import", "--"]);
    jailed.args(&facts);

    let (free, jailed) = (attempts(free)?, attempts(jailed)?);

    let undone: Vec<_> = free.iter().filter(|(_, result)| *result != "done").collect();
    assert!(
        undone.is_empty() && free.len() > 30,
        "outside: {undone:?} of {}",
        free.len()
    );
    assert_eq!(free.len(), jailed.len());
    let wrong =
        |((group, _), result): &(&(String, String), &String)| (group == "filter") != (*result == "done");
    let wrong: Vec<_> = jailed.iter().filter(wrong).collect();
    assert!(wrong.is_empty(), "in the jail: {wrong:?}");
    let unknown: Vec<_> = jailed
        .keys()
        .filter(|(_, name)| !DOCS.contains(&format!("| {name} |")))
        .collect();
    assert!(unknown.is_empty(), "docs/jailer.md does not tell of {unknown:?}");
    Ok(())
}

#[test]
fn nothing_leads_out_of_roots_jail() -> Result {
    assert_no_escape(Starter::Root)
}

#[test]
fn nothing_leads_out_of_a_users_jail() -> Result {
    assert_no_escape(Starter::User)
}
