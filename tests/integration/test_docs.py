"""The pages keep their word: their Python runs, their commands exist, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from flyball import cli

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)

cli._register()
GROUP = typer.main.get_command(cli.app)


def _blocks(*languages: str) -> list[object]:
    return [
        pytest.param(match[2], id=f"{page.relative_to(ROOT).as_posix()}:{text.count(chr(10), 0, match.start()) + 1}")
        for page in PAGES
        for text in [page.read_text(encoding="utf-8")]
        for match in FENCE.finditer(text)
        if match[1] in languages
    ]


@pytest.mark.parametrize("block", _blocks("python"))
def test_python_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader who pastes a Python example sees it run to its end."""
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "<example>", "exec"), {"__name__": "__main__"})


def _check_flyball(words: list[str]) -> None:
    """Walk from the group to the subcommand named, and look each option up there, passing over its value."""
    command, value = GROUP, False
    for word in words:
        if value:
            value = False
        elif word.startswith("-"):
            name, _, given = word.partition("=")
            known = {name: p for p in command.params for name in (*p.opts, *p.secondary_opts)}
            assert name in {*known, "--help"}, f"flyball {command.name} has no option {word}"
            value = name in known and not given and not getattr(known[name], "is_flag", False)
        elif hasattr(command, "commands"):
            assert word in command.commands, f"flyball has no command {word}"
            command = command.commands[word]


@pytest.mark.parametrize("block", _blocks("console", "bash", "sh"))
def test_commands_exist(block: str) -> None:
    """A command that a page shows is one that flyball, or make, knows with these options."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words[:1] == ["flyball"]:
            _check_flyball(words[1:])
        elif words[:1] == ["make"]:
            for word in (w for w in words[1:] if "=" not in w):
                assert re.search(rf"^{word}:", makefile, re.MULTILINE), f"make has no word {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    """A link into the repository names a file that is there."""
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    dead = [target for target in targets if not (page.parent / target).exists()]
    assert not dead, f"{page.name} links to {', '.join(dead)}"
