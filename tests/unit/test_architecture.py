"""The promises of ARCHITECTURE.md that import-linter cannot read."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "flyball"
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
TEXTS = sorted(
    path
    for pattern in (
        "*",
        ".ci/*",
        ".githooks/*",
        *(f"{d}/**/*" for d in ("src", "tests", "benchmarks", "examples", "docs")),
    )
    for path in ROOT.glob(pattern)
    if path.suffix in {"", ".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".jsonl", ".csv", ".out", ".html"}
    and path.is_file()
)
HEAVY = {"torch", "transformers", "optuna", "scipy", "fastapi", "aiohttp", "httpx", "pydantic", "uvicorn"}


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_a_module_opens_with_one_sentence(path: Path) -> None:
    """Whoever opens a module reads first, in one sentence, what it is for."""
    opening = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
    assert re.match(r"[A-Z`].*[.]", opening, re.DOTALL), f"{path} needs an opening docstring sentence"


@pytest.mark.parametrize("path", TESTS, ids=_name)
def test_a_test_opens_with_what_it_proves(path: Path) -> None:
    """Every test says in its docstring what it proves."""
    mute = [
        node.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and not ast.get_docstring(node)
    ]
    assert not mute, f"{path}: say what {', '.join(mute)} proves"


@pytest.mark.parametrize("statement", ["import flyball", "import flyball.cli; flyball.cli._register()"])
def test_importing_is_light(statement: str) -> None:
    """Neither the package nor the command line loads a heavy library before its part is used."""
    code = f"{statement}\nimport sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY & set(loaded)


def test_the_project_stands_alone() -> None:
    """No file names a folder of the machine it was written on: a clone works anywhere."""
    foreign = re.compile(r"(?<![\w.])/(work|opt|root|home)/|shared/(design|data)|\b(engine|tuner|planner|fleet)\.md\b")
    found = [
        f"{_name(path)}: {match[0]}"
        for path in TEXTS
        if path != Path(__file__)
        for match in foreign.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found, f"a clone has no such file: {', '.join(found)}"


def test_the_map_shows_every_room() -> None:
    """ARCHITECTURE.md's table names each folder of the package, and no folder that is not there."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    drawn = re.findall(r"^\| `(\w+)/` \|", text, re.MULTILINE)
    assert sorted(drawn) == sorted(p.name for p in PACKAGE.iterdir() if p.is_dir() and any(p.glob("*[!c]")))


def test_only_the_clock_reads_the_time() -> None:
    """Everything but core.clock is handed a clock, so that a test or a simulation owns its time."""
    reading = re.compile(r"\btime\.(time|monotonic|perf_counter)(_ns)?\(|datetime\.(now|utcnow|today)\(")
    found = [_name(p) for p in MODULES if p.name != "clock.py" and reading.search(p.read_text(encoding="utf-8"))]
    assert not found, f"take the clock as an argument (flyball.core.clock) in: {', '.join(found)}"


def test_only_the_command_line_reads_the_environment() -> None:
    """A setting arrives as an argument; nothing but the front door looks for it in the environment."""
    found = [
        _name(p) for p in MODULES if "cli" not in p.parts and re.search(r"os\.(environ|getenv)", p.read_text("utf-8"))
    ]
    assert not found, f"take the setting as an argument in: {', '.join(found)}"


def test_the_glossary_has_one_word_per_idea() -> None:
    """No source, test or page uses a synonym that the glossary bans."""
    rows = re.findall(
        r"^\| \*\*(.+?)\*\* \|.*\| (.*?) \|$", (ROOT / "docs/glossary.md").read_text("utf-8"), re.MULTILINE
    )
    banned = {word.strip(): term for term, words in rows for word in words.split(",") if word.strip()}
    assert banned
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, banned))})s?\b", re.IGNORECASE)
    found = [
        f"{_name(path)}: {match[0]} (say {banned.get(match[1], banned.get(match[1].lower()))})"
        for path in TEXTS
        if path.suffix in {".py", ".md"} and path.name != "glossary.md"
        for match in pattern.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)
