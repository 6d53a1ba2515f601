"""`flyball tune` over an engine that it starts itself: a stub of vLLM that speaks its command line and API."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.stub_engines import install

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A study of four configurations of a stub, without a comparison."""
    install(tmp_path / "engine")
    model = tmp_path / "model"
    model.mkdir()
    config = {"num_attention_heads": 4, "max_position_embeddings": 256, "vocab_size": 512}
    (model / "config.json").write_text(json.dumps(config))
    (tmp_path / "trace.csv").write_text("arrival_s,input_tokens,output_tokens\n" + "0.0,4,3\n0.05,4,3\n" * 3)
    return [
        sys.executable, "-m", "flyball", "tune", "vllm", "--model", str(model),
        "--engine-path", str(tmp_path / "engine"),
        "--workload", str(tmp_path / "trace.csv"), "--slo", "p95_ttft<5s", "--maximize", "goodput", "--budget", "4",
        "--repeats", "0", "--settle", "0", "--knob", "max_num_seqs=1,2,4,8,256", "--named-only", "--sampler", "random",
        "--engine-env", f"STUB_CHILD={tmp_path / 'child'}", "--ready-timeout", "60",
    ]  # fmt: skip


def until(true: Callable[[], bool]) -> None:
    """Wait for what other processes do; the test's timeout is the limit."""
    while not true():
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_kill_9_loses_one_trial_and_leaves_no_engine(command: list[str], tmp_path: Path) -> None:
    """The engine's worker in a session of its own ends with the tuner; the resumed study has all four trials."""
    first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    child = tmp_path / "child"
    until(lambda: first.poll() is not None or (child.exists() and bool(child.read_text())))
    worker = int(child.read_text())
    until(lambda: first.poll() is not None or int(child.read_text() or worker) != worker)  # the second trial's engine
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    until(lambda: gone(worker) and gone(int(child.read_text())))

    done = subprocess.run([*command, "--resume"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "going on after" in done.stderr
    body = json.loads((tmp_path / "flyball-report.json").read_text())
    assert len(body["trials"]) == 4
    assert len({trial["values"]["max_num_seqs"] for trial in body["trials"]}) == 4
    assert not any(trial["failure"] for trial in body["trials"])
    until(lambda: gone(int(child.read_text())))


def test_an_engine_that_cannot_start_ends_the_study_before_it_begins(command: list[str], tmp_path: Path) -> None:
    """One sentence with the kind of failure and the engine's own words, exit code 2, no study begun."""
    done = subprocess.run(
        [*command, "--engine-arg=--quantisation=int3"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("flyball: vllm did not start (refused): vllm: error: unrecognized arguments: --quantisation")
    assert not (tmp_path / "flyball-report.json").exists()
