"""OpenVINO GenAI's continuous batching over a model exported by optimum-intel."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from _worker import Run, serve


def load(settings: dict[str, Any]) -> tuple[Run, str]:
    """Export once beside the checkpoint, weights kept in bfloat16 or compressed to 8 or 4 bits, then load."""
    import openvino as ov
    import openvino_genai as genai

    folder = Path(settings["model"]) / f"openvino-{settings['weights']}"
    if not (folder / "openvino_model.xml").exists():
        from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

        ways = {"bf16": None, "int8": OVWeightQuantizationConfig(bits=8, sym=True),
                "int4": OVWeightQuantizationConfig(bits=4, sym=True, group_size=128)}  # fmt: skip
        exported = OVModelForCausalLM.from_pretrained(
            settings["model"], export=True, compile=False, load_in_8bit=False, torch_dtype="auto",
            quantization_config=ways[settings["weights"]],
        )  # fmt: skip
        exported.save_pretrained(folder)
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs, scheduler.enable_prefix_caching, scheduler.cache_size = settings["max_seqs"], False, 1
    scheduler.max_num_batched_tokens = 2048
    pipeline = genai.ContinuousBatchingPipeline(
        folder, scheduler, "CPU", {"INFERENCE_NUM_THREADS": settings["threads"], "INFERENCE_PRECISION_HINT": "bf16"}
    )

    def run(prompts: list[list[int]], output: int) -> list[list[int]]:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.min_new_tokens, config.ignore_eos, config.do_sample = output, output, True, False
        inputs = [ov.Tensor(np.array([p], dtype=np.int64)) for p in prompts]
        made = pipeline.generate(inputs, [config] * len(prompts))
        return [list(answer.m_generation_ids[0]) for answer in made]

    return run, f"openvino-genai {version('openvino-genai')}, weights in {settings['weights']}"


if __name__ == "__main__":
    serve(load)
