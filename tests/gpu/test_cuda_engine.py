"""On CUDA: the engine answers as transformers does, by the varlen kernel where the trial accepts it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from flyball.engine.config import EngineConfig
from flyball.engine.core import EngineCore
from flyball.engine.request import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; run `make gpu` on a machine with one"),
]
SHAPE = LlamaConfig(
    vocab_size=2048, hidden_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
    intermediate_size=1024, max_position_embeddings=1024,
)  # fmt: skip
PROMPTS = [[(7 * i + j) % 2048 for j in range(20 + 90 * i)] for i in range(5)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in bfloat16."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(SHAPE, dtype=torch.bfloat16).save_pretrained(path)
    return path


def core_on(path: Path, dtype: str, block_size: int) -> EngineCore:
    """An engine on the card with a small step, so that prefill is chunked and mixed with decodes."""
    core = EngineCore(EngineConfig(model=path, device="cuda", dtype=dtype, block_size=block_size, num_blocks=256))
    core.update_runtime({"max_num_batched_tokens": 128})
    return core


@pytest.mark.parametrize("block_size", [16, 256])
def test_float32_greedy_answers_equal_generate(checkpoint: Path, block_size: int) -> None:
    """Token for token, through chunked prefill and mixed steps."""
    core = core_on(checkpoint, "float32", block_size)
    ours = core.generate(PROMPTS, SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).to("cuda").eval()
    for prompt, answer in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([prompt], device="cuda")
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, min_new_tokens=24,
            pad_token_id=0,
        )  # fmt: skip
        assert made[0, len(prompt) :].tolist() == answer


@pytest.mark.parametrize("block_size", [16, 256])
def test_answers_do_not_depend_on_company(checkpoint: Path, block_size: int) -> None:
    """In bfloat16, whichever attention was chosen: alone and in a batch a prompt opens with the same token."""
    core = core_on(checkpoint, "bfloat16", block_size)
    core.update_runtime({"prefix_caching": False})
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    together = core.generate(PROMPTS, params)
    assert together == [core.generate([prompt], params)[0] for prompt in PROMPTS], core.runner.kernels
