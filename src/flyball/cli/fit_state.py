"""`flyball fit --state`: windows one after another, each correcting what is kept of the law between runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer

from flyball.adapters.bench_files import BenchResult
from flyball.adapters.bench_points import operating_point
from flyball.adapters.calibration_files import read_calibrations, write_calibrations
from flyball.adapters.fleet_files import read_fleet
from flyball.adapters.profile_files import read_profiles, write_profiles
from flyball.core.errors import InvalidInput
from flyball.numerics.kalman import Belief
from flyball.performance.fit import FAILURES_ALLOWED
from flyball.planner.calibrate import UNKNOWN, CycleReport, begin, observe, prior_from


def observe_windows(
    windows: Mapping[str, BenchResult],
    state: Path,
    *,
    law: str,
    accelerator: str,
    model: str | None,
    known: Path | None,
    fleet: Path | None,
    out: Path | None,
) -> None:
    """One cycle a window, in the order given; what was learnt is kept in the file, and its profiles written."""
    kept = {(c.model, c.accelerator, c.generation): c for c in read_calibrations(state)}
    touched = {}
    for name, window in windows.items():
        key = (model or window.model, accelerator, window.generation)
        if key not in kept:
            prior = _prior(known, fleet, key[0], accelerator) if known else UNKNOWN
            kept[key] = begin(key[0], accelerator, law=law, generation=key[2], prior=prior)
        if window.requests - window.completed > FAILURES_ALLOWED * window.requests:
            typer.echo(f"{name}: left out, {window.requests - window.completed} of {window.requests} requests failed")
            continue
        kept[key], report = observe(kept[key], [operating_point(window, name)])
        touched[key] = kept[key]
        typer.echo(f"{name}: {_verdict(report)}")
    write_calibrations(state, list(kept.values()))
    profiles = [c.profile() for c in touched.values() if c.kept]
    for profile in profiles:
        spread = [profile.log_covariance[i] ** 0.5 for i in (0, 4, 8)]
        typer.echo(
            f"{profile.model} on {profile.accelerator}: alpha {profile.alpha_s * 1e3:.5g} ms (±{spread[0]:.0%}), "
            f"beta {profile.beta_s * 1e3:.5g} ms (±{spread[1]:.0%}), gamma {profile.gamma_s * 1e3:.5g} ms "
            f"(±{spread[2]:.0%}) ({profile.queue_model}), condition number {profile.condition_number:.4g}"
        )
    if out is not None and profiles:
        write_profiles(out, profiles)
        typer.echo(f"wrote {out}")


def _prior(known: Path, fleet: Path | None, model: str, accelerator: str) -> Belief:
    """What a profile on another accelerator tells, by the hardware of both that the fleet states."""
    if fleet is None:
        raise InvalidInput(
            "--prior needs --fleet: the spec that states memory_gb_s or compute_tflops of both accelerators"
        )
    hardware = {a.name: a for a in read_fleet(fleet).accelerators}
    profiles = [p for p in read_profiles(known) if p.model == model]
    if not profiles:
        raise InvalidInput(
            f"{known} has no profile of model {model!r}; give one that was measured on another accelerator"
        )
    missing = {profiles[0].accelerator, accelerator} - hardware.keys()
    if missing:
        raise InvalidInput(f"{fleet} has no accelerator {min(missing)!r}; add it with its memory_gb_s")
    return prior_from(profiles[0], hardware[profiles[0].accelerator], hardware[accelerator])


def _verdict(report: CycleReport) -> str:
    """What a window did, in a few words."""
    if report.suspects:
        return "odd; it counts once the next ones agree with it"
    if not report.used:
        return "left out, far from what is known"
    changed = "the engine has changed; " if report.changed else ""
    full = "saturated, so only its ITL counts; " if report.saturated else ""
    unsure = "" if report.identified else f"; NOT IDENTIFIED, {report.advice}"
    return f"{changed}{full}predicted within {report.error:.1%}{unsure}"
