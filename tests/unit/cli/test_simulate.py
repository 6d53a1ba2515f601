"""`flyball simulate` as a shell sees it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flyball.cli import main

Shell = Callable[..., tuple[int, str, str]]
SHORT = ("--trace", "azure-conv", "--duration", "120")


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    """Runs `flyball simulate`; gives its exit code, output and complaints."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flyball", "simulate", *words])
        with pytest.raises(SystemExit) as exit_:
            main()
        said = capsys.readouterr()
        return int(exit_.value.code or 0), said.out, said.err

    return run


def test_a_fixed_count_costs_what_it_must(simulate: Shell, tmp_path: Path) -> None:
    """Three replicas for two minutes are a tenth of a GPU-hour, at their price; the time-line is drawn."""
    picture = tmp_path / "run.svg"
    code, out, _ = simulate(
        *SHORT, "--controller", "fixed:3", "--price", "4", "--format", "json", "--picture", str(picture)
    )
    said = json.loads(out)
    assert code == 0
    assert said["gpu_hours"] == pytest.approx(0.1, rel=0.02)
    assert said["cost"] == pytest.approx(4 * said["gpu_hours"])
    assert said["attainment"] > 0.98
    assert said["actions"] == 0
    assert picture.read_text(encoding="utf-8").startswith("<svg")


def test_controllers_are_known_by_name(simulate: Shell) -> None:
    """Ours and the field's rules, alone and together, run on the same load; the table names what counts."""
    for name in ("flyball", "hpa", "saturation-v2+hpa"):
        code, out, _ = simulate(*SHORT, "--controller", name)
        assert code == 0
        assert all(word in out for word in (name, "SLO attainment", "GPU-hours", "cost", "scale actions"))


def test_a_process_is_settled_by_its_seed(simulate: Shell) -> None:
    """Poisson arrivals with the trace's lengths: one seed, one answer."""
    words = ("--rate", "5", "--duration", "60", "--detail", "requests", "--format", "json")
    assert simulate(*words, "--seed", "1") == simulate(*words, "--seed", "1")
    assert simulate(*words, "--seed", "1") != simulate(*words, "--seed", "2")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--controller", "magic"), "unknown analyzer 'magic'"),
        (("--controller", "fixed:some"), "write fixed:2"),
        (("--rate", "3"), "give --duration"),
        (("--slo", "p99_itl<20ms"), "promise the mean gap"),
        (("--speed", "0"), "above 0"),
        (("--trace", "nowhere.csv"), "there is no trace file"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(simulate: Shell, words: tuple[str, ...], complaint: str) -> None:
    """What was given, what is needed; exit code 2."""
    code, _, err = simulate(*words)
    assert code == 2
    assert complaint in err
    assert len(err.strip().splitlines()) == 1
