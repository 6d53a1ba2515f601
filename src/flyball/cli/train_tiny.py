"""`flyball train-tiny`: train the small models that ship with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    texts: Annotated[list[Path], typer.Argument(help="Plain UTF-8 text files to learn from.")],
    out: Annotated[Path, typer.Option(help="New folder for tokenizer, target, draft and Medusa heads.")],
    preset: Annotated[
        str, typer.Option(help="demo: the bundled model, half an hour on 2 cores; ci: seconds.")
    ] = "demo",
    seed: Annotated[int | None, typer.Option(help="Seed of every random number; default: the preset's.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
) -> None:
    """Train tokenizer, target, distilled draft and Medusa heads from plain text; prints the held-out loss."""
    from flyball.cli import require
    from flyball.core.errors import InvalidInput

    require("engine", "torch", "transformers", "tokenizers")
    import dataclasses

    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers.utils import logging as transformers_logging

    from flyball.core.clock import SystemClock
    from flyball.engine.tiny_model import PRESETS, train_tiny

    if preset not in PRESETS:
        raise InvalidInput(f"unknown preset {preset!r}; use one of {', '.join(PRESETS)}")
    recipe = PRESETS[preset] if seed is None else dataclasses.replace(PRESETS[preset], seed=seed)
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()  # it would write across ours
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("loss {task.fields[loss]:.3f}"))  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console) as bars:
        tasks = {
            "target": bars.add_task("target", total=recipe.target_steps, loss=0.0),
            "draft": bars.add_task("draft", total=recipe.draft_steps, loss=0.0),
            "medusa": bars.add_task("medusa", total=recipe.medusa_steps, loss=0.0),
        }

        def progress(stage: str, step: int, steps: int, loss: float) -> None:
            bars.update(tasks[stage], completed=step, total=steps, loss=loss)

        figures = train_tiny(texts, out, recipe, progress, clock=SystemClock())
    for name, value in figures.items():
        typer.echo(f"{name:24} {value:,.3f}" if isinstance(value, float) else f"{name:24} {value:,}")
