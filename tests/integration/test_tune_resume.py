"""A tune that is killed without warning, and resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flyball.tuner.study import storage_url
from helpers.tunable_server import SPACE, TunableServer, running

OPTIONS = ("--slo", "p50_e2e<300ms", "--knob", "max_num_batched_tokens=256", "--knob", "max_wait_ms=0",
           "--knob", "prefix_caching=true", "--rate", "100", "--requests", "6", "--input-tokens", "4",
           "--output-tokens", "4", "--settle", "0", "--repeats", "0")  # fmt: skip


def until(true: Callable[[], bool]) -> None:
    """Wait for what another process does; the test's timeout is the limit."""
    while not true():
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(300)  # two processes load optuna
@pytest.mark.parametrize("configurations", [1, 4])
def test_kill_9_in_a_trial_loses_that_trial_only(tmp_path: Path, configurations: int) -> None:
    """Every finished trial survives, the lost configuration is tried again, and the old configuration comes back."""
    import optuna

    with running(TunableServer(seqs_s=0.02)) as server:
        server.values["max_num_seqs"] = 48
        command = [sys.executable, "-m", "flyball", "tune", "--url", server.url, *OPTIONS, "--trials", "6"]
        first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        answered = 6 * configurations - 3  # in the middle of a window
        until(
            lambda: (len(server.applied) == configurations and server.answered >= answered) or first.poll() is not None
        )
        first.send_signal(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
        lost = server.applied[-1]

        url = storage_url(str(tmp_path / "flyball-study.db"))
        (name,) = optuna.get_all_study_names(url)
        states = [t.state.name for t in optuna.load_study(study_name=name, storage=url).trials]
        assert states == ["COMPLETE"] * (configurations - 1) + ["RUNNING"]

        done = subprocess.run([*command, "--resume"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert server.applied[configurations] == lost
        assert server.values == SPACE.defaults() | {"max_num_seqs": 48}
    stored = optuna.load_study(study_name=name, storage=url)
    states = [t.state.name for t in stored.trials]
    assert states == ["COMPLETE"] * (configurations - 1) + ["FAIL"] + ["COMPLETE"] * (7 - configurations)
    body = json.loads((tmp_path / "flyball-report.json").read_text())
    assert len(body["trials"]) == 6
