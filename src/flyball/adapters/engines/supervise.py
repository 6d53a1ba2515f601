"""Runs a command and ends it, with all its descendants, when asked to or when the parent is gone. Started as a script.

    python -I -S supervise.py PARENT_PID GRACE_S COMMAND...

The parent holds the write end of our standard input: its end of file means that the parent closed it or was killed,
even by kill -9. On Linux we are the subreaper of every descendant, so that a grandchild in a session of its own,
orphaned by its parent's death, becomes our child and is found. We end as the command did: with its exit code, or by its
signal.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
POLL_MS = 500  # how often we look whether our parent changed, should the end of file not reach us
PAUSE_S = 0.02
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the end of file is the only order to end
LINUX = sys.platform == "linux"


def prctl(option: int, value: int) -> None:
    """Linux's prctl; nothing elsewhere."""
    if LINUX:
        ctypes.CDLL(None).prctl(option, value)


def start(command: list[str]) -> int:
    """The command in a session of its own; should we be killed ourselves, the kernel ends it."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        for sign in IGNORED:
            signal.signal(sign, signal.SIG_DFL)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        with Path(os.devnull).open() as nothing:
            os.dup2(nothing.fileno(), 0)
        os.execvp(command[0], command)  # noqa: S606  # a list of words, never a shell
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    os._exit(127)


def descendants() -> list[int]:
    """Every living process below us, by the parents that /proc tells; zombies are none."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            except OSError:
                continue
            if state != "Z":
                parents[int(entry.name)] = int(parent)
    found: list[int] = []
    ring = {os.getpid()}
    while ring:
        ring = {pid for pid, parent in parents.items() if parent in ring}
        found += ring
    return found


def signalled(pids: list[int], sign: int) -> None:
    """Send a signal to those that are still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, sign)


def end_all(command_pid: int, grace_s: float) -> None:
    """SIGTERM to the command's group, and after the grace SIGKILL to all that is left, until nothing is."""
    try:
        os.killpg(command_pid, signal.SIGTERM)
    except ProcessLookupError:
        grace_s = 0.0
    for _ in range(int(grace_s / PAUSE_S)):
        if reaped(command_pid) is not None:
            break
        time.sleep(PAUSE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(command_pid, signal.SIGKILL)
    while LINUX and (left := descendants()):
        signalled(left, signal.SIGKILL)
        reaped(command_pid)
        time.sleep(PAUSE_S)


_ended: dict[int, int] = {}


def reaped(command_pid: int) -> int | None:
    """Collect all children that ended; the command's wait status once it is among them."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            _ended[ended[0]] = ended[1]
    return _ended.get(command_pid)


def main() -> None:
    """See the module."""
    parent, grace_s, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    for sign in IGNORED:
        signal.signal(sign, signal.SIG_IGN)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    pid = start(command)
    poll = select.poll()
    poll.register(0, select.POLLIN | select.POLLHUP)
    poll.register(wake_read, select.POLLIN)
    while (status := reaped(pid)) is None:
        ready = {fd for fd, _ in poll.poll(POLL_MS)}
        if wake_read in ready:
            os.read(wake_read, 4096)
        if (0 in ready and not os.read(0, 4096)) or os.getppid() != parent:
            break
    end_all(pid, grace_s if status is None else 0.0)
    status = _ended.get(pid, 0)
    if os.WIFSIGNALED(status):
        with contextlib.suppress(OSError):  # SIGKILL has no handler to reset
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    sys.exit(os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1)


if __name__ == "__main__":
    main()
