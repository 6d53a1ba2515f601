"""A tune of a real server that it starts itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(600)  # three processes load torch or optuna
def test_without_a_url_a_server_is_started_tuned_and_ended(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Three trials on a tiny model behind a real socket; afterwards nobody listens."""
    command = [
        sys.executable, "-m", "flyball", "tune", "--model", str(tiny_checkpoint), "--trials", "3", "--repeats", "2",
        "--slo", "p95_e2e<60s", "--rate", "50", "--requests", "8", "--input-tokens", "16", "--output-tokens", "4",
        "--settle", "0",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    body = json.loads((tmp_path / "flyball-report.json").read_text())
    assert [t["kind"] for t in body["trials"]] == ["default", "start", "start"]
    assert all(t["failure"] is None and t["metrics"]["requests"] == 8 for t in body["trials"])
    url = next(word for word in done.stderr.split() if word.startswith("http://127.0.0.1:"))
    assert f"stopped the server at {url}" in done.stderr
    gone = subprocess.run(
        [*command, "--url", url], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert gone.returncode == 2
    assert f"no server answers at {url}" in gone.stderr
