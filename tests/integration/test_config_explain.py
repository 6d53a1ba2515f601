"""`flyball config explain --url` against a real server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import typer.testing

from flyball import cli
from flyball.cli import app
from flyball.engine.async_engine import AsyncEngine
from flyball.engine.config import EngineConfig
from flyball.server.app import create_app

cli._register()


def test_a_running_server_explains_its_configuration(tiny_checkpoint: Path, serve: Callable[..., str]) -> None:
    """Values in force, what the start-up options set, and the version that changed a knob."""
    config = EngineConfig(model=tiny_checkpoint, dtype="float32", max_num_seqs=8, num_blocks=64, threads=1)
    url = serve(create_app(AsyncEngine(config, given={"max_num_seqs": "--max-num-seqs"})))
    assert httpx.patch(f"{url}/v1/config", json={"policy": "priority"}).status_code == 200
    result = typer.testing.CliRunner().invoke(
        app, ["config", "explain", "--url", url, "--json"], env={"FLYBALL_ADMIN_KEY": ""}
    )
    assert result.exit_code == 0, result.output
    settings = {(s["name"], s["live"]): s for s in map(json.loads, result.output.splitlines())}
    assert settings["max_num_seqs", False]["source"] == "--max-num-seqs"
    assert settings["num_blocks", False]["value"] == 64
    assert settings["policy", True]["value"] == "priority"
    assert settings["policy", True]["source"].startswith("version 2 by ")
