"""`flyball config explain`: every setting of an engine, its value, where it came from, and why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from flyball.cli.engine_options import (
    BlockSize,
    DraftModel,
    Dtype,
    KvCacheMib,
    MaxModelLen,
    MaxNumBatchedTokens,
    MaxNumSeqs,
    MedusaHeads,
    Model,
    Quantization,
    QuantizeHead,
    SpecMethod,
    Threads,
    engine_config,
    given,
)

app = typer.Typer(help="Look at the configuration of an engine.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """A group, though it has one command as yet."""


@app.command("explain")
def explain(
    context: typer.Context,
    model: Model = None,
    dtype: Dtype = "auto",
    max_num_seqs: MaxNumSeqs = 64,
    max_num_batched_tokens: MaxNumBatchedTokens = 2048,
    max_model_len: MaxModelLen = None,
    kv_cache_mib: KvCacheMib = 512,
    block_size: BlockSize = 16,
    threads: Threads = None,
    quantization: Quantization = None,
    quantize_head: QuantizeHead = False,
    spec_method: SpecMethod = "off",
    draft_model: DraftModel = None,
    medusa_heads: MedusaHeads = None,
    url: Annotated[str | None, typer.Option(help="Explain this running Flyball server instead.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Admin key of that server.", envvar="FLYBALL_ADMIN_KEY")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one setting a line.")] = False,
) -> None:
    """Show every setting that `flyball serve` would start with, or that a running server has, and why."""
    from flyball.cli import require
    from flyball.core.errors import InvalidInput

    sources = given(context)
    if url is not None:
        local = sorted(sources.keys() - {"url", "api_key", "as_json"})
        if local:
            raise InvalidInput(f"a running server is not asked about {', '.join(local)}; give --url alone, or no --url")
        require("tune", "httpx")
        from flyball.adapters.engines.flyball_http import FlyballTarget

        with FlyballTarget(url, api_key=api_key) as target:
            _show(target.explain(), as_json)
        return
    require("engine", "torch", "transformers")
    config = engine_config(
        model,
        dtype=dtype,
        block_size=block_size,
        kv_cache_mib=kv_cache_mib,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        threads=threads,
        quantization=quantization,
        quantize_head=quantize_head,
        spec_method=spec_method,
        draft_model=draft_model,
        medusa_heads=medusa_heads,
    )
    from flyball.engine.explain import explain_unloaded

    _show([asdict(setting) for setting in explain_unloaded(config, sources)], as_json)


def _show(settings: Sequence[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        for setting in settings:
            print(json.dumps(setting))
        return
    for live, title in ((False, "Capacity: fixed while the engine runs"), (True, "Policy: live, PATCH /v1/config")):
        table = Table(title=title, title_justify="left")
        for column in ("setting", "value", "from", "why"):
            table.add_column(column)
        for setting in settings:
            if setting["live"] == live:
                value = "" if setting["value"] is None else str(setting["value"])
                table.add_row(setting["name"], value, setting["source"], setting["why"])
        Console().print(table)
