"""A tiny random checkpoint with a tokenizer, and engines over it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flyball.engine.config import EngineConfig
from flyball.engine.core import EngineCore

TEXT = 'The cat sat on the mat; 😀 naïve {"name": "Ada", "age": 36, "ok": true} said: stop here and go. ' * 40


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of random float32 weights, 256 positions, a byte-level tokenizer; token 0 ends a sequence."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from flyball.engine.tiny_model import train_tokenizer

    folder = tmp_path_factory.mktemp("engine-tiny")
    tokenizer = train_tokenizer([TEXT], 400, 256)
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def engine(checkpoint: Path) -> Callable[..., EngineCore]:
    """Make an engine: blocks of 4 tokens, one thread, a fixed seed; more settings by name, `clock` among them."""

    def make(clock: Any = None, **settings: Any) -> EngineCore:
        defaults: dict[str, Any] = {"block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 64, "threads": 1}
        return EngineCore(EngineConfig(model=checkpoint, **defaults | settings), clock=clock, seed=3)

    return make
