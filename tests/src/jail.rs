//! A `mayfly-jailer` under test, started by root or by an ordinary user.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use crate::environment::{binary, jailer};
use crate::isolation::{become_user, replace_etc};
use crate::monitor_builder::heed_signals;
use crate::{Client, Failure, HOST_TIMEOUT, Result, Scratch, wait_until};

/// Whom the VM of a jail runs as, and an ordinary user who starts one.
pub const JAIL_USER: u32 = 54321;
/// The API socket in the jail.
const SOCKET: &str = "run/api.sock";

/// Who starts the jailer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Starter {
    /// Root; the VM runs as [`JAIL_USER`].
    Root,
    /// [`JAIL_USER`], who may use KVM.
    User,
}

/// A folder for jails, and what is to be started in one.
#[derive(Debug)]
pub struct Jail {
    scratch: Scratch,
    starter: Starter,
    program: PathBuf,
    jailer: PathBuf,
    /// A folder in the place of `/etc` for the jailer.
    etc: Option<CString>,
}

impl Jail {
    /// A folder for the jail of a `mayfly`.
    pub fn new(name: &str, starter: Starter) -> Result<Self> {
        Self::of(name, starter, &binary()?)
    }

    /// A folder for the jail of another program.
    pub fn of(name: &str, starter: Starter, program: &Path) -> Result<Self> {
        let scratch = Scratch::new(name)?;
        fs::set_permissions(&*scratch, fs::Permissions::from_mode(0o755))?;
        let mut jail = Self {
            program: program.into(),
            jailer: jailer()?,
            etc: None,
            starter,
            scratch,
        };
        if starter == Starter::User {
            // Where the binaries are built, an ordinary user may not look.
            jail.program = copied(program, &jail.scratch)?;
            jail.jailer = copied(&jail.jailer, &jail.scratch)?;
            jail.give(&jail.scratch)?;
        }
        Ok(jail)
    }

    /// A folder for the jail of an ordinary user for whom the system has set aside ten ids from `first` on.
    pub fn with_ids(name: &str, first: u32) -> Result<Self> {
        let mut jail = Self::new(name, Starter::User)?;
        let etc = jail.scratch.join("etc");
        fs::create_dir(&etc)?;
        let user = format!("tester:x:{JAIL_USER}:{JAIL_USER}::/:/bin/sh\n");
        let ids = format!("tester:{first}:10\n");
        for (name, content) in [("passwd", &user), ("subuid", &ids), ("subgid", &ids)] {
            fs::write(etc.join(name), content)?;
        }
        jail.etc = Some(CString::new(etc.into_os_string().into_vec())?);
        Ok(jail)
    }

    /// A folder for files that the jail uses; the user of the VM may look into it.
    pub fn dir(&self) -> &Path {
        &self.scratch
    }

    /// Makes the user of the VM the owner of a file.
    pub fn give(&self, path: &Path) -> Result {
        Ok(chown(path, Some(JAIL_USER), Some(JAIL_USER))?)
    }

    /// Copies a file to where the user of the VM can read it.
    pub fn copy(&self, file: &Path) -> Result<PathBuf> {
        copied(file, &self.scratch)
    }

    /// The folder with all jails.
    pub fn base(&self) -> PathBuf {
        self.scratch.join("jails")
    }

    /// The folder of the jail.
    pub fn folder(&self) -> PathBuf {
        let name = self.program.file_name().unwrap_or_default();
        self.base().join(name).join("vm1")
    }

    /// The root of the jail.
    pub fn root(&self) -> PathBuf {
        self.folder().join("root")
    }

    /// The API socket, as the host sees it.
    pub fn socket(&self) -> PathBuf {
        self.root().join(SOCKET)
    }

