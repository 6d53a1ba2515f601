"""Memory for packed weights, on huge pages where the system grants them.

A decode step reads every weight once. On pages of 4 KiB that is a page walk for every 64 cache lines, and under a
hypervisor a walk is long; on pages of 2 MiB it is one for 32 768.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

PAGE = 2 << 20
SLAB = 64 << 20
LINE = 64


class Arena:
    """Hands out tensors from slabs; what of a slab was never written takes no memory."""

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        """A tensor of `count` elements, on a cache line's border; it keeps its slab alive."""
        size = count * dtype.itemsize
        if self._used + size > self._slab.numel():
            self._slab, self._used = _slab(max(SLAB, size)), 0
        part = self._slab[self._used : self._used + size]
        self._used += -(-size // LINE) * LINE
        return part.view(dtype)


def _slab(size: int) -> Tensor:
    memory = mmap.mmap(-1, size + PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[-whole.data_ptr() % PAGE :][:size]
