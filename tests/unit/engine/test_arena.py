"""Weights' memory: aligned, apart from each other, and alive as long as its tensors."""

from __future__ import annotations

import torch

from flyball.engine.cpu.arena import LINE, PAGE, SLAB, Arena


def test_tensors_stand_apart_on_cache_lines_and_outlive_the_arena() -> None:
    """Also where one does not fit into the slab that is left, and where it is larger than any slab."""
    arena = Arena()
    tensors = [arena.empty(count, torch.bfloat16) for count in (3, 1000, SLAB // 2, SLAB, 7)]
    del arena
    for i, tensor in enumerate(tensors):
        tensor.fill_(i)
    for i, tensor in enumerate(tensors):
        assert tensor.data_ptr() % LINE == 0
        assert tensor[0] == tensor[-1] == i
    assert tensors[0].data_ptr() % PAGE == 0
