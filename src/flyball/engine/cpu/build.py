"""Build the kernels with the machine's own compiler, once, and keep them by source, flags and processor."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from flyball.core.errors import FlyballError

SOURCE = Path(__file__).with_name("quantized.cpp")  # which takes in the others
HEADERS = (SOURCE.with_name("kernels.cpp"), SOURCE.with_name("team.hpp"))
FLAGS = ("-O3", "-march=native", "-std=c++17", "-pthread", "-shared", "-fPIC")
NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni")
BUILD_TIMEOUT_S = 300


class KernelsUnavailable(FlyballError):
    """The compiled kernels cannot be used here; the message says why."""


def cache_folder() -> Path:
    """Where built kernels are kept: the user's cache."""
    return Path.home() / ".cache" / "flyball"


def processor_flags() -> str:
    """The processor's feature flags as Linux lists them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("flags")), "")


@cache
def load_kernels() -> ctypes.CDLL:
    """The kernels as a loaded library, built first if need be; raises KernelsUnavailable with the reason."""
    flags = processor_flags()
    missing = [name for name in NEEDED if name not in flags.split()]
    if missing:
        raise KernelsUnavailable(f"the processor lacks {', '.join(missing)}")
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise KernelsUnavailable("no C++ compiler was found; install g++")
    texts = [path.read_text() for path in (SOURCE, *HEADERS)]
    key = hashlib.blake2b("\0".join([*texts, compiler, *FLAGS, flags]).encode(), digest_size=8).hexdigest()
    library = cache_folder() / f"kernels-{key}.so"
    if not library.exists():
        _build(compiler, library)
    return _declared(ctypes.CDLL(str(library)))


def _build(compiler: str, library: Path) -> None:
    """Compile beside the target and rename, so that a killed or a parallel build leaves no half a library."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / "kernels.so"
            command = [compiler, *FLAGS, "-o", str(made), str(SOURCE)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
            if done.returncode != 0:
                first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
                raise KernelsUnavailable(f"{Path(compiler).name} could not build the kernels: {first}")
            os.replace(made, library)  # noqa: PTH105  # atomic within one folder
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailable(f"the kernels could not be built: {error}") from error


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.fb_packed_elements.argtypes = [integer, integer]
    library.fb_packed_elements.restype = integer
    library.fb_pack.argtypes = [pointer, integer, integer, ctypes.c_int, pointer, integer]
    library.fb_pack.restype = None
    library.fb_linear.argtypes = [pointer, integer, integer, pointer, integer, pointer, integer]
    library.fb_linear.restype = None
    library.fb_scratch_bytes.argtypes = [pointer, integer, integer, integer]
    library.fb_scratch_bytes.restype = integer
    library.fb_forward.argtypes = [pointer, pointer]
    library.fb_forward.restype = None
    library.fq_code_bytes.argtypes = [integer, integer, integer]
    library.fq_code_bytes.restype = integer
    library.fq_pack.argtypes = [integer, pointer, pointer, integer, integer, integer, ctypes.c_int, *[pointer] * 3]
    library.fq_pack.restype = None
    library.fq_linear.argtypes = [pointer, integer, integer, pointer, integer, pointer, integer]
    library.fq_linear.restype = None
    library.fq_forward.argtypes = [pointer, pointer]
    library.fq_forward.restype = None
    library.fb_drain.argtypes = []
    library.fb_drain.restype = None
    return library
