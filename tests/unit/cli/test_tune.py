"""`flyball tune` from the shell's side."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flyball.adapters.profile_files import read_profiles
from flyball.cli import main
from flyball.tuner.study import latest, storage_url
from helpers.tunable_server import SPACE, TunableServer, running

Shell = Callable[..., tuple[int, str, str]]

LOAD = ("--rate", "100", "--requests", "8", "--input-tokens", "4", "--output-tokens", "4", "--settle", "0")
# The default needs at least 4 x 80 ms for an answer and breaks the promise; few sequences keep it with room to spare.
TASK = ("--slo", "p50_e2e<300ms", "--knob", "max_num_batched_tokens=256", "--knob", "max_wait_ms=0",
        "--knob", "prefix_caching=true")  # fmt: skip


@pytest.fixture
def server() -> Iterator[TunableServer]:
    """A server whose default configuration is slow."""
    with running(TunableServer(seqs_s=0.02)) as server:
        yield server


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Shell:
    """Runs `flyball tune` in an empty folder as a shell would: exit code, output, errors."""

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["flyball", "tune", *args])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return run


@pytest.mark.slow
def test_a_tune_searches_compares_reports_and_restores(server: TunableServer, shell: Shell, tmp_path: Path) -> None:
    """Default first, best and verdict printed, page and JSON written, the configuration found at the start put back."""
    server.values["max_num_seqs"] = 48
    code, out, err = shell("--url", server.url, *LOAD, *TASK, "--trials", "6", "--repeats", "2",
                           "--accelerator", "bench-box")  # fmt: skip
    assert code == 0
    assert server.applied[0] == SPACE.defaults()
    assert server.values == SPACE.defaults() | {"max_num_seqs": 48}
    assert "in force: the configuration found at the start" in err
    assert "6/6" in err
    assert "max_num_seqs" in out
    body = json.loads((tmp_path / "flyball-report.json").read_text())
    assert [t["kind"] for t in body["trials"]] == ["default", *["start"] * 4, "search"]
    assert body["verdict"] in out.replace("\n", " ")
    assert body["recommended"]["max_num_seqs"] <= 32
    assert (tmp_path / "flyball-report.html").read_text().startswith("<!doctype html>")
    (profile,) = read_profiles(tmp_path / "flyball-report-profile.json")
    assert profile.accelerator == "bench-box"
    assert profile.max_batch == body["recommended"]["max_num_seqs"] == body["profile"]["law"]["max_batch"]
    assert f"{body['profile']['sentence']}; flyball-report-profile.json is for flyball plan --profile" in out


@pytest.mark.slow
def test_a_study_begins_with_what_an_earlier_one_found(server: TunableServer, shell: Shell) -> None:
    """Its best comes right after the default; a study that is not there is named and nothing is begun."""
    task = ("--url", server.url, *LOAD, *TASK, "--repeats", "0", "--sampler", "random")
    assert shell(*task, "--trials", "4", "--name", "first")[0] == 0
    code, _, err = shell(*task, "--trials", "2", "--name", "second", "--warm-start", "flyball-study.db#first")
    assert code == 0
    assert "warm start: 4 trials of first are told to the sampler" in err
    assert server.applied[-2] in server.applied[1:4]  # the last puts back what was found
    code, _, err = shell(*task, "--trials", "2", "--name", "third", "--warm-start", "zeroth")
    assert code == 2
    assert "holds no finished trial of a study 'zeroth'; it knows first, second" in err


@pytest.mark.slow
def test_the_best_is_left_in_force_on_request(server: TunableServer, shell: Shell, tmp_path: Path) -> None:
    """--apply sets what the report recommends."""
    code, _, err = shell("--url", server.url, *LOAD, *TASK, "--trials", "5", "--repeats", "2", "--apply")
    assert code == 0
    body = json.loads((tmp_path / "flyball-report.json").read_text())
    assert body["outcome"] in ("gain", "keeps the SLO")
    assert "in force: the best configuration" in err
    assert body["recommended"].items() <= server.values.items()


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_tune_restores_and_resumes(
    server: TunableServer, shell: Shell, tmp_path: Path, ending: signal.Signals
) -> None:
    """Ctrl-C or SIGTERM in the third trial puts the configuration back; --resume goes on with the two finished ones."""
    patches: list[int] = []
    view = server._view

    def interrupt_in_the_third() -> dict[str, object]:
        if len(server.applied) == 3 and not patches:
            patches.append(1)
            signal.raise_signal(ending)
        return view()

    server._view = interrupt_in_the_third  # type: ignore[method-assign]
    code, _, err = shell("--url", server.url, *LOAD, *TASK, "--trials", "5", "--repeats", "0")
    assert code == 130
    assert server.values == SPACE.defaults()
    assert "in force: the configuration found at the start" in err
    third = server.applied[2]
    code, _, err = shell("--url", server.url, *LOAD, *TASK, "--trials", "4", "--repeats", "0", "--resume")
    assert code == 0
    assert "going on after 2 finished trials" in err
    assert server.applied[4] == third  # after the restoration, the trial that was lost
    body = json.loads((tmp_path / "flyball-report.json").read_text())
    assert [t["number"] for t in body["trials"]] == [0, 1, 3, 4]
    assert body["study"] == latest(storage_url("flyball-study.db"))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("vllm",), "vllm needs a model to serve; give its folder with --model"),
        (("--apply",), "--apply needs --url"),
        (("--url", "http://127.0.0.1:9"), "no server answers at http://127.0.0.1:9"),
        (("--slo", "fast"), "cannot read the SLO 'fast'"),
        (("--maximize", "speed"), "unknown objective 'speed'"),
        (("--maximize", "goodput", "--minimize", "goodput"), "not both"),
        (("--knob", "max_num_seqs"), "write NAME=LOW..HIGH"),
        (("--sampler", "grid"), "unknown sampler 'grid'; use flyball, tpe, gp, random, or the class"),
        (("--feasibility", "svm"), "unknown model of hidden constraints 'svm'; use one of gp, forest, none"),
        (("--windows", "2", "--tolerance", "0"), "give at least one window and limits above 0"),
        (("--parallel", "2", "--url", "http://127.0.0.1:9"), "leave --url out: tune then starts them"),
        (("--repeats", "1"), "one pair of windows gives no interval"),
        (("--study", "no/such/folder/s.db"), "no folder no/such/folder for the study s.db"),
        (("--report", "no/such/folder/r.html"), "no/such/folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_sentence(shell: Shell, args: tuple[str, ...], said: str) -> None:
    """Exit code 2, one sentence on stderr, nothing started."""
    code, _, err = shell(*args)
    assert code == 2
    assert said in err
    assert err.strip().splitlines()[-1].startswith("flyball: ")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--knob", "speed=1..2"), "unknown knob 'speed'; known knobs: max_num_seqs"),
        (("--knob", "max_num_seqs=1..100"), "max_num_seqs=100 is out of bounds"),
        (("--constraint", "max_num_seqs < 10"), "the default configuration breaks max_num_seqs < 10"),
        (("--constraint", "seqs < 10"), "names seqs; known knobs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_about_the_engine_changes_nothing(
    server: TunableServer, shell: Shell, args: tuple[str, ...], said: str
) -> None:
    """The sentence names knob and bounds; no knob was touched."""
    code, _, err = shell("--url", server.url, *LOAD, *args)
    assert code == 2
    assert said in err
    assert server.applied == []


def test_two_tunes_do_not_share_a_study_file(server: TunableServer, shell: Shell, tmp_path: Path) -> None:
    """The second says who holds the file, and touches nothing."""
    import fcntl

    with (tmp_path / ".flyball-study.db.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = shell("--url", server.url, *LOAD)
    assert code == 2
    assert "another flyball tune is writing flyball-study.db" in err
    assert server.applied == []
