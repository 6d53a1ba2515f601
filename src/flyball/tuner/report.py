"""The result of a study as a page that stands alone, and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from flyball import __version__
from flyball.core.knobs import Configuration, Value
from flyball.tuner import charts
from flyball.tuner.compare import Comparison, Verdict, describe_gain
from flyball.tuner.intervals import CONFIDENCE, Interval, t_interval
from flyball.tuner.objective import Score
from flyball.tuner.profile import Exported
from flyball.tuner.proposers import Strategy
from flyball.tuner.report_trials import (
    coordinates_section,
    front_section,
    importance_section,
    importances,
    invalid_section,
    pareto,
)
from flyball.tuner.study import Problem
from flyball.tuner.trials import Trial, best, closest

SCHEMA = "flyball.tune/1"
_LATENCIES = ("p95_ttft", "p99_itl", "p95_tpot", "p95_e2e")  # columns of the tables, shown in ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything a study found."""

    study: str  # its name
    problem: Problem
    strategy: Strategy
    trials: tuple[Trial, ...]
    comparison: Comparison | None
    verdict: Verdict
    stopped: str  # why no further trial was made
    written: str  # when, for people
    launch: str = ""  # what starts the engine with the recommended configuration, where that takes a start
    profile: Exported | None = None  # the latency law of the recommended configuration, else of the default

    @property
    def best(self) -> Trial | None:
        """The challenger, or the best of the search where nothing was compared."""
        if self.comparison is not None:
            return self.comparison.challenger
        return best(self.trials, self.problem.objective, self.problem.from_default)

    def best_so_far(self) -> list[float | None]:
        """The best value of any promise-keeping trial up to each trial."""
        better = max if self.problem.objective.maximise else min
        kept: list[float] = []
        line: list[float | None] = []
        for trial in self.trials:
            kept += [trial.score.value] if trial.score.feasible else []
            line.append(better(kept, default=None))
        return line


def apply_command(values: Configuration, url: str) -> str:
    """The command that puts a configuration in force on a Flyball server."""
    body = json.dumps(dict(values)).replace("'", "'\\''")
    return f"curl -X PATCH {url}/v1/config -H 'content-type: application/json' -d '{body}'"


def as_json(report: Report, url: str) -> dict[str, Any]:
    """The report as plain data; what was not measured is null."""
    verdict = report.verdict
    body: dict[str, Any] = {
        "schema": SCHEMA,
        "flyball_version": __version__,
        "study": report.study,
        "written": report.written,
        "stopped": report.stopped,
        "problem": report.problem.describe(),
        "sampler": report.strategy.sampler,
        "seed": report.strategy.seed,
        "outcome": verdict.outcome,
        "verdict": verdict.sentence,
        "recommended": dict(verdict.recommended) if verdict.recommended is not None else None,
        "launch": report.launch or None,
        "importance": importances(report.trials, report.problem),
        "pareto": [t.number for t in pareto(report.trials, report.problem.objectives)],
        "apply": apply_command(verdict.recommended, url) if verdict.recommended is not None else None,
        "comparison": _comparison_json(report.comparison) if report.comparison else None,
        "profile": _profile_json(report.profile) if report.profile else None,
        "trials": [
            {"number": t.number, "kind": t.kind, "values": dict(t.values), "metrics": dict(t.metrics)}
            | _score(t.score)
            | ({"also": list(t.score.also)} if t.score.also else {})
            for t in report.trials
        ],
    }
    finite: dict[str, Any] = _finite(body)
    return finite


def _score(score: Score) -> dict[str, Any]:
    return {
        "value": score.value, "feasible": score.feasible, "margins": dict(score.margins), "failure": score.failure,
    }  # fmt: skip


def _profile_json(found: Exported) -> dict[str, Any]:
    return {
        "sentence": found.sentence,
        "identified": found.identified,
        "law": asdict(found.profile) if found.profile else None,
    }


