"""A study on the terminal: progress while it runs, tables at its end, the report's files. For `tune` and `demo`."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from optuna import Study
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from flyball.adapters.profile_files import write_profiles
from flyball.core.clock import SystemClock
from flyball.core.errors import FlyballError
from flyball.core.knobs import Configuration, Value
from flyball.core.workload import Workload
from flyball.tuner import study as studies
from flyball.tuner import warm
from flyball.tuner.compare import Comparison, compare, describe_gain, verdict
from flyball.tuner.measure import Rig
from flyball.tuner.patience import Patience
from flyball.tuner.profile import export
from flyball.tuner.proposers import Strategy
from flyball.tuner.report import Report, as_json, html
from flyball.tuner.report_trials import as_csv
from flyball.tuner.study import Problem
from flyball.tuner.trials import Trial, best


def tune(
    problem: Problem,
    rig: Rig,
    strategy: Strategy,
    *,
    trials: int,
    pairs: Sequence[Workload],
    storage: str,
    console: Console,
    name: str | None = None,
    resume: bool = False,
    apply: bool = False,
    restore: bool = True,
    others: Sequence[Rig] = (),
    patience: Patience | None = None,
    alone: bool = True,
    accelerator: str = "local",
    warm_start: str | None = None,
) -> Report:
    """Search, compare and judge; progress goes to the console.

    Without a name a new study gets one from the time, and a resumed one is the latest. No `pairs`, no comparison. In
    the end, however it comes, the configuration found at the start is put back, or the recommended one with `apply`;
    not with `restore` false, for an engine that ends with the study. `others` measure trials at the same time. The
    latency profile of what is recommended, else of the default, is named after the `accelerator`. `warm_start` names an
    earlier study, NAME or DATABASE#NAME, whose trials are told to the sampler.
    """
    url = studies.storage_url(storage)
    now = datetime.fromtimestamp(SystemClock().wall_s(), UTC).astimezone()
    if name is None:
        name = studies.latest(url) if resume else f"tune-{now:%Y%m%d-%H%M%S}"
    console.print(
        f"study {name}: {problem.objective} on {problem.service or 'the target'}, {problem.workload}", soft_wrap=True
    )
    console.print(f"SLO {', '.join(map(str, problem.bounds)) or 'none'}; {_axes(problem)}", soft_wrap=True)
    known = None if warm_start is None else _earlier(warm_start, url)
    told = None if known is None else warm.fitting(known, problem.describe(), problem.lattice)
    with studies.opened(url, name, problem, resume=resume, alone=alone) as study, ExitStack() as stack:
        if known is not None and told is not None and warm.provenance(study) is None:
            warm.begin(study, known, told, problem.lattice)
        if whence := warm.provenance(study):
            console.print(f"warm start: {whence} are told to the sampler", soft_wrap=True, markup=False)
        keep = stack.enter_context(_restored(study, problem, rig, console)) if restore else None
        stopped = _search(study, problem, [rig, *others], strategy, patience, trials, console)
        found = studies.history(study)
        comparison = _compare(problem, rig, found, pairs, console) if pairs else None
        judged = verdict(found, problem, comparison)
        if keep and apply and judged.recommended is not None:
            keep(judged.recommended)
    return Report(
        study=name, problem=problem, strategy=strategy, trials=tuple(found), comparison=comparison, verdict=judged,
        stopped=stopped, written=f"{now:%Y-%m-%d %H:%M}",
        profile=export(
            problem, found, comparison, judged.recommended or problem.lattice.default, accelerator=accelerator
        ),
    )  # fmt: skip


def _earlier(text: str, url: str) -> warm.Earlier:
    """The study that NAME or DATABASE#NAME means."""
    database, _, name = text.rpartition("#")
    return studies.earlier(studies.storage_url(database) if database else url, name)


