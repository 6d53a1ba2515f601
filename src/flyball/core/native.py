"""Build a C++ file of ours with the machine's own compiler, once, and keep it by source, flags and processor."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from flyball.core.errors import FlyballError

BUILD_TIMEOUT_S = 300


class NativeUnavailable(FlyballError):
    """A compiled part cannot be used here; the message says why."""


def cache_folder() -> Path:
    """Where built libraries are kept: the user's cache."""
    return Path.home() / ".cache" / "flyball"


def load_library(
    source: Path, *, flags: Sequence[str], includes: Sequence[Path] = (), processor: str = ""
) -> ctypes.CDLL:
    """The shared library of a C++ file, built first if need be; raises NativeUnavailable with the reason.

    `includes` are the files of ours that it takes in; `processor` tells machines apart whose libraries differ, where
    the flags say `-march=native`.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NativeUnavailable("no C++ compiler was found; install g++")
    command = [compiler, "-std=c++17", "-shared", "-fPIC", *flags]
    texts = [path.read_text("utf-8") for path in (source, *includes)]
    key = hashlib.blake2b("\0".join([*texts, *command, processor]).encode(), digest_size=8)
    library = cache_folder() / f"{source.stem}-{key.hexdigest()}.so"
    if not library.exists():
        _build(command, source, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise NativeUnavailable(f"the library of {source.name} cannot be loaded: {error}") from error


def _build(command: Sequence[str], source: Path, library: Path) -> None:
    """Compile beside the target and rename, so that a killed or a parallel build leaves no half a library."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / "made.so"
            full = [*command, "-o", str(made), str(source)]
            done = subprocess.run(full, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
            if done.returncode != 0:
                first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
                raise NativeUnavailable(f"{Path(command[0]).name} could not build {source.name}: {first}")
            os.replace(made, library)  # noqa: PTH105  # atomic within one folder
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{source.name} could not be built: {error}") from error
