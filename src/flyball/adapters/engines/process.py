"""Servers that Flyball starts as child processes, and never leaves behind.

Between us and each server stands a small process (`supervise.py`) that ends the server with everything it started when
we close its input, and also when we are killed without a chance to. Servers run in sessions of their own, so that
Ctrl-C in our terminal reaches us alone and we end them in order.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from flyball.core.clock import Clock, SystemClock
from flyball.core.errors import EngineFailed

GRACE_S = 10.0  # between asking a server to end and ending it
_POLL_S = 0.1
_TAIL = 2000  # characters of a failed server's output that are quoted
_SUPERVISE = Path(__file__).with_name("supervise.py")
# Runs in the child before a command of ours: ask for a signal at the parent's death, and leave if it came before that.
_LAUNCH = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ChildProcess:
    """A running command; `stop` ends it with all its descendants, and so does our own death."""

    def __init__(self, command: Sequence[str], *, log: Path, grace_s: float = GRACE_S) -> None:
        self.command = tuple(command)
        self._log = log  # its output, from the beginning
        self._grace_s = grace_s
        supervised = [sys.executable, "-I", "-S", str(_SUPERVISE), str(os.getpid()), str(grace_s), *command]
        with log.open("w") as output:
            self._process = subprocess.Popen(
                supervised, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.pid = self._process.pid  # of the supervisor, whose descendants the command and its children are

    def ended(self, wait_s: float = 0.0) -> int | None:
        """The exit code, waiting up to this long for it; -9 if it was ended by signal 9; None while it runs."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(wait_s)
        return None

    def output(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def stop(self) -> None:
        """End it: SIGTERM, after the grace SIGKILL; returns when nothing of it is left."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        if self.ended(self._grace_s * 2 + 5) is None:  # the supervisor hangs, which nothing but a stopped one does
            self._process.kill()
            self._process.wait()


@contextmanager
def spawned(
    command: Sequence[str], *, ready: Callable[[], bool], timeout_s: float, clock: Clock | None = None
) -> Iterator[int]:
    """Run a server while the block runs; yields the id of the process it descends from once `ready` says so.

    Raises EngineFailed, with the end of its output, if it exits or is not ready in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        child = ChildProcess(command, log=Path(folder) / "log")
        try:
            await_ready(child, ready=ready, timeout_s=timeout_s, clock=clock or SystemClock())
            yield child.pid
        finally:
            child.stop()


def await_ready(child: ChildProcess, *, ready: Callable[[], bool], timeout_s: float, clock: Clock) -> None:
    """Return once `ready` says so; raises EngineFailed of kind start or timeout, with the end of the output."""
    deadline_s = clock.now_s() + timeout_s
    while not ready():
        if (code := child.ended(_POLL_S)) is not None:
            raise EngineFailed(
                f"`{' '.join(child.command)}` ended with code {code} before it was ready{_tail(child)}", kind="start"
            )
        if clock.now_s() > deadline_s:
            raise EngineFailed(
                f"`{' '.join(child.command)}` was not ready after {timeout_s:g} s{_tail(child)}", kind="timeout"
            )


def run_to_end(command: Sequence[str], *, capture: bool = False) -> tuple[int, str]:
    """Run a command in our terminal until it ends; returns its exit code and, if captured, its standard output.

    It dies with us, and an interrupt that reaches us is passed on and waited for before it goes on its way.
    """
    wrapped = [sys.executable, "-c", _LAUNCH, str(os.getpid()), *command]
    with subprocess.Popen(wrapped, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if capture else None) as process:
        try:
            output, _ = process.communicate()
        except BaseException:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
            process.kill()
            raise
    return process.returncode, (output or b"").decode()


def _tail(child: ChildProcess) -> str:
    text = child.output().strip()[-_TAIL:]
    return f"; it said:\n{text}" if text else ""
