"""torch's varlen kernel is handed what its documentation asks for, and is used only where a trial agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flyball.engine.attention import PagedTensors, trial, varlen_trouble
from flyball.engine.bundled import bundled_model_path
from flyball.engine.config import EngineConfig
from flyball.engine.core import EngineCore
from flyball.engine.request import SamplingParams

KERNEL = "torch.nn.attention.varlen.varlen_attn"


def documented(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: None, max_q: int, max_k: int,
    *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool, seqused_k: Tensor, block_table: Tensor,
    num_splits: int,
) -> Tensor:  # fmt: skip
    """What torch's documentation says that its CUDA kernel computes, request by request."""
    assert cu_seq_q.dtype == seqused_k.dtype == block_table.dtype == torch.int32
    assert (window_size[1], num_splits) == (0, 1)
    out = torch.empty_like(query)
    for i, length in enumerate(seqused_k.tolist()):
        here = slice(*cu_seq_q[i : i + 2].tolist())
        count = here.stop - here.start
        assert count <= max_q
        assert length <= max_k
        k, v = (t[block_table[i].long()].flatten(0, 1)[:length].transpose(0, 1) for t in (key, value))
        places, queries = torch.arange(length)[None, :], torch.arange(length - count, length)[:, None]
        mask = places <= queries
        if window_size[0] >= 0:
            mask &= places >= queries - window_size[0]
        rows = query[here].transpose(0, 1)
        out[here] = F.scaled_dot_product_attention(
            rows, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
        ).transpose(0, 1)
    return out


def test_the_trial_accepts_the_documented_kernel_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that ignores the window, or that fails, is found out, and the cache is left zeroed."""
    cache = PagedTensors(1, 4, 16, 2, 32, torch.float32, "cpu")
    monkeypatch.setattr(KERNEL, documented)
    assert trial(cache, 4) is None
    assert not cache.keys[0].any()

    def blind(*args: Any, **named: Any) -> Tensor:
        return documented(*args, **{**named, "window_size": (-1, 0)})

    monkeypatch.setattr(KERNEL, blind)
    assert trial(cache, 4) == "its result differs from what gathering gives"

    def failing(*args: Any, **named: Any) -> Tensor:
        raise RuntimeError("page size 16 is not supported\nand more")

    monkeypatch.setattr(KERNEL, failing)
    assert trial(cache, 4) == "page size 16 is not supported"
    assert varlen_trouble(cache, 4, None) == "it runs on CUDA, not on cpu"


def test_an_engine_on_the_varlen_path_answers_as_on_the_gathered_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunked prefill, decodes and mixed steps give the same tokens whichever way attention is called."""
    path: Path = bundled_model_path()
    prompts = [[5 + i, 9, 200 + 3 * i, 7] * (3 + 5 * i) for i in range(4)]
    answers = []
    for varlen in (False, True):
        core = EngineCore(EngineConfig(model=path, dtype="float32", num_blocks=64, threads=1, kernels="torch"))
        core.update_runtime({"max_num_batched_tokens": 64})
        monkeypatch.setattr(KERNEL, documented)
        core.runner.varlen = varlen
        answers.append(core.generate(prompts, SamplingParams(max_tokens=12, temperature=0.0)))
    assert answers[0] == answers[1]
