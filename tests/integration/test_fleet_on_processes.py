"""The loop, end to end on one machine: engines, gateway and Prometheus are real processes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "fleet_on_processes.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="the program prometheus is not installed")
def test_load_that_doubles_is_followed_and_nothing_is_lost_on_the_way_down() -> None:
    """Two engines become three when the load doubles, and two again when it falls; every request is answered."""
    run = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=550, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    replicas = re.search(r"replicas: 2 at first, (\d) at most, (\d) at last", run.stdout)
    assert replicas, run.stdout
    assert int(replicas[1]) >= 3
    assert int(replicas[2]) == 2
    assert re.search(r"requests: (\d+) sent, \1 answered, 0 lost\ngateway: \1 arrived, 0 answers cut off\n", run.stdout)
