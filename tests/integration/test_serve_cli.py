"""`flyball serve` as a process: what it prints, what it refuses, how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from flyball.core.errors import EngineFailed
from flyball.engine.async_engine import AsyncEngine
from flyball.engine.config import EngineConfig
from flyball.server.app import create_app
from flyball.server.gate import Gate
from flyball.server.process import listen, serve, url_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # each starts a process that loads torch

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts `flyball serve`; what still runs when the test ends is killed."""
    processes: list[subprocess.Popen[str]] = []

    def run(*args: object, **env: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "flyball", "serve", *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | env,
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def serving(process: subprocess.Popen[str]) -> str:
    """Wait for the line that says it serves, and return where."""
    assert process.stdout is not None
    line = process.stdout.readline()
    match = re.fullmatch(
        r"flyball: serving tiny on (http://127\.0\.0\.1:\d+) \(max_model_len 512, \d+ KV blocks\)\n", line
    )
    assert match, line + process.communicate()[1]
    return match[1]


def refusal(process: subprocess.Popen[str]) -> str:
    """The one sentence of a user's mistake: exit code 2, nothing else printed."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert out == ""
    assert err.startswith("flyball: ")
    assert err.count("\n") == 1, err
    return err


def test_a_missing_model_is_one_sentence(start: Start, tmp_path: Path) -> None:
    """No folder, no checkpoint in it, no tokenizer: each is named before anything slow is done."""
    assert "there is no folder" in refusal(start(tmp_path / "nowhere", "--port", 0))
    assert "config.json" in refusal(start(tmp_path, "--port", 0))
    (tmp_path / "config.json").write_text("{}")
    assert "tokenizer" in refusal(start(tmp_path, "--port", 0))


def test_a_port_in_use_is_one_sentence(start: Start, tiny_checkpoint: Path) -> None:
    """The port is taken before the model is loaded: the refusal names it and says what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} on 127.0.0.1 is in use" in refusal(start(tiny_checkpoint, "--port", port))


def test_others_are_let_in_only_with_a_key(start: Start, tiny_checkpoint: Path) -> None:
    """Beyond the loopback an open admin route would be anyone's; so would be the model."""
    assert "--api-key" in refusal(start(tiny_checkpoint, "--host", "0.0.0.0", "--port", 0))


def test_capacity_that_contradicts_itself_is_one_sentence(start: Start, tiny_checkpoint: Path) -> None:
    """The engine's own checks reach the command line as they are."""
    assert "max_num_seqs=64" in refusal(start(tiny_checkpoint, "--port", 0, "--max-num-batched-tokens", 8))


def test_requests_under_way_end_before_it_does(start: Start, tiny_checkpoint: Path) -> None:
    """SIGTERM while a stream runs: not ready at once, nothing new is taken, the stream comes to its [DONE], exit 0."""
    process = start(tiny_checkpoint, "--port", 0, "--name", "tiny", "--access-log", "json")
    url = serving(process)
    body = {"prompt": "the cat", "max_tokens": 500, "n": 4, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        while (ready := httpx.get(f"{url}/health/ready", timeout=60)).status_code == 200:
            pass
        assert ready.json()["error"]["code"] == "draining"
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "go"}, timeout=60).status_code == 503
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert sum('"finish_reason":"length"' in line for line in rest) == 4
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, "")
    logged = [json.loads(line) for line in err.splitlines()]
    assert [line["status"] for line in logged if line["path"] == "/v1/completions"] == [503, 200]
    assert logged[-1]["completion_tokens"] == 4 * 500


def test_keys_come_from_the_environment_and_ctrl_c_ends_in_130(start: Start, tiny_checkpoint: Path) -> None:
    """FLYBALL_API_KEY guards the routes; Ctrl-C ends the process as shells expect, without a traceback."""
    process = start(tiny_checkpoint, "--port", 0, "--name", "tiny", FLYBALL_API_KEY="secret other")
    url = serving(process)
    assert httpx.get(f"{url}/v1/models").status_code == 401
    for key in ("secret", "other"):
        assert httpx.get(f"{url}/v1/config", headers={"authorization": f"Bearer {key}"}).status_code == 200
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (130, "", "")


@pytest.fixture
def engine(tiny_checkpoint: Path) -> AsyncEngine:
    """An engine for a server inside this process."""
    return AsyncEngine(EngineConfig(model=tiny_checkpoint, max_num_seqs=4, num_blocks=64))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_ends_the_server_and_says_why(engine: AsyncEngine) -> None:
    """A server without an engine is worse than none: its supervisor must see it end."""

    def burn() -> None:
        raise MemoryError("no more")

    gate = Gate()
    with (
        listen("127.0.0.1", 0) as listener,
        pytest.raises(EngineFailed, match="the engine failed: MemoryError: no more"),
    ):
        serve(create_app(engine, gate=gate), engine, listener, gate=gate, on_ready=lambda: engine._inbox.put(burn))


def test_a_second_ctrl_c_waits_for_nobody(engine: AsyncEngine, capfd: pytest.CaptureFixture[str]) -> None:
    """What still runs is told so in its stream, never with a [DONE], and nothing else is printed."""
    lines: list[str] = []

    def client(url: str) -> None:
        body = {"prompt": "the cat", "max_tokens": 500, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            for line in response.iter_lines():
                lines.append(line)
                if len(lines) in (1, 3):
                    signal.raise_signal(signal.SIGINT)

    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=client, args=(url_of(listener),))
        gate = Gate()
        with pytest.raises(KeyboardInterrupt):
            serve(create_app(engine, gate=gate), engine, listener, gate=gate, on_ready=thread.start)
        thread.join()
    told = [line for line in lines if line][-1]
    assert "the engine was stopped" in told
    assert len(lines) < 900
    assert capfd.readouterr() == ("", "")
