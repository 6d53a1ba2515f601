"""`flyball hold` as a process, on a real `flyball serve` of the bundled model under light load."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from flyball.adapters.audit_files import read_audit
from flyball.adapters.engines.flyball_http import FlyballTarget
from flyball.cli.hold import app
from flyball.core.knobs import Value
from flyball.tuner.guard_replay import first_difference, replay

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # a server that loads torch

Hold = Callable[..., "subprocess.Popen[str]"]


def first_line(process: subprocess.Popen[str], pattern: str) -> str:
    """Wait for a line, and return what it names."""
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.search(pattern, line):
            return match[1]
    pytest.fail(f"no line with {pattern!r}: {process.communicate()[1]}")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A server of the bundled model, with one request after the other."""
    process = subprocess.Popen([sys.executable, "-m", "flyball", "serve", "--port", "0", "--threads", "1"],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    over = threading.Event()
    try:
        url = first_line(process, r"(http://127\.0\.0\.1:\d+)")

        def load() -> None:
            with httpx.Client(timeout=60, trust_env=False) as client:
                while not over.wait(0.02):
                    client.post(f"{url}/v1/completions", json={"prompt": "the cat", "max_tokens": 4})

        thread = threading.Thread(target=load)
        thread.start()
        yield url
        over.set()
        thread.join()
    finally:
        process.terminate()
        process.communicate()


@pytest.fixture
def hold(server: str, tmp_path: Path) -> Iterator[Hold]:
    """Starts `flyball hold` with windows of a third of a second, which never rests."""
    processes: list[subprocess.Popen[str]] = []

    def start(*more: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "flyball", "hold", "--url", server, "--port", "0", "--slo", "p95_ttft<20s",
             "--maximize", "goodput", "--explore-every", "1", "--window", "0.3", "--settle", "0.05", "--audit",
             str(tmp_path / "audit.jsonl"), *more],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def told(control: str, command: str) -> str:
    """What a command of `flyball hold` prints."""
    done = CliRunner().invoke(app, [command, "--control", control], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def in_force(server: str, names: Mapping[str, Value]) -> dict[str, Value]:
    """The server's own values of some knobs."""
    with FlyballTarget(server) as target:
        values = target.configuration()
    return {name: values[name] for name in names}


def test_it_decides_obeys_and_leaves_the_last_known_good(hold: Hold, server: str, tmp_path: Path) -> None:
    """Changes are made and audited; paused, none is; Ctrl-C puts the last known good back and ends with 130."""
    process = hold()
    control = first_line(process, r"API on (http://\S+),")
    first_line(process, r"^\d+ (apply)")
    told(control, "pause")
    paused = json.loads(told(control, "status"))
    assert paused["run"] == "paused"
    for _ in range(2):
        first_line(process, r"^\d+ (hold|ignore|rollback)")
    still = json.loads(told(control, "status"))
    assert still["guard"].get("apply", 0) == paused["guard"].get("apply", 0)
    told(control, "resume")
    assert json.loads(told(control, "status"))["run"] == "running"
    first_line(process, r"^\d+ (apply)")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    [events] = read_audit(tmp_path / "audit.jsonl")
    good = [e.data["values"] for e in events if e.kind in ("start", "promote")][-1]
    assert in_force(server, good) == good
    assert "the last known good is in force" in out
    assert events[-1].kind == "rollback"
    assert [e.seq for e in events] == list(range(1, len(events) + 1))
    assert first_difference(events, replay(events)) is None


def test_stop_leaves_what_is_in_force(hold: Hold, server: str, tmp_path: Path) -> None:
    """`flyball hold stop` ends the process with 0 and changes nothing any more."""
    process = hold()
    control = first_line(process, r"API on (http://\S+),")
    first_line(process, r"^\d+ (apply)")
    assert "stays" in told(control, "stop")
    assert process.wait(timeout=60) == 0
    [events] = read_audit(tmp_path / "audit.jsonl")
    values = dict(events[0].data["values"])
    for event in events:
        if event.kind in ("apply", "rollback"):
            values |= event.data["new"]
    assert in_force(server, values) == values
    assert events[-1].data["command"] == "stop"
