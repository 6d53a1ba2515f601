"""The wheel as its users get it: built, installed alone, and honest about what is not installed."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import typer

from flyball import cli

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("wheel")]

ROOT = Path(__file__).parents[2]
FLEET = str(ROOT / "tests" / "data" / "inferno" / "small")
# A way to call each command that would go ahead if its part were there, and the extra it then asks for.
LACKING = {
    "bench": ([], "tune"),
    "compat": (["inferno"], "plan"),
    "config": (["explain"], "engine"),
    "control": ([FLEET, "--prometheus", "http://127.0.0.1:9"], "plan"),
    "demo": ([], "engine"),
    "fit": (["window.json"], "plan"),
    "hold": (["--slo", "p95_ttft<500ms"], "tune"),
    "operator": ([], "cluster"),
    "plan": ([FLEET, "--limited"], "plan"),
    "quantize": (["model", "--out", "smaller"], "engine"),
    "serve": ([], "engine"),
    "simulate": ([], "plan"),
    "train-tiny": (["book.txt", "--out", "model"], "engine"),
    "tune": (["--slo", "p95_ttft<500ms"], "tune"),
}
PLAIN = {  # what works without any extra
    "engines": ["list"],
    "plan": [FLEET, "--unlimited"],
}

cli._register()


def _run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def _must(*command: str | Path, cwd: Path) -> str:
    done = _run(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip builds from this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    _must(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    return next(folder.glob("flyball-*.whl"))


@pytest.fixture(scope="module")
def bin_(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a clean environment that holds the wheel and what it depends on, no extra."""
    folder = tmp_path_factory.mktemp("clean")
    _must(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    _must(folder / "venv/bin/python", "-m", "pip", "install", wheel, cwd=folder)
    return folder / "venv/bin"


def test_the_wheel_holds_the_package_whole(wheel: Path) -> None:
    """Every file of the package is in the wheel, its data and the typing marker included, and nothing beside it."""
    package = ROOT / "src" / "flyball"
    source = {p.relative_to(ROOT / "src").as_posix() for p in package.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == source
    assert "flyball/py.typed" in packed


def test_help_answers_without_extras(bin_: Path, tmp_path: Path, record_property: pytest.RecordProperty) -> None:
    """`flyball --help` works with the base dependencies alone; how fast is printed after the run, not judged."""
    walls, cpus = [], []
    for _ in range(6):  # the first run compiles
        before = os.times()
        shown = _must(bin_ / "flyball", "--help", cwd=tmp_path)
        after = os.times()
        walls.append(after.elapsed - before.elapsed)
        cpus.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert "governor" in shown
    wall, cpu = statistics.median(walls[1:]), statistics.median(cpus[1:])
    record_property("flyball --help without extras, median of 5", f"{wall:.2f} s ({cpu:.2f} s of CPU)")


def test_every_command_is_tried() -> None:
    """The two tables above name every command, so that a new one cannot be forgotten."""
    assert LACKING.keys() | PLAIN.keys() == typer.main.get_command(cli.app).commands.keys()


@pytest.mark.parametrize("name", LACKING)
def test_a_lacking_extra_is_named(bin_: Path, tmp_path: Path, name: str) -> None:
    """A command whose part is not installed says which extra to install, in one sentence, and ends in 2."""
    arguments, extra = LACKING[name]
    done = _run(bin_ / "flyball", name, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"pip install 'flyball[{extra}]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", PLAIN)
def test_a_command_without_needs_runs(bin_: Path, tmp_path: Path, name: str) -> None:
    """A command that needs no extra does its work in the clean environment."""
    assert _must(bin_ / "flyball", name, *PLAIN[name], cwd=tmp_path)
