"""`flyball train-tiny` from the shell's side."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flyball.cli import main


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["{tmp}/absent.txt", "--out", "{tmp}/out"], "absent.txt as text"),
        (["{tmp}/absent.txt", "--out", "{tmp}"], "name a new folder"),
        (["{tmp}/absent.txt", "--out", "{tmp}/out", "--preset", "huge"], "unknown preset 'huge'; use one of demo, ci"),
    ],
    ids=["missing text", "folder in use", "unknown preset"],
)
def test_a_mistake_ends_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    args: list[str],
    sentence: str,
) -> None:
    """A wrong argument is answered with exit code 2 and its sentence, without a traceback, and nothing is written."""
    (tmp_path / "something").touch()
    monkeypatch.setattr(
        sys, "argv", ["flyball", "train-tiny", "--threads", "1", *(arg.format(tmp=tmp_path) for arg in args)]
    )
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert "flyball: " in printed.err
    assert sentence in printed.err
    assert "Traceback" not in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["something"]