@contextmanager
def _restored(study: Study, problem: Problem, rig: Rig, console: Console) -> Iterator[Callable[[Configuration], None]]:
    """Put the configuration found at the start back at the end, unless another one is kept.

    The study remembers it, so that a run which resumes one that was killed puts back what that one had found.
    """
    in_force = {k: v for k, v in rig.target.configuration().items() if k in problem.lattice.default}
    found = studies.recall_found(study) or in_force
    studies.remember_found(study, found)
    final: dict[str, Configuration] = {"the configuration found at the start": found}

    def keep(values: Configuration) -> None:
        final.clear()
        final["the best configuration"] = values

    try:
        yield keep
    finally:
        with _uninterrupted():
            ((label, values),) = final.items()
            try:
                rig.target.apply(values)
                studies.remember_found(study, None)
                console.print(f"in force: {label}")
            except FlyballError as error:
                console.print(f"[red]{label} could not be put in force[/]: {escape(str(error))}")


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold off a second Ctrl-C, which would leave a trial's knobs behind."""
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {name: signal.signal(name, signal.SIG_IGN) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _axes(problem: Problem) -> str:
    axes = ", ".join(
        f"{a.knob.name} {_value(a.levels[0])}..{_value(a.levels[-1])} ({len(a.levels)} levels)"
        for a in problem.lattice.axes
    )
    fixed = ", ".join(f"{name}={_value(value)}" for name, value in problem.lattice.fixed.items())
    return f"searching {axes or 'no knob'}" + (f"; fixed {fixed}" if fixed else "")


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def _search(
    study: Study,
    problem: Problem,
    rigs: Sequence[Rig],
    strategy: Strategy,
    patience: Patience | None,
    trials: int,
    console: Console,
) -> studies.StopReason:
    before = len(studies.history(study))
    if before:
        console.print(f"going on after {before} finished trials")
    found: list[Trial] = studies.history(study)
    with _bars(console) as bars:
        whole = bars.add_task("trials", total=trials, completed=before, note=_best_note(found, problem))
        window = bars.add_task("requests", total=len(rigs[0].workload.requests), note="")
        for cold in rigs:
            if cold.settle is not None:
                cold.load.run(
                    cold.settle, cold.slo, ""
                )  # a cold server would be held against the default, which comes first

        def watch(progress: studies.Progress) -> None:
            bars.update(window, completed=0, description=f"requests of trial {progress.number}")
            if progress.finished is not None:
                found.append(progress.finished)
                bars.console.print(_line(progress.finished, problem), soft_wrap=True)
                bars.update(whole, advance=1, note=_best_note(found, problem))

        return studies.run(
            study, problem, rigs, strategy, trials=trials, patience=patience, watch=watch,
            requests=lambda done, total: bars.update(window, completed=done, total=total),
        )  # fmt: skip


def _compare(
    problem: Problem, rig: Rig, found: Sequence[Trial], pairs: Sequence[Workload], console: Console
) -> Comparison | None:
    with _bars(console) as bars:
        whole = bars.add_task("windows again", total=None, note="", visible=False)
        window = bars.add_task("requests", total=len(rig.workload.requests), note="", visible=False)

        def watch(label: str, done: int, total: int) -> None:
            bars.update(whole, completed=done, total=total, note=label, visible=True)
            bars.update(window, visible=True)

        return compare(
            problem, rig, found, pairs, watch=watch,
            requests=lambda done, total: bars.update(window, completed=done, total=total),
        )  # fmt: skip


def _best_note(found: Sequence[Trial], problem: Problem) -> str:
    top = best(found, problem.objective, problem.from_default)
    return (
        f"best so far {top.score.value:.4g} (trial {top.number})" if top else "none within the SLO yet" if found else ""
    )


def _line(trial: Trial, problem: Problem) -> str:
    if trial.score.failure is not None:
        result = f"[red]failed[/]: {escape(trial.score.failure)}"
    else:
        margins = "  ".join(
            f"[{'red' if m > 0 else 'green'}]{escape(name)} {m:+.0%}[/]" for name, m in trial.score.margins.items()
        )
        result = f"{problem.objective.metric} {trial.score.value:.4g}  {margins}"
    searched = {axis.knob.name for axis in problem.lattice.axes}
    knobs = " ".join(f"{name}={_value(value)}" for name, value in trial.values.items() if name in searched)
    return f"{trial.number:>3} {trial.kind:7} {knobs}  {result}"


def _value(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def show(report: Report, path: Path) -> None:
    """Print default against best, the verdict, and how far the latency profile beside the report can be trusted."""
    console = Console(highlight=False)
    top = report.best
    default = report.problem.lattice.default
    if top is not None:
        table = Table(title=f"{report.study}: {len(report.trials)} trials, {report.stopped}")
        for column in ("", "default", "best"):
            table.add_column(column, justify="left" if not column else "right")
        for knob, value in default.items():
            table.add_row(knob, _value(value), _value(top.values[knob]))
        if report.comparison is not None:
            _compared_rows(table, report.comparison)
        console.print(table)
    console.print(f"[bold]{escape(report.verdict.sentence)}[/]", soft_wrap=True)
    if (found := report.profile) is not None:
        where = f"; {profile_path(path)} is for flyball plan --profile" if found.profile is not None else ""
        console.print(f"{found.sentence}{where}", soft_wrap=True, markup=False)


def _compared_rows(table: Table, c: Comparison) -> None:
    table.add_section()
    table.add_row(c.objective.metric, f"{c.mean('default'):.4g}", f"{c.mean('challenger'):.4g}")
    table.add_row("gain, 95 % interval", "", describe_gain(c))
    for name, margin in c.margins("default").items():
        best_margin = c.margins("challenger")[name]
        table.add_row(f"{name}, mean margin", _margin(margin), _margin(best_margin))
    if c.margins("default"):
        table.add_row("windows within the SLO", *(f"{c.kept(s)} of {len(c.pairs)}" for s in ("default", "challenger")))


def _margin(margin: float) -> str:
    return f"[{'red' if margin > 0 else 'green'}]{margin:+.0%}[/]"


def write(report: Report, path: Path, url: str) -> None:
    """Write the HTML page, and beside it JSON and CSV files, and the latency profile if there is one."""
    path.write_text(html(report, url), encoding="utf-8")
    body = json.dumps(as_json(report, url), indent=1, allow_nan=False)
    path.with_suffix(".json").write_text(body + "\n", encoding="utf-8")
    path.with_suffix(".csv").write_text(as_csv(report.trials, report.problem), encoding="utf-8")
    beside = profile_path(path)
    beside.unlink(missing_ok=True)  # an earlier study's is not this one's
    if report.profile is not None and report.profile.profile is not None:
        write_profiles(beside, [report.profile.profile])


def profile_path(report: Path) -> Path:
    """Where the latency profile lies.

    >>> profile_path(Path("flyball-report.html")).name
    'flyball-report-profile.json'
    """
    return report.with_name(f"{report.stem}-profile.json")
