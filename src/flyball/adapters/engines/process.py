"""Servers that Flyball starts as child processes, and never leaves behind.

Each runs in a session of its own, so that Ctrl-C in our terminal reaches us alone and we end it in order, its own
children included. On Linux the kernel ends it even when we are killed without a chance to (PR_SET_PDEATHSIG).
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
from typing import IO

from flyball.core.clock import Clock, SystemClock
from flyball.core.errors import EngineFailed

GRACE_S = 10.0  # between asking a server to end and ending it
_POLL_S = 0.1
_TAIL = 2000  # characters of a failed server's output that are quoted
# Runs in the child before the server: ask for a signal at the parent's death, and leave if it came before that.
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


@contextmanager
def spawned(
    command: Sequence[str], *, ready: Callable[[], bool], timeout_s: float, clock: Clock | None = None
) -> Iterator[int]:
    """Run a server while the block runs; yields its process id once `ready` says so.

    Raises EngineFailed, with the end of its output, if it exits or is not ready in time.
    """
    clock = clock or SystemClock()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            deadline_s = clock.now_s() + timeout_s
            while not ready():
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(_POLL_S)
                    raise EngineFailed(f"`{' '.join(command)}` ended with code {code} before it was ready{_tail(log)}")
                if clock.now_s() > deadline_s:
                    raise EngineFailed(f"`{' '.join(command)}` was not ready after {timeout_s:g} s{_tail(log)}")
            yield process.pid
        finally:
            _end(process)


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


def _end(process: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):  # the group is gone
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)


def _tail(log: IO[str]) -> str:
    log.seek(0)
    text = log.read().strip()[-_TAIL:]
    return f"; it said:\n{text}" if text else ""
