"""The command line as a whole: help for every command, one sentence for every mistake."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import typer
import typer.testing

from flyball import __version__, cli
from flyball.cli import app, main, require
from flyball.core.errors import MissingExtra

cli._register()
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # the app is a group


def _main(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    """Run the front door as a shell would, and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["flyball", *args])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    """Each command answers --help, opens with a sentence, and says what each of its options means."""
    result = typer.testing.CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0, result.output
    command = COMMANDS[name]
    assert command.help
    mute = [parameter.name for parameter in command.params if not getattr(parameter, "help", None)]
    assert not mute, f"flyball {name}: say what {', '.join(map(str, mute))} means"


def test_help_lists_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`flyball --help` names all there is, and no command twice."""
    assert _main(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    assert len(COMMANDS) == len(app.registered_commands) + len(app.registered_groups)


def test_the_commands_read_as_accepted(snapshot: Callable[[str], None]) -> None:
    """What each command says of itself changes only when somebody means it to."""
    snapshot("".join(f"{name}: {(COMMANDS[name].help or '').splitlines()[0]}\n" for name in sorted(COMMANDS)))


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`flyball --version` prints the package's version and nothing else."""
    assert _main(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"flyball {__version__}\n"


def test_a_missing_extra_is_named() -> None:
    """What is absent is named together with the command that installs it; what is there passes in silence."""
    require("engine", "json")
    with pytest.raises(MissingExtra, match=r"needs no_such_part, .* run: pip install 'flyball\[tune\]'"):
        require("tune", "json", "no_such_part")


@pytest.mark.parametrize("args", [("no-such-command",), ("train-tiny", "--no-such-option"), ("train-tiny",)])
def test_wrong_usage_ends_in_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: tuple[str, ...]
) -> None:
    """A command, an option that does not exist or an argument left out is explained on stderr with exit code 2."""
    assert _main(monkeypatch, *args) == 2
    printed = capsys.readouterr()
    assert "Usage: " in printed.err
    assert not printed.out


def test_an_interrupt_ends_in_130(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends with the exit code that shells expect, and without a traceback."""
    interrupted = typer.Typer()

    @interrupted.command()
    def run() -> None:
        raise KeyboardInterrupt

    assert typer.testing.CliRunner().invoke(interrupted, []).exit_code == 130
