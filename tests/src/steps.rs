//! Kills a program at a chosen system call, to find what a death between two of its steps leaves behind.

use std::collections::HashSet;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::Result;

/// Runs a program and kills the one of its processes that makes the `step`th system call of all, at the entry to it. The
/// others go on until they end by themselves. False if the program got by with fewer system calls.
pub fn kill_at(command: &mut Command, step: usize) -> Result<bool> {
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
    let killed = tracer.run(first, step);
    tracer.kill_all();
    Ok(killed?)
}

struct Tracer {
    processes: HashSet<libc::pid_t>,
    /// Those between the entry to a system call and its end.
    in_call: HashSet<libc::pid_t>,
}

impl Tracer {
    fn run(&mut self, first: libc::pid_t, step: usize) -> io::Result<bool> {
        let (mut calls, mut killed) = (0, false);
        check(ptrace(libc::PTRACE_SYSCALL, first, 0))?;
        while !self.processes.is_empty() {
            let Some((process, status)) = any_event()? else {
                // All are in system calls that wait.
                std::thread::sleep(std::time::Duration::from_micros(200));
                continue;
            };
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
                calls += 1;
                if calls == step {
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

fn wait_for(process: libc::pid_t) -> io::Result<()> {
    // SAFETY: as above.
    check(unsafe { libc::waitpid(process, std::ptr::null_mut(), libc::__WALL) }.into())
}

/// What has happened to one of the processes, if anything.
fn any_event() -> io::Result<Option<(libc::pid_t, libc::c_int)>> {
    let mut status = 0;
    let flags = libc::__WALL | libc::__WNOTHREAD | libc::WNOHANG;
    // SAFETY: needed because any process of this tracer may be next, but none of another thread. The status is alive.
    match unsafe { libc::waitpid(-1, &mut status, flags) } {
        0 => Ok(None),
        -1 => Err(io::Error::last_os_error()),
        process => Ok(Some((process, status))),
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
