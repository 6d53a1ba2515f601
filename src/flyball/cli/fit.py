"""`flyball fit`: from measured windows to the latency profile that `flyball plan` sizes with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from flyball.adapters.bench_files import BenchResult
    from flyball.numerics.markov import Floats
    from flyball.performance.fit import Fit

HOLDOUT_TARGET = 0.2  # relative error at a load that was not fitted


def run(
    windows: Annotated[
        list[Path],
        typer.Argument(
            help="Results of `flyball bench --out`, at two or more loads and two token mixes; or others' sweeps."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Write the profile to this JSON file.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model in the fleet spec; default: as served.")] = None,
    accelerator: Annotated[str, typer.Option(help="Name of the accelerator in the fleet spec.")] = "local",
    holdout: Annotated[
        list[Path] | None, typer.Option(help="A window that is not fitted, to test the prediction on.")
    ] = None,
    queue_model: Annotated[
        str, typer.Option(help="Law to fit: v3-engine, or v3 with llm-inferno's reading of the first token.")
    ] = "v3-engine",
    max_batch: Annotated[int, typer.Option(help="Batch limit of a server that others' sweeps measured.", min=1)] = 256,
    first_points: Annotated[int | None, typer.Option(help="Fit only so many points of each sweep.", min=1)] = None,
    state: Annotated[
        Path | None,
        typer.Option(help="Go on from what this file holds, window by window, and keep what is learnt in it."),
    ] = None,
    prior: Annotated[
        Path | None, typer.Option(help="With --state: a profile on another accelerator to start from, see --fleet.")
    ] = None,
    fleet: Annotated[
        Path | None, typer.Option(help="With --prior: the fleet spec that states the hardware of both accelerators.")
    ] = None,
) -> None:
    """Fit alpha, beta, gamma to bench windows, and say how well the data determine them."""
    from flyball.cli import require

    require("plan", "scipy")
    import numpy as np
    from rich.console import Console

    from flyball.adapters.bench_files import read_bench
    from flyball.adapters.bench_points import check_alike, fit_windows, operating_point, prediction_errors, unusable
    from flyball.adapters.profile_files import write_profiles
    from flyball.adapters.sweep_files import is_sweep

    if any(is_sweep(path) for path in windows):
        _train(windows, out, model or "model", accelerator, queue_model, max_batch, first_points)
        return
    fitted = {str(path): read_bench(path) for path in windows}
    if state is not None:
        from flyball.cli.fit_state import observe_windows

        observe_windows(
            fitted, state, law=queue_model, accelerator=accelerator, model=model, known=prior, fleet=fleet, out=out
        )
        return
    held_out = {str(path): read_bench(path) for path in holdout or ()}
    check_alike(fitted | held_out)
    found = fit_windows(fitted, law=queue_model, accelerator=accelerator, model=model)
    console = Console(soft_wrap=True, highlight=False)
    if not console.is_terminal:  # nobody's window to fit: let a pipe have whole names
        console = Console(soft_wrap=True, highlight=False, width=160)
    for name, reason in found.excluded.items():
        console.print(f"left out: {name} ({reason})")
    errors = np.array([found.fit.ttft_errors, found.fit.itl_errors])
    console.print(_table("fitted", {name: fitted[name] for name in found.used}, errors))
    for name, window in held_out.items():
        if flaw := unusable(window, operating_point(window, name)):
            console.print(f"no test of the fit: {name} ({flaw})")
    if held_out:
        errors = prediction_errors(found.profile, held_out)
        console.print(_table("held out", held_out, errors))
        worst = float(np.abs(errors).max())
        verdict = "within" if worst <= HOLDOUT_TARGET else "OVER"
        console.print(f"largest error held out: {worst:.1%}, {verdict} the target of {HOLDOUT_TARGET:.0%}")
    profile = found.profile
    console.print(
        f"alpha {profile.alpha_s * 1e3:.5g} ms a step, beta {profile.beta_s * 1e3:.5g} ms a token computed, "
        f"gamma {profile.gamma_s * 1e3:.5g} ms a cached token read ({queue_model})"
    )
    console.print(_identification(found.fit))
    if out is not None:
        write_profiles(out, [profile])
        console.print(f"wrote {out}: model {profile.model!r} on {profile.accelerator!r}")


def _train(
    sweeps: list[Path], out: Path | None, model: str, accelerator: str, law: str, max_batch: int, first: int | None
) -> None:
    """Fit all points of others' sweeps, by the mean squared relative error."""
    from flyball.adapters.profile_files import write_profiles
    from flyball.adapters.sweep_files import read_sweep
    from flyball.core.fleet import LatencyProfile
    from flyball.performance.fit import fit
    from flyball.performance.queueing import queue_model

    points = [point for path in sweeps for point in read_sweep(path, max_batch=max_batch)[:first]]
    found = fit(points, queue_model(law), robust=False)
    profile = LatencyProfile(
        model=model,
        accelerator=accelerator,
        alpha_s=found.alpha_s,
        beta_s=found.beta_s,
        gamma_s=found.gamma_s,
        max_batch=max_batch,
        queue_model=law,
        condition_number=found.condition_number,
        log_covariance=found.log_covariance,
    )
    typer.echo(
        f"{len(points)} points, loss {found.loss:.4g} (mean squared relative error of TTFT and ITL together)\n"
        f"alpha {found.alpha_s * 1e3:.5g} ms a step, beta {found.beta_s * 1e3:.5g} ms a token computed, "
        f"gamma {found.gamma_s * 1e3:.5g} ms a cached token read ({law})\n{_identification(found)}"
    )
    if out is not None:
        write_profiles(out, [profile])
        typer.echo(f"wrote {out}: model {model!r} on {accelerator!r}")


def _identification(found: Fit) -> str:
    kappa = f"condition number {found.condition_number:.4g}"
    if found.identified:
        return f"{kappa}: the windows determine all three"
    return (
        f"{kappa}: NOT IDENTIFIED, the windows do not tell the parameters apart and only loads like them can be "
        "predicted; add windows of another token mix (bench --input-tokens, --output-tokens) and of other loads"
    )


def _table(title: str, windows: Mapping[str, BenchResult], errors: Floats) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    table.add_column("window", overflow="fold")
    for name in ("req/s", "in", "out", "TTFT ms", "fit ms", "error", "ITL ms", "fit ms", "error"):
        table.add_column(name, justify="right")
    for (name, window), ttft_error, itl_error in zip(windows.items(), *errors.tolist(), strict=True):
        row = [f"{window.arrival_rps:.2f}", f"{window.mean_input_tokens:.0f}", f"{window.mean_output_tokens:.0f}"]
        for measured, error in ((window.ttft_s.mean, ttft_error), (window.itl_s.mean, itl_error)):
            row += [f"{measured * 1e3:.1f}", f"{measured * (1 + error) * 1e3:.1f}", f"{error:+.1%}"]
        table.add_row(Path(name).name, *row)
    return table
