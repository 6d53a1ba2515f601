"""Fixtures every test may use, and settings every test runs under."""

from __future__ import annotations

import os
import re
import signal
import zlib
from collections.abc import Callable

# Before anything imports torch or transformers: tiny models gain nothing from a second thread, workers share the cores,
# and no test may reach for a model hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background shell starts us deaf to it, and our children
    signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np
import pytest
from hypothesis import settings

from flyball.core.clock import VirtualClock

settings.register_profile("flyball", max_examples=25, deadline=None, derandomize="CI" in os.environ)
settings.register_profile("thorough", parent=settings.get_profile("flyball"), max_examples=1000)
settings.load_profile("flyball")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--accept` rewrites the accepted outputs."""
    parser.addoption("--accept", action="store_true", help="write the snapshots' .out files instead of comparing")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests measured but do not judge (`record_property`): wall times belong to the machine."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")


@pytest.fixture
def clock() -> VirtualClock:
    """Time that moves only when told."""
    return VirtualClock()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers seeded by the test's name: the same in every run, other ones for another test."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


@pytest.fixture
def snapshot(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Compare a text with the `.out` file beside the test; `pytest --accept` writes it."""
    name = re.sub(r"\W+", "_", request.node.name).strip("_")
    path = request.path.with_name(f"{request.path.stem}.{name}.out")

    def compare(text: str) -> None:
        if request.config.getoption("--accept"):
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"no accepted output {path.name}; write it with: pytest --accept {request.path.name}"
        assert text == path.read_text(encoding="utf-8")

    return compare