def _comparison_json(c: Comparison) -> dict[str, Any]:
    gain, relative = c.gain, c.relative_gain
    return {
        "best": dict(c.challenger.values),
        "default": dict(c.default),
        "confidence": CONFIDENCE,
        "method": "Student's t on paired differences, order alternating",
        "gain": [gain.low, gain.mean, gain.high],
        "relative_gain": [relative.low, relative.mean, relative.high] if relative else None,
        "pairs": [
            {
                side: {"metrics": dict(getattr(pair, key).metrics)} | _score(getattr(pair, key).score)
                for side, key in (("default", "default"), ("best", "challenger"))
            }
            for pair in c.pairs
        ],
    }


def _finite(value: Any) -> Any:  # noqa: ANN401  # plain data of any shape
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return value


def html(report: Report, url: str) -> str:
    """One page that needs nothing else: no script, no network, light or dark as the reader likes."""
    problem = report.problem
    tone = {"gain": "good", "keeps the SLO": "good", "no gain": "plain", "not compared": "plain"}.get(
        report.verdict.outcome, "bad"
    )
    titles = {t.number: _describe(t) for t in report.trials}
    shares = importances(report.trials, problem)
    sections = [
        f'<p class="eyebrow">Flyball tune · {escape(problem.service)} · {escape(report.written)}</p>',
        f"<h1>{escape(_headline(report))}</h1>",
        f'<p class="verdict {tone}">{escape(report.verdict.sentence)}.</p>',
        _tiles(report),
        _convergence(report),
        _comparison(report),
        _configuration(report, url),
        front_section(report.trials, problem, titles),
        importance_section(shares, problem.objective.metric),
        _knobs(report),
        coordinates_section(report.trials, problem, titles),
        invalid_section(report.trials, problem, shares, titles),
        _trials(report),
        _setting(report),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Flyball tune: {escape(report.study)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(sections)}<footer>flyball {__version__}</footer></main></body></html>\n"
    )


def _headline(report: Report) -> str:
    if report.verdict.outcome == "gain" and report.comparison is not None:
        gain = report.comparison.relative_gain
        if gain is not None:
            return f"{gain.mean * 100:+.0f} % {report.problem.objective.metric} over the default configuration"
    return {
        "gain": "Better than the default configuration",
        "keeps the SLO": "The SLO is kept, which the default breaks",
        "no gain": "No gain over the default configuration",
        "not confirmed": "The best configuration did not hold",
        "not compared": "Best configuration of the search",
        "infeasible": "No configuration keeps the SLO",
    }[report.verdict.outcome]


