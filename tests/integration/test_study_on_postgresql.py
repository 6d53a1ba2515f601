"""A study on a real PostgreSQL server: the same as in a file, and for several processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flyball.core.errors import InvalidInput
from flyball.tuner.proposers import Strategy
from flyball.tuner.study import Progress, history, latest, opened, run, storage_url
from flyball.tuner.trials import Trial
from helpers import postgresql
from helpers.simulated_engine import SimulatedEngine
from helpers.studies import problem, rig

pytest.importorskip("psycopg", reason="psycopg is not installed; pip install 'flyball[postgres]'")
PROGRAMS = postgresql.binaries()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(PROGRAMS is None, reason="no PostgreSQL server is installed; apt-get install postgresql"),
]
QUICK = Strategy(sampler="random")
# Another process: opens the study beside us and makes its share of the trials.
BESIDE = """
import sys
from flyball.tuner.proposers import Strategy
from flyball.tuner.study import opened, run
from helpers.simulated_engine import SimulatedEngine
from helpers.studies import problem, rig
engine = SimulatedEngine()
asked = problem(engine)
with opened(sys.argv[1], "shared", asked, resume=True, alone=False) as study:
    run(study, asked, rig(engine), Strategy(sampler="random"), trials=8)
print(len(engine.windows))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[postgresql.Server]:
    """One for all tests; each has a study of its own."""
    assert PROGRAMS is not None
    with postgresql.running(PROGRAMS) as server:
        yield server


def trials_of(storage: str, name: str, stops: tuple[int, ...]) -> list[Trial]:
    """A study that is reopened at each stop."""
    engine = SimulatedEngine()
    asked = problem(engine)
    for i, stop in enumerate(stops):
        with opened(storage_url(storage), name, asked, resume=i > 0) as study:
            run(study, asked, rig(engine), QUICK, trials=stop)
            found = history(study)
    return found


def test_a_study_is_the_same_as_in_a_file(server: postgresql.Server, tmp_path: Path) -> None:
    """Stopped after three trials and resumed, it equals one that ran through in SQLite, and is the latest there."""
    found = trials_of(server.url, "resumed", (3, 6))
    assert found == trials_of(str(tmp_path / "study.db"), "whole", (6,))
    assert latest(storage_url(server.url)) == "resumed"
    with (
        pytest.raises(InvalidInput, match="exists already with 6 finished trials"),
        opened(storage_url(server.url), "resumed", problem(SimulatedEngine())),
    ):
        pass


def test_two_processes_share_a_study(server: postgresql.Server) -> None:
    """Together they make eight trials, none twice."""
    engine = SimulatedEngine()
    asked = problem(engine)
    url = storage_url(server.url)
    with opened(url, "shared", asked, alone=False) as study:
        run(study, asked, rig(engine), QUICK, trials=1)
        other = subprocess.Popen(
            [sys.executable, "-c", BESIDE, url], stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": "tests"}
        )
        run(study, asked, rig(engine), QUICK, trials=8)
        theirs, _ = other.communicate()
        found = history(study)
    assert other.returncode == 0
    assert len(found) == 8 == len(engine.windows) + int(theirs)
    assert len({str(trial.values) for trial in found}) == 8


def test_a_server_that_dies_ends_the_study_with_one_sentence(tmp_path: Path) -> None:
    """What was finished is safe with the server; the sentence says how to go on."""
    assert PROGRAMS is not None
    engine = SimulatedEngine()
    asked = problem(engine)
    with postgresql.running(PROGRAMS) as mortal:

        def die_in_the_third(progress: Progress) -> None:
            if progress.number == 2 and progress.finished is None:
                mortal.stop()

        with (
            pytest.raises(
                InvalidInput, match=r"^the study postgresql.* cannot be read or written: .*go on with --resume$"
            ),
            opened(storage_url(mortal.url), "s", asked) as study,
        ):
            run(study, asked, rig(engine), QUICK, trials=5, watch=die_in_the_third)
    assert len(engine.windows) == 2


def test_an_address_where_no_server_is_is_one_sentence(tmp_path: Path) -> None:
    """Nobody is behind the socket; the password is not said."""
    asked = problem(SimulatedEngine())
    with (
        pytest.raises(InvalidInput, match=r"nobody:\*\*\*@.* cannot be read or written: connection is bad"),
        opened(storage_url(f"postgresql://nobody:secret@/none?host={tmp_path}"), "s", asked),
    ):
        pass
