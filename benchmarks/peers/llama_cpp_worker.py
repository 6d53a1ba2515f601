"""llama.cpp through llama-cpp-python: the checkpoint rewritten as GGUF, all sequences in one batch.

The batch is driven through `llama_decode`, as llama.cpp's own `batched-bench` does, since the package's high-level
`Llama` takes one sequence at a time.
"""

from __future__ import annotations

import ctypes
import json
import math
import struct
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from _worker import Run, serve

BATCH, STEP = 2048, 512  # tokens of one logical and one physical batch, llama.cpp's defaults
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and raw bfloat16 bits of each tensor of a safetensors file."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        start = file.tell()
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            assert entry["dtype"] == "BF16", f"{name} is {entry['dtype']}, not BF16"
            begin, end = entry["data_offsets"]
            file.seek(start + begin)
            yield name, np.frombuffer(file.read(end - begin), dtype=np.uint16).reshape(entry["shape"])


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order of llama.cpp's rotary embedding: pairs (0, 1), (2, 3) where transformers pairs i, i + d/2."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(model: Path, target: Path) -> None:
    """The checkpoint as GGUF: matrices bfloat16, norms float32 as the format wants, no vocabulary."""
    import gguf

    config = json.loads((model / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(target), "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for name, found in tensors(model / "model.safetensors"):
        weight, stem = found, name.removesuffix(".weight")
        if stem in TOP:
            new = TOP[stem]
        else:
            _, _, layer, rest = stem.split(".", 3)
            new = f"blk.{layer}.{NAMES[rest]}"
            if rest.endswith(("q_proj", "k_proj")):
                weight = interleaved(weight, heads if rest.endswith("q_proj") else kv_heads)
        if weight.ndim == 1:
            widened = (weight.astype(np.uint32) << 16).view(np.float32)
            writer.add_tensor(f"{new}.weight", widened)
        else:
            raw = np.ascontiguousarray(weight).view(np.uint8)
            writer.add_tensor(f"{new}.weight", raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_file(model: Path, weights: str, threads: int) -> Path:
    """The checkpoint in bfloat16, or that rewritten by llama.cpp's own quantiser; made once beside the checkpoint."""
    import llama_cpp as lc

    plain = model / "model-bf16.gguf"
    if not plain.exists():
        write_gguf(model, plain)
    if weights == "bf16":
        return plain
    target = model / f"model-{weights}.gguf"
    params = lc.llama_model_quantize_default_params()
    params.nthread, params.ftype = threads, getattr(lc, f"LLAMA_FTYPE_MOSTLY_{weights.upper()}")
    failed = lc.llama_model_quantize(str(plain).encode(), str(target).encode(), ctypes.byref(params))
    assert failed == 0, f"llama_model_quantize returned {failed}"
    return target


def load(settings: dict[str, Any]) -> tuple[Run, str]:
    """Model and context with one KV stream a sequence."""
    import llama_cpp as lc

    lc.llama_backend_init()
    target = gguf_file(Path(settings["model"]), settings["weights"], settings["threads"])
    model = lc.llama_model_load_from_file(str(target).encode(), lc.llama_model_default_params())
    assert model, "llama.cpp refused the GGUF file"
    vocabulary = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(model))
    params = lc.llama_context_default_params()
    params.n_batch, params.n_ubatch = BATCH, STEP
    params.n_threads = params.n_threads_batch = settings["threads"]
    contexts: dict[int, int] = {}  # by sequences; the values are addresses

    def context(sequences: int) -> int:  # a context for one sequence is faster than a wide one used for one
        if sequences not in contexts:
            params.n_seq_max = sequences
            params.n_ctx = sequences * math.ceil(settings["max_len"] / 256) * 256
            contexts[sequences] = lc.llama_init_from_model(model, params)
            assert contexts[sequences], "llama.cpp made no context"
        return contexts[sequences]

    batch = lc.llama_batch_init(BATCH, 0, 1)

    def decode(ctx: int, rows: list[tuple[int, int, int, bool]]) -> np.ndarray:
        """One call for rows of (token, position, sequence, wants an answer): the likeliest next token of each asked."""
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        batch.n_tokens = len(rows)
        failed = lc.llama_decode(ctx, batch)
        assert failed == 0, f"llama_decode returned {failed}"
        asked = sum(row[3] for row in rows)
        if not asked:
            return np.empty(0, dtype=np.int64)
        values = ctypes.cast(lc.llama_get_logits(ctx), ctypes.POINTER(ctypes.c_float * (asked * vocabulary))).contents
        return np.frombuffer(values, dtype=np.float32).reshape(asked, vocabulary).argmax(axis=1)

    def run(prompts: list[list[int]], output: int) -> list[list[int]]:
        ctx = context(len(prompts))
        lc.llama_memory_clear(lc.llama_get_memory(ctx), False)
        rows = [(t, i, s, i == len(p) - 1) for s, p in enumerate(prompts) for i, t in enumerate(p)]
        last = np.concatenate([decode(ctx, rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)])
        made = [[int(t)] for t in last]
        for _ in range(output - 1):
            last = decode(
                ctx, [(m[-1], len(p) + len(m) - 1, s, True) for s, (p, m) in enumerate(zip(prompts, made, strict=True))]
            )
            for tokens, t in zip(made, last, strict=True):
                tokens.append(int(t))
        return made

    return run, f"llama-cpp-python {version('llama-cpp-python')}, weights in {settings['weights']}"


if __name__ == "__main__":
    serve(load)