    /// The jailer with these arguments only, as its user.
    pub fn bare(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.jailer);
        command.args(args).current_dir(&*self.scratch);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let (etc, is_user) = (self.etc.clone(), self.starter == Starter::User);
        let before_exec = move || {
            heed_signals()?;
            if !is_user {
                return Ok(());
            }
            etc.as_deref().map_or(Ok(()), replace_etc)?;
            become_user(JAIL_USER)
        };
        // SAFETY: needed because the standard library knows no mounts; the function makes system calls only.
        unsafe { command.pre_exec(before_exec) };
        command
    }

    /// The jailer with what every start needs, and these arguments.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = self.bare(&["--id", "vm1"]);
        command.arg("--chroot-base-dir").arg(self.base());
        command.arg("--exec-file").arg(&self.program);
        if self.starter == Starter::Root {
            let user = JAIL_USER.to_string();
            command.args(["--uid", &user, "--gid", &user]);
        }
        command.args(args);
        command
    }

    /// Runs the jailer to its end.
    pub fn run(&self, args: &[&str]) -> Result<Ended> {
        Ok(Ended::from(self.command(args).output()?))
    }

    /// Removes the jail.
    pub fn clean_up(&self) -> Result<Ended> {
        self.run(&["--cleanup"])
    }

    /// Starts a VM with an API socket, and waits until it answers.
    pub fn start(&self, args: &[&str]) -> Result<Jailed> {
        let mut command = self.command(args);
        if !args.contains(&"--") {
            command.arg("--");
        }
        command.args(["--api-sock", &format!("/{SOCKET}")]);
        let mut jailed = Jailed {
            child: command.spawn()?,
        };
        let mut ended = false;
        let waited = wait_until("the API socket", HOST_TIMEOUT, || {
            ended = !matches!(jailed.child.try_wait(), Ok(None));
            ended || Client::connect(&self.socket()).is_ok()
        });
        match waited {
            Ok(()) if !ended => Ok(jailed),
            _ => Err(Failure::new(format!("no API in the jail: {:?}", jailed.kill()?))),
        }
    }

    /// The process of the VM, as the pid file says.
    pub fn pid(&self) -> Result<u32> {
        let name = self.program.file_name().unwrap_or_default().to_string_lossy();
        Ok(fs::read_to_string(self.root().join(format!("{name}.pid")))?
            .trim()
            .parse()?)
    }
}

/// Copies a file to where everybody can use it: in a process of its own, as a program cannot be executed while it is open
/// for writing, and what this process has open, any other test's new process has for a moment.
fn copied(file: &Path, folder: &Path) -> Result<PathBuf> {
    let copy = folder.join(file.file_name().unwrap_or_default());
    match Command::new("cp").arg(file).arg(&copy).status()?.success() {
        true => Ok(copy),
        false => Err(Failure::new(format!("cannot copy {}", file.display()))),
    }
}

/// A jailer that waits for its VM. Both are killed when it is dropped.
#[derive(Debug)]
pub struct Jailed {
    child: Child,
}

impl Jailed {
    /// The jailer's process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the end.
    pub fn wait(mut self) -> Result<Ended> {
        drop(self.child.stdin.take());
        let status = self.child.wait()?;
        let read = |stream: Option<Box<dyn std::io::Read>>| -> Result<Vec<u8>> {
            let mut bytes = Vec::new();
            stream
                .map(|mut stream| stream.read_to_end(&mut bytes))
                .transpose()?;
            Ok(bytes)
        };
        let stdout = read(self.child.stdout.take().map(|s| Box::new(s) as _))?;
        let stderr = read(self.child.stderr.take().map(|s| Box::new(s) as _))?;
        Ok(Ended::from(Output {
            status,
            stdout,
            stderr,
        }))
    }

    /// Kills the jailer, and waits for its end.
    pub fn kill(mut self) -> Result<Ended> {
        // It may have ended.
        let _ = self.child.kill();
        self.wait()
    }
}

impl Drop for Jailed {
    fn drop(&mut self) {
        // Both have been done if it was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a jailer has said until its end.
#[derive(Debug)]
pub struct Ended {
    /// Its exit code; for a signal, its number with a minus.
    pub code: i32,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        use std::os::unix::process::ExitStatusExt;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self {
            code: output
                .status
                .code()
                .or(output.status.signal().map(|s| -s))
                .unwrap_or(i32::MIN),
            stdout: text(&output.stdout),
            stderr: text(&output.stderr),
        }
    }
}

impl Ended {
    /// Asserts that the jailer refused to start, with a line that begins so and one with details.
    #[track_caller]
    pub fn assert_refused(&self, message: &str) {
        let lines: Vec<_> = self
            .stderr
            .lines()
            .filter(|line| !line.starts_with("mayfly-jailer: "))
            .collect();
        let said = lines.first().is_some_and(|line| line.starts_with(message));
        assert!(self.code == 1 && said, "{message} expected: {self:?}");
        assert!(lines.iter().any(|line| line.starts_with("Error: ")), "{self:?}");
    }

    /// Asserts that all went well.
    #[track_caller]
    pub fn assert_success(&self) {
        assert!(self.code == 0 && self.stderr.is_empty(), "{self:?}");
    }
}
