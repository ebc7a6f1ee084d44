"""Drives `lab.sh --interactive` from a pseudo terminal: its size, Ctrl-C with --interactive (goes to the command) and
without (ends the lab), the exit code, and the terminal's settings afterwards. Called by selftest.sh with the path of lab.sh."""

import fcntl
import os
import pty
import select
import struct
import sys
import termios
import time

LAB = sys.argv[1]


def read_until(fd, wanted, seconds=40):
    """Returns what came until `wanted`; fails loudly if it does not come."""
    seen = b""
    end = time.monotonic() + seconds
    while wanted not in seen:
        ready, _, _ = select.select([fd], [], [], max(0, end - time.monotonic()))
        if not ready:
            sys.exit(f"  {wanted!r} did not come; got {seen!r}")
        seen += os.read(fd, 65536)
    return seen


def run_on_terminal(arguments, ready, keys, answer):
    """Runs lab.sh on a new terminal, sends `keys` once `ready` came, and returns the exit code once `answer` came."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 101, 0, 0))
    before = termios.tcgetattr(terminal)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        for fd in (0, 1, 2):
            os.dup2(terminal, fd)
        os.execv(LAB, [LAB, "--always", "--quiet", *arguments])
    seen = read_until(controller, ready)
    if "--interactive" in arguments and b"33 101" not in seen:
        sys.exit(f"  the terminal's size was not passed on; got {seen!r}")
    os.write(controller, keys)
    read_until(controller, answer)
    _, status = os.waitpid(pid, 0)
    if termios.tcgetattr(terminal) != before:
        sys.exit("  the terminal's settings were not restored")
    return os.waitstatus_to_exitcode(status)


def main():
    script = "stty size; trap 'echo interrupted; exit 9' INT; echo waiting; while :; do sleep 0.1; done"
    inside = run_on_terminal(["--interactive", "--", "sh", "-c", script], b"waiting", b"\x03", b"interrupted")
    if inside != 9:
        sys.exit(f"  exit code of the interrupted command: wanted 9, got {inside}")
    outside = run_on_terminal(["--", "sh", "-c", "echo waiting; sleep 100"], b"waiting", b"\x03", b"^C")
    if outside != 130:
        sys.exit(f"  exit code of the interrupted lab: wanted 130, got {outside}")


main()
