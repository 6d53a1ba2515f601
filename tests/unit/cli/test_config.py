"""`flyball config explain` on the terminal and as JSON."""

from __future__ import annotations

import json

import typer.testing

from flyball import cli
from flyball.cli import app
from flyball.core.errors import InvalidInput

cli._register()
ARGS = ["config", "explain", "--max-num-seqs", "4", "--kv-cache-mib", "3"]


def test_json_has_a_setting_a_line_with_its_source() -> None:
    """The bundled model; options are named as the source, in the field's own unit."""
    result = typer.testing.CliRunner().invoke(app, [*ARGS, "--json"], env={"FLYBALL_ADMIN_KEY": ""})
    assert result.exit_code == 0, result.output
    settings = [json.loads(line) for line in result.output.splitlines()]
    capacity = {s["name"]: s for s in settings if not s["live"]}
    assert (capacity["max_num_seqs"]["value"], capacity["max_num_seqs"]["source"]) == (4, "--max-num-seqs")
    assert (capacity["kv_cache_bytes"]["value"], capacity["kv_cache_bytes"]["source"]) == (3 * 2**20, "--kv-cache-mib")
    assert capacity["num_blocks"]["source"] == "model"
    assert {s["source"] for s in settings if s["live"]} == {"capacity", "default"}


def test_the_table_shows_capacity_apart_from_policy() -> None:
    """Two tables: what is fixed, and what may change."""
    output = typer.testing.CliRunner().invoke(app, ARGS).output
    assert output.index("Capacity: fixed") < output.index("num_blocks") < output.index("Policy: live")
    assert output.index("Policy: live") < output.index("prefix_caching")


def test_a_server_is_not_asked_about_local_options() -> None:
    """A mistake is refused, not ignored."""
    result = typer.testing.CliRunner().invoke(app, [*ARGS, "--url", "http://127.0.0.1:9"])
    assert isinstance(result.exception, InvalidInput)
    assert "kv_cache_bytes, max_num_seqs" in str(result.exception)
