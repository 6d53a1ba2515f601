"""Child servers: started, awaited, and always ended."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flyball.adapters.engines.process import free_port, spawned
from flyball.core.errors import EngineFailed

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
FAMILY = [sys.executable, "-c", "import subprocess, sys, time\n"
          "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
          "open(sys.argv[1], 'w').write(str(child.pid))\n"
          "time.sleep(600)"]  # fmt: skip


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def until(true: Callable[[], bool]) -> None:
    """Wait for something that other processes do; the test's own timeout is the limit."""
    while not true():
        time.sleep(0.01)


def test_a_server_and_its_children_end_with_the_block(tmp_path: Path) -> None:
    """Leaving the block by an exception ends the whole process group."""
    note = tmp_path / "pid"
    pids: list[int] = []

    def serve_and_fail() -> None:
        command = [*FAMILY, str(note)]
        with spawned(command, ready=lambda: note.exists() and bool(note.read_text()), timeout_s=60) as pid:
            pids.extend((pid, int(note.read_text())))
            assert not any(map(gone, pids))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve_and_fail()
    until(lambda: all(map(gone, pids)))


def test_a_server_that_dies_says_its_last_words() -> None:
    """The end of its output and its exit code are in the error."""
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]
    with (
        pytest.raises(EngineFailed, match=r"(?s)ended with code 3 before it was ready; it said:.*no such model"),
        spawned(command, ready=lambda: False, timeout_s=60),
    ):
        pytest.fail("it was never ready")


def test_a_server_that_is_never_ready_is_given_up() -> None:
    """After the time allowed the server is ended and the error says how long it had."""

    class Hurried:
        ticks = 0.0

        def now_s(self) -> float:
            self.ticks += 50.0
            return self.ticks

        def wall_s(self) -> float:
            return self.ticks

    with (
        pytest.raises(EngineFailed, match="not ready after 120 s"),
        spawned(SLEEP, ready=lambda: False, timeout_s=120, clock=Hurried()),
    ):
        pytest.fail("it was never ready")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_a_server_ends_even_when_its_parent_is_killed(tmp_path: Path) -> None:
    """Kill -9 of the parent leaves no server behind."""
    note = tmp_path / "pid"
    parent = textwrap.dedent(f"""
        import sys, time
        from flyball.adapters.engines.process import spawned
        with spawned({SLEEP!r}, ready=lambda: True, timeout_s=60) as pid:
            open({str(note)!r}, "w").write(str(pid))
            time.sleep(600)
    """)
    process = subprocess.Popen([sys.executable, "-c", parent])
    until(lambda: note.exists() and bool(note.read_text()))
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: gone(int(note.read_text())))


def test_a_free_port_can_be_listened_on() -> None:
    """The port found is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))