def _tiles(report: Report) -> str:
    objective = report.problem.objective
    tiles = []
    c = report.comparison
    if c is not None:
        gain, _, interval = describe_gain(c).partition(" [")
        tiles = [
            (f"{objective.metric}, default", f"{c.mean('default'):.4g}", f"mean of {len(c.pairs)} windows"),
            (f"{objective.metric}, best", f"{c.mean('challenger'):.4g}", f"mean of {len(c.pairs)} windows"),
            ("gain", gain, f"{CONFIDENCE:.0%} in [{interval}"),
        ]
        if report.problem.bounds:
            tiles.append((
                "windows within the SLO",
                f"{c.kept('default')} → {c.kept('challenger')}",
                f"of {len(c.pairs)}, default → best",
            ))  # fmt: skip
    kept = sum(t.score.feasible for t in report.trials)
    tiles.append(("trials", str(len(report.trials)), f"{kept} kept every promise; {report.stopped}"))
    cells = "".join(
        f'<div class="tile"><span>{escape(a)}</span><b>{escape(b)}</b><small>{escape(c_)}</small></div>'
        for a, b, c_ in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _convergence(report: Report) -> str:
    marks = [
        charts.Mark(x=i, y=t.score.value, feasible=t.score.feasible, title=_describe(t))
        for i, t in enumerate(report.trials)
    ]
    default = next((t.score.value for t in report.trials if t.kind == "default"), None)
    picture = charts.convergence(marks, report.best_so_far(), default, report.problem.objective.metric)
    legend = (
        '<p class="legend"><i class="dot"></i>kept every promise<i class="cross">×</i>broke one or failed'
        '<i class="line"></i>best so far<i class="dash"></i>default in the search</p>'
    )
    return f"<section><h2>Convergence</h2>{legend}{picture}</section>"


def _describe(trial: Trial) -> str:
    knobs = ", ".join(f"{k}={_show(v)}" for k, v in trial.values.items())
    broken = "; ".join(f"{n} broken by {m:.0%}" for n, m in trial.score.margins.items() if m > 0)
    return f"trial {trial.number} ({trial.kind}): {knobs}; {trial.score.value:.4g}" + (
        f"; {trial.score.failure or broken}" if not trial.score.feasible else ""
    )


def _comparison(report: Report) -> str:
    c = report.comparison
    if c is None:
        return ""
    rows = [(p.default.score.value, p.challenger.score.value) for p in c.pairs]
    header = ("", "default", "best", "change")
    lines = [_compare_line(c, report.problem.objective.metric, 1.0)]
    lines += [_compare_line(c, m, 1.0) for m in ("goodput", "throughput", "attainment", "output_tps")
              if m != report.problem.objective.metric]  # fmt: skip
    lines += [_compare_line(c, m, 1e3) for m in _shown_latencies(report)]
    for name, margin in c.margins("default").items():
        lines.append([f"{name}: mean margin", _margin(margin), _margin(c.margins("challenger")[name]), ""])
    return (
        "<section><h2>Default against best, measured again</h2>"
        f"<p>{len(c.pairs)} pairs of windows under the same traffic, the order swapped from pair to pair; none of them "
        f"was used in the search. The interval of the gain is Student's t on the paired differences at "
        f"{CONFIDENCE:.0%}: <b>{escape(describe_gain(c))}</b>. The table shows means "
        "with intervals of their own.</p>"
        '<p class="legend"><i class="dot was"></i>default<i class="dot"></i>best</p>'
        f"{charts.pairs(rows, report.problem.objective.metric)}{_table(header, lines)}</section>"
    )


def _compare_line(c: Comparison, metric: str, scale: float) -> list[str]:
    sides = [[getattr(p, s).metrics.get(metric, math.nan) for p in c.pairs] for s in ("default", "challenger")]
    a, b = (t_interval([scale * v for v in side]) for side in sides)
    change = f"{(b.mean / a.mean - 1) * 100:+.1f} %" if a.mean and math.isfinite(b.mean / a.mean) else ""
    return [f"{metric}, ms" if scale != 1 else metric, _spread(a), _spread(b), change]


def _spread(interval: Interval) -> str:
    half = (interval.high - interval.low) / 2
    return f"{_number(interval.mean)} ± {_number(half)}" if math.isfinite(half) else _number(interval.mean)


def _shown_latencies(report: Report) -> list[str]:
    """Those of the promises first, then the usual ones."""
    promised = [bound.name for bound in report.problem.bounds]
    known = {name for t in report.trials for name in t.metrics}
    return [name for name in dict.fromkeys([*promised, *_LATENCIES]) if name in known]


def _configuration(report: Report, url: str) -> str:
    found = report.best
    default = report.problem.lattice.default
    heading, values = ("Best configuration", found.values) if found else ("Default configuration", default)
    if found is None and (near := closest(report.trials)) is not None:
        heading, values = "Closest configuration", near.values
    rows = [
        [escape(name), _show(default[name]), f"<b>{_show(value)}</b>" if value != default[name] else _show(value)]
        for name, value in values.items()
    ]
    command = (
        f"<p>To put it in force:</p><pre>{escape(apply_command(report.verdict.recommended, url))}</pre>"
        if report.verdict.recommended is not None
        else ""
    )
    if report.launch and report.verdict.recommended is not None:
        command = f"<p>To start the engine with it:</p><pre>{escape(report.launch)}</pre>"
    table = _table(("knob", "default", heading.split()[0].lower()), rows, safe=True)
    return f"<section><h2>{heading}</h2>{table}{command}</section>"


def _knobs(report: Report) -> str:
    objective = report.problem.objective
    pictures = []
    for axis in report.problem.lattice.axes:
        marks = [
            charts.Mark(
                x=axis.rank(t.values[axis.knob.name]), y=t.score.value, feasible=t.score.feasible, title=_describe(t)
            )
            for t in report.trials
            if t.values[axis.knob.name] in axis.levels
        ]
        names = [_show(level) for level in axis.levels]
        pictures.append(charts.scatter(marks, names, objective.metric, axis.knob.name))
    return f'<section><h2>Knob by knob</h2><div class="pair">{"".join(pictures)}</div></section>' if pictures else ""


def _trials(report: Report) -> str:
    names = [axis.knob.name for axis in report.problem.lattice.axes]
    bounds = report.problem.bounds
    header = ["#", "", *names, report.problem.objective.metric, *(f"{bound}, ms" for bound in bounds)]
    top = report.best
    rows = []
    for t in report.trials:
        row = [str(t.number), t.kind, *(_show(t.values[name]) for name in names)]
        row.append(_number(t.score.value) if t.score.failure is None else "failed")
        row += [_kept(t, str(bound), bound.name) for bound in bounds]
        rows.append(row)
    marked = {i for i, t in enumerate(report.trials) if top is not None and t.number == top.number}
    faded = {i for i, t in enumerate(report.trials) if not t.score.feasible}
    note = "<p>In brackets each promise's margin: how far it was kept (−) or broken (+), relative to the limit.</p>"
    failures = "".join(
        f"<li>trial {t.number}: {escape(t.score.failure)}</li>" for t in report.trials if t.score.failure is not None
    )
    table = _table(header, rows, marked=marked, faded=faded)
    return (
        f'<section><h2>Trials</h2>{note if bounds else ""}<div class="scroll">{table}</div>'
        f"{f'<p>Failed:</p><ul>{failures}</ul>' if failures else ''}</section>"
    )


def _kept(trial: Trial, bound: str, metric: str) -> str:
    if trial.score.failure is not None:
        return "–"
    seen = f"{_number(1e3 * trial.metrics[metric])} " if metric in trial.metrics else ""
    return f"{seen}({_margin(trial.score.margins[bound])})"


def _setting(report: Report) -> str:
    problem = report.problem
    slo = ", ".join(map(str, problem.bounds)) or "none"
    rows = [
        ["study", report.study],
        ["objective", f"{problem.objective} ({problem.objective.unit})"],
        ["SLO, every bound hard", slo],
        ["workload of a window", problem.workload],
        ["known constraints", "; ".join(map(str, problem.lattice.constraints)) or "none"],
        ["fixed knobs", ", ".join(f"{k}={_show(v)}" for k, v in problem.lattice.fixed.items()) or "none"],
        ["sampler", f"{report.strategy.sampler}, after the default and {report.strategy.starts} spread points; "
                    f"seed {report.strategy.seed}"],
        *([["for flyball plan", report.profile.sentence]] if report.profile else []),
    ]  # fmt: skip
    return f"<section><h2>What was asked</h2>{_table(None, rows)}</section>"


def _table(
    header: Sequence[str] | None,
    rows: Iterable[Sequence[str]],
    *,
    safe: bool = False,
    marked: Iterable[int] = (),
    faded: Iterable[int] = (),
) -> str:
    """A table; cells are escaped unless they are `safe` already."""
    plain = (lambda text: text) if safe else escape
    head = f"<thead><tr>{''.join(f'<th>{escape(h)}</th>' for h in header)}</tr></thead>" if header else ""
    classes = dict.fromkeys(faded, "faded") | dict.fromkeys(marked, "marked")
    body = "".join(
        f'<tr class="{classes.get(i, "")}">{"".join(f"<td>{plain(cell)}</td>" for cell in row)}</tr>'
        for i, row in enumerate(rows)
    )
    return f'<table class="{"data" if header else "facts"}">{head}<tbody>{body}</tbody></table>'


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _margin(margin: float) -> str:
    return f"{'+' if margin > 0 else '−'}{abs(margin):.0%}"


def _show(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


_STYLE = """
:root{color-scheme:light dark;--ink:#1b2530;--soft:#5b6875;--line:#dfe4e9;--paper:#fff;--card:#f6f8fa;
--accent:#0b7285;--warn:#c2410c;--was:#8a97a5;--good:#e6f4ee;--good-ink:#0f5132;--bad:#fdeee6;--bad-ink:#8a2c0a}
@media(prefers-color-scheme:dark){:root{--ink:#e4e9ee;--soft:#9aa7b4;--line:#2c3640;--paper:#12181e;--card:#1a222a;
--accent:#4dc3d6;--warn:#ff9466;--was:#76838f;--good:#143226;--good-ink:#9fe0bf;--bad:#3a2015;--bad-ink:#ffc4a6}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:920px;margin:0 auto;padding:40px 24px 60px}
h1{font-size:30px;line-height:1.2;margin:4px 0 16px;letter-spacing:-.01em}
h2{font-size:18px;margin:0 0 10px}section{margin-top:40px}p{margin:0 0 12px}
.eyebrow{color:var(--soft);font-size:13px;margin:0}
.verdict{padding:12px 16px;border-radius:8px;background:var(--card);border-left:4px solid var(--was)}
.verdict.good{background:var(--good);color:var(--good-ink);border-color:currentColor}
.verdict.bad{background:var(--bad);color:var(--bad-ink);border-color:currentColor}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-top:20px}
.tile{background:var(--card);border-radius:8px;padding:12px 14px}
.tile span,.tile small{display:block;color:var(--soft);font-size:12.5px;line-height:1.4}
.tile b{display:block;font-size:23px;font-weight:600;font-variant-numeric:tabular-nums;white-space:nowrap}
svg{display:block;width:100%;height:auto;font-size:12px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(340px,1fr));gap:16px}
.grid{stroke:var(--line)}.base{stroke:var(--was)}.tick{fill:var(--soft);font-variant-numeric:tabular-nums}
.axis{fill:var(--soft)}.best{fill:none;stroke:var(--accent);stroke-width:2}
.default{stroke:var(--was);stroke-width:1.5;stroke-dasharray:5 4}.default-label{fill:var(--soft)}
.feasible{fill:var(--accent);stroke:var(--paper);stroke-width:1.5}.was{fill:var(--was);stroke:var(--paper)}
.bar{fill:var(--accent)}.through{fill:none;stroke:var(--accent);stroke-width:2}
.through.broken{stroke:var(--warn);stroke-dasharray:4 4}
.infeasible path{fill:none;stroke:var(--warn);stroke-width:2}
.infeasible .hit{stroke:var(--paper);stroke-width:5}.join{stroke:var(--line);stroke-width:3}
.legend{color:var(--soft);font-size:13px;display:flex;flex-wrap:wrap;gap:6px 8px;align-items:center}
.legend i{font-style:normal;display:inline-block;margin-left:14px}.legend i:first-child{margin-left:0}
i.dot{width:10px;height:10px;border-radius:5px;background:var(--accent)}i.dot.was{background:var(--was)}
i.cross{color:var(--warn);font-weight:700;font-size:17px;line-height:1}
i.line,i.dash{width:22px;border-top:2px solid var(--accent)}i.dash{border-top:2px dashed var(--was)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;margin-top:12px;font-size:14px}
th,td{text-align:right;padding:6px 10px;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--soft);font-weight:500;font-size:12.5px}th:first-child,td:first-child{text-align:left}
.facts td{text-align:left;white-space:normal;vertical-align:top}.facts td:first-child{color:var(--soft);width:190px}
.scroll{overflow-x:auto}.faded td{color:var(--soft)}.marked td{background:var(--good);color:var(--good-ink)}
pre{background:var(--card);padding:12px 14px;border-radius:8px;white-space:pre-wrap;overflow-wrap:anywhere;
font:13px/1.5 ui-monospace,"DejaVu Sans Mono",monospace}footer{margin-top:48px;color:var(--soft);font-size:13px}
@media print{main{max-width:none;padding:0}section{break-inside:avoid}}
""".replace("\n", "")
