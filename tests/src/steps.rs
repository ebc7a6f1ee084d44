//! Kills a program at a chosen step, to find what a death between two of its steps leaves behind.

use std::collections::HashSet;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::Result;

/// System calls that change something outside of the program's memory, or wait for another process: a death at any other
/// call leaves what one at the next of these does. Of the calls that open files, only those that may make one count.
pub const CHANGES: [libc::c_long; 24] = [
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_rmdir,
    libc::SYS_mknodat,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_fchmod,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_ftruncate,
    libc::SYS_flock,
    libc::SYS_copy_file_range,
    libc::SYS_sendfile,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_clone,
    libc::SYS_umount2,
    libc::SYS_setns,
    libc::SYS_execve,
];

/// Those that copy a file.
pub const COPYING: [libc::c_long; 4] = [
    libc::SYS_ftruncate,
    libc::SYS_ioctl,
    libc::SYS_copy_file_range,
    libc::SYS_sendfile,
];

/// Runs a program and kills the one of its processes that makes the `step`th of these calls, at the entry to it. The others
/// go on until they end by themselves. False if the program got by with fewer.
pub fn kill_at(command: &mut Command, calls: &[libc::c_long], step: usize) -> Result<bool> {
    let trace_me = || check(ptrace(libc::PTRACE_TRACEME, 0, 0));
    // SAFETY: needed so that the program is traced from its first instruction. The call is a system call only.
    unsafe { command.pre_exec(trace_me) };
    let child = command.spawn()?;
    let first = libc::pid_t::try_from(child.id())?;
    let mut tracer = Tracer {
        processes: HashSet::from([first]),
        in_call: HashSet::new(),
    };
    wait_for(first)?;
    let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_TRACEFORK;
    let options = usize::try_from(options | libc::PTRACE_O_TRACEEXEC | libc::PTRACE_O_EXITKILL)?;
    check(ptrace(libc::PTRACE_SETOPTIONS, first, options))?;
    let killed = tracer.run(first, calls, step);
    tracer.kill_all();
    Ok(killed?)
}

struct Tracer {
    processes: HashSet<libc::pid_t>,
    /// Those between the entry to a system call and its end.
    in_call: HashSet<libc::pid_t>,
}

impl Tracer {
    fn run(&mut self, first: libc::pid_t, calls: &[libc::c_long], step: usize) -> io::Result<bool> {
        let (mut steps, mut killed) = (0, false);
        check(ptrace(libc::PTRACE_SYSCALL, first, 0))?;
        while !self.processes.is_empty() {
            let (process, status) = next_event()?;
            if !libc::WIFSTOPPED(status) {
                self.processes.remove(&process);
                continue;
            }
            self.processes.insert(process);
            let stop = libc::WSTOPSIG(status);
            self.note_new_process(process, status)?;
            let is_call = stop == libc::SIGTRAP | 0x80;
            if is_call && !self.in_call.remove(&process) {
                self.in_call.insert(process);
                steps += usize::from(is_one_of(process, calls)?);
                if steps == step {
                    killed = true;
                    kill(process);
                    continue;
                }
            }
            // A new process starts with a stop, and the tracer's events are no signals for the program.
            let passes = !is_call && stop != libc::SIGTRAP && stop != libc::SIGSTOP;
            let signal = if passes {
                usize::try_from(stop).unwrap_or(0)
            } else {
                0
            };
            // It may have been killed meanwhile.
            let _ = ptrace(libc::PTRACE_SYSCALL, process, signal);
        }
        Ok(killed)
    }

    /// Remembers the process that another one has just made, which may not have stopped yet.
    fn note_new_process(&mut self, process: libc::pid_t, status: libc::c_int) -> io::Result<()> {
        if [libc::PTRACE_EVENT_FORK, libc::PTRACE_EVENT_CLONE].contains(&(status >> 16)) {
            let mut id: libc::c_ulong = 0;
            // SAFETY: needed to trace, which has no wrapper. The kernel writes the number to where it is told to.
            check(unsafe { libc::ptrace(libc::PTRACE_GETEVENTMSG, process, 0, &raw mut id) })?;
            self.processes.extend(libc::pid_t::try_from(id));
        }
        Ok(())
    }

    /// Ends what still runs.
    fn kill_all(&mut self) {
        for process in self.processes.drain() {
            kill(process);
            // SAFETY: needed because the standard library waits for its own children only. No status is asked for.
            unsafe { libc::waitpid(process, std::ptr::null_mut(), libc::__WALL) };
        }
    }
}

/// True if a process is about to make one of these calls.
fn is_one_of(process: libc::pid_t, calls: &[libc::c_long]) -> io::Result<bool> {
    // SAFETY: needed to trace, which has no wrapper. All bit patterns are valid registers, and the kernel writes them to
    // where it is told to.
    let registers = unsafe {
        let mut registers: libc::user_regs_struct = std::mem::zeroed();
        check(libc::ptrace(libc::PTRACE_GETREGS, process, 0, &raw mut registers))?;
        registers
    };
    let number = i64::try_from(registers.orig_rax).unwrap_or(-1);
    let creates = |flags: u64| flags & u64::from(libc::O_CREAT.unsigned_abs()) != 0;
    let counts = match number {
        libc::SYS_openat => creates(registers.rdx),
        // Flags are the first field of the structure.
        libc::SYS_openat2 => creates(peek(process, registers.rdx)),
        _ => true,
    };
    Ok(counts && calls.contains(&number))
}

/// A word of another process.
fn peek(process: libc::pid_t, address: u64) -> u64 {
    // SAFETY: needed to trace, which has no wrapper. The address is the other process's; for a wrong one nothing is read.
    unsafe { libc::ptrace(libc::PTRACE_PEEKDATA, process, address, 0) }.cast_unsigned()
}

fn wait_for(process: libc::pid_t) -> io::Result<()> {
    // SAFETY: as above.
    check(unsafe { libc::waitpid(process, std::ptr::null_mut(), libc::__WALL) }.into())
}

/// What happens to one of the processes next.
fn next_event() -> io::Result<(libc::pid_t, libc::c_int)> {
    let mut status = 0;
    let flags = libc::__WALL | libc::__WNOTHREAD;
    // SAFETY: needed because any process of this tracer may be next, but none of another thread. The status is alive.
    match unsafe { libc::waitpid(-1, &mut status, flags) } {
        -1 => Err(io::Error::last_os_error()),
        process => Ok((process, status)),
    }
}

fn kill(process: libc::pid_t) {
    // SAFETY: needed because only the first is a child of the standard library. The process was not waited for, so that the
    // id is its own.
    unsafe { libc::kill(process, libc::SIGKILL) };
}

fn ptrace(request: libc::c_uint, process: libc::pid_t, data: usize) -> libc::c_long {
    // SAFETY: needed to trace, which has no wrapper. None of the requests made here has an address in this process.
    unsafe { libc::ptrace(request, process, 0, data) }
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
