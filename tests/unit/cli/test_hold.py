"""`flyball hold`'s commands on an audit file, and what it says of wrong options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flyball.adapters.audit_files import AuditFile
from flyball.cli.hold import app
from flyball.core.clock import VirtualClock
from flyball.core.errors import EngineFailed, InvalidInput
from flyball.core.knobs import Knob, Space
from flyball.tuner.guard import Guard
from flyball.tuner.guard_limits import PRESETS

SPACE = Space((Knob(name="wait_ms", kind="float", default=100.0, low=0.0, high=500.0),))


@pytest.fixture
def audit(tmp_path: Path) -> Path:
    """A run with one change and one refusal."""
    path, clock = tmp_path / "audit.jsonl", VirtualClock()
    with AuditFile(path) as file:
        guard = Guard(
            SPACE, SPACE.defaults(), apply=lambda _: None, limits=PRESETS["balanced"], audit=file, clock=clock
        )
        for wish in (120.0, 400.0):
            clock.advance(5)
            guard.propose({"wait_ms": wish}, why="a test")
    return path


def test_an_audit_is_decided_again(audit: Path) -> None:
    """Same decisions: exit code 0; a line that was changed: 1, and where."""
    good = CliRunner().invoke(app, ["replay", str(audit)])
    assert good.exit_code == 0
    assert "the same decisions" in good.output
    audit.write_text(audit.read_text().replace('"rule":"max_step"', '"rule":"bounds"'))
    bad = CliRunner().invoke(app, ["replay", str(audit)])
    assert bad.exit_code == 1
    assert "event 5" in bad.output


def test_a_past_proposal_is_explained(audit: Path) -> None:
    """From the file: what was proposed, and by which rule it was refused."""
    told = CliRunner().invoke(app, ["explain", "2", "--audit", str(audit)])
    lines = [json.loads(line) for line in told.output.splitlines()]
    assert [line["kind"] for line in lines] == ["proposal", "refusal"]
    assert lines[1]["data"]["rule"] == "max_step"
    with pytest.raises(InvalidInput, match="no proposal 9"):
        CliRunner().invoke(app, ["explain", "9", "--audit", str(audit)], catch_exceptions=False)


def test_no_holder_is_said_to_be_none() -> None:
    """A command without a holder names what to start."""
    with pytest.raises(EngineFailed, match="flyball hold"):
        CliRunner().invoke(app, ["status", "--control", "http://127.0.0.1:9"], catch_exceptions=False)


def test_others_are_not_let_in_without_a_key() -> None:
    """Listening beyond this machine needs the admin key."""
    with pytest.raises(InvalidInput, match="--admin-key"):
        CliRunner().invoke(app, ["--host", "0.0.0.0", "--port", "0"], catch_exceptions=False)
