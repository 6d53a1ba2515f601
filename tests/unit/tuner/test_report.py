"""The report."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from flyball.tuner.charts import Mark, convergence, pairs, scatter, ticks
from flyball.tuner.compare import compare, verdict
from flyball.tuner.proposers import Strategy
from flyball.tuner.report import Report, apply_command, as_json, html
from flyball.tuner.study import Problem
from helpers.simulated_engine import SimulatedEngine, poisson
from helpers.studies import problem, rig, study

URL = "http://127.0.0.1:8000"


def report_of(path: Path, engine: SimulatedEngine, problem_: Problem, trials: int = 8, compared: bool = True) -> Report:
    """A study on the simulated engine, reported."""
    why, found = study(path, engine, trials=trials, problem_=problem_)
    seen = compare(problem_, rig(engine), found, [poisson(seed=s) for s in (1, 2, 3)]) if compared else None
    return Report(
        study="s", problem=problem_, strategy=Strategy(), trials=tuple(found), comparison=seen,
        verdict=verdict(found, problem_, seen), stopped=why, written="2026-11-21 12:00",
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A study whose default misses the SLO, with a crashing corner."""
    engine = SimulatedEngine(crash=lambda v: int(v["max_num_batched_tokens"]) < 32)
    return report_of(tmp_path_factory.mktemp("report") / "s.db", engine, problem(engine), trials=10)


class Checker(HTMLParser):
    """Collects what the page refers to, and whether its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.refers: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the tag, and whatever it refers to."""
        self.tags.append(tag)
        self.refers += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """The tag opened last must be the one that closes."""
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag that closes itself."""
        self.tags.append(tag)


def test_the_page_stands_alone(report: Report) -> None:
    """Well formed, and nothing in it is fetched from anywhere or runs."""
    page = html(report, URL)
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.refers == []
    assert not {"script", "link", "iframe", "img", "object"} & set(checker.tags)
    assert "url(" not in page
    assert "@import" not in page


def test_the_page_says_what_was_asked_and_found(report: Report) -> None:
    """Verdict, workload, promises, every trial, the interval and the command to apply are there."""
    page = html(report, URL)
    for text in (report.verdict.sentence, report.problem.workload, "p95_ttft&lt;=1.5s", "Student's t", "/v1/config"):
        assert text in page or text.replace("'", "&#x27;") in page, text
    assert page.count('<circle class="feasible"') >= 1
    assert len(re.findall(r"<tr[^>]*><td>\d+</td><td>(?:default|start|search)", page)) == len(report.trials)


def test_the_json_holds_the_same(report: Report) -> None:
    """It is valid JSON without NaN or infinity, and its gain is the comparison's."""
    body = json.loads(json.dumps(as_json(report, URL), allow_nan=False))
    assert body["schema"] == "flyball.tune/1"
    assert len(body["trials"]) == len(report.trials)
    assert report.comparison is not None
    assert body["comparison"]["gain"][1] == pytest.approx(report.comparison.gain.mean)
    assert body["recommended"] == dict(report.comparison.challenger.values)
    assert body["apply"] == apply_command(body["recommended"], URL)
    assert body["problem"]["slo"] == ["p95_ttft<=1.5s", "p99_itl<=60ms"]


def test_the_best_so_far_never_falls(report: Report) -> None:
    """The line of the convergence curve is monotone over the trials that kept the promises."""
    line = [value for value in report.best_so_far() if value is not None]
    assert line == sorted(line)


def test_a_study_without_a_winner_has_a_page_too(tmp_path: Path) -> None:
    """Promises that nothing keeps: the closest configuration is shown and nothing is recommended."""
    engine = SimulatedEngine(token_s=0.01)
    found = report_of(tmp_path / "s.db", engine, problem(engine), trials=3, compared=False)
    assert found.verdict.outcome == "infeasible"
    page = html(found, URL)
    assert "No configuration keeps the SLO" in page
    assert "Closest configuration" in page
    assert "curl" not in page
    assert as_json(found, URL)["recommended"] is None


def test_words_of_others_cannot_break_the_page(report: Report) -> None:
    """A model or workload named in markup is shown, not obeyed."""
    from dataclasses import replace

    nasty = replace(report, problem=replace(report.problem, service="<script>alert(1)</script>", workload='a"b<i>'))
    page = html(nasty, URL)
    assert "<script" not in page
    assert "<i>" not in page.split("What was asked")[1]


def test_pictures_bear_odd_numbers() -> None:
    """No best yet, equal values, infinities of failed trials: a picture all the same."""
    marks = [Mark(x=0, y=float("inf"), feasible=False, title="t"), Mark(x=1, y=2.0, feasible=True, title="t")]
    for picture in (
        convergence(marks, [None, None], None, "p95_ttft"),
        scatter(marks, ["1", "2"], "y", "x"),
        pairs([(2.0, 2.0), (2.0, 2.0)], "goodput"),
    ):
        assert "nan" not in picture
        assert "inf" not in picture.replace("infeasible", "")


@pytest.mark.parametrize(("low", "high"), [(0, 13.4), (0.001, 0.0123), (95, 105), (-3, 7), (2, 2)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    """Between one and twelve ticks, none outside the axis."""
    found = ticks(low, high)
    assert 1 <= len(found) <= 12
    assert min(found) >= low - 1e-9
    assert max(found) <= high + 1e-9
