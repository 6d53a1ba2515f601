"""The engine's kernels for processors, built with the machine's own compiler when first used."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from flyball.core.errors import FlyballError
from flyball.core.native import NativeUnavailable, load_library

SOURCE = Path(__file__).with_name("quantized.cpp")  # which takes in the others
HEADERS = (SOURCE.with_name("kernels.cpp"), SOURCE.with_name("team.hpp"))
FLAGS = ("-O3", "-march=native", "-pthread")
NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni")


class KernelsUnavailable(FlyballError):
    """The compiled kernels cannot be used here; the message says why."""


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
    try:
        return _declared(load_library(SOURCE, flags=FLAGS, includes=HEADERS, processor=flags))
    except NativeUnavailable as error:
        raise KernelsUnavailable(str(error)) from error


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
