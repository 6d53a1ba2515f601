"""A model whose next token is known, and heads that know it too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flyball.engine.speculation.heads import MedusaHeads


@pytest.fixture(scope="session")
def cycle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model that says after token t always 5 t + 3 (mod 32), and heads that know it."""
    folder = tmp_path_factory.mktemp("cycle")
    config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
                         pad_token_id=None, tie_word_embeddings=False)  # fmt: skip
    model = LlamaForCausalLM(config)
    after = torch.tensor([(5 * t + 3) % 32 for t in range(32)])
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(32))
        model.lm_head.weight.zero_()
        model.lm_head.weight[after, torch.arange(32)] = 1.0
        heads = MedusaHeads(heads=3, hidden=32, inner=32)
        place = torch.arange(32)
        for up, down in zip(heads.up, heads.down, strict=True):
            place = after[place]
            up.weight.copy_(8 * torch.eye(32))  # type: ignore[operator,union-attr]
            up.bias.zero_()  # type: ignore[operator,union-attr]
            move = torch.zeros(32, 32)
            move[place, torch.arange(32)] = 1.0
            down.weight.copy_((move - torch.eye(32)) / 8)  # type: ignore[operator,union-attr]
    model.save_pretrained(folder / "model")
    heads.save(folder / "heads")
    return folder / "model", folder / "heads"
