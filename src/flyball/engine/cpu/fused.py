"""A Llama-shaped model packed for the compiled kernels: same weights, same rotary tables, one call a step.

Which models: decoder stacks of transformers with RMSNorm, rotary positions, grouped-query attention and a SiLU-gated
MLP (Llama, Mistral, Qwen2, Qwen3 families), in bfloat16, on a CPU. Everything else runs in transformers' own code.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flyball.engine.attention import PagedTensors
from flyball.engine.cpu.arena import Arena
from flyball.engine.cpu.build import KernelsUnavailable, load_kernels
from flyball.engine.scheduler import Scheduled

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # tables that do not depend on the sequence's length


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qkv", "o", "gate_up", "down", "qkv_bias", "o_bias", "norm_in",
                                               "norm_post", "q_norm", "k_norm", "keys", "values")),
        ("window", ctypes.c_int64),
    )  # fmt: skip


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate",
                                              "vocab", "block_size")),
        ("eps", ctypes.c_float),
        ("scaling", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("embedding", "norm", "head", "cos", "sin", "layer",
                                               "embedding_scales")),
    )  # fmt: skip


class Step(ctypes.Structure):
    """What one step computes, as the kernels read it."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "samples", "table_width", "longest", "threads")),
        *((name, ctypes.c_void_p) for name in ("ids", "positions", "sequence", "tables", "sampled", "logits",
                                               "scratch")),
    )  # fmt: skip


class FusedModel:
    """Packed weights and the kernels that run them; made from a loaded model, whose own layers it replaces."""

    def __init__(self, model: Any, cache: PagedTensors, positions: int) -> None:  # noqa: ANN401  # untyped library
        check_supported(model)
        self._kernels = load_kernels()
        self._threads = torch.get_num_threads()
        self._arena = Arena()
        self._keep: list[Tensor] = []
        config, decoder = model.config, model.model
        layers = (_Layer * len(decoder.layers))()
        for i, layer in enumerate(decoder.layers):
            layers[i] = self._layer(layer, cache, i)
            decoder.layers[i] = torch.nn.Identity()  # the packed copy is the only one kept
        self._norm = decoder.norm.weight.float()
        self._last = (0, torch.empty(0, dtype=torch.long))  # tokens of the last step, and its sampled rows
        cos, sin = _rotary_tables(decoder, positions)
        head_dim = cos.shape[-1]
        self.vocab = model.lm_head.out_features
        embedding, embedding_scales = self._embedding(decoder.embed_tokens)
        self._model = _Model(
            layers=len(layers), hidden=config.hidden_size, heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads, head_dim=head_dim, intermediate=config.intermediate_size,
            vocab=self.vocab, block_size=cache.block_size, eps=config.rms_norm_eps, scaling=head_dim**-0.5,
            embedding=embedding, embedding_scales=embedding_scales, norm=self._pointer(self._norm),
            head=self._matrix(model.lm_head), cos=self._pointer(cos), sin=self._pointer(sin),
            layer=ctypes.addressof(layers),
        )  # fmt: skip
        model.lm_head = torch.nn.Identity()  # as its layers: only the packed copy is kept
        self._layers = layers
        self._cache = cache
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def __del__(self) -> None:
        """Let no thread look at the weights while they go."""
        if hasattr(self, "_kernels"):
            self._kernels.fb_drain()

    def forward(self, parts: Sequence[Scheduled]) -> Tensor:
        """Compute a step; returns float32 logits [R, V] of the parts that sample, in their order."""
        counts = np.array([part.count for part in parts])
        total = int(counts.sum())
        ids = np.array([t for p in parts for t in p.request.tokens(p.start, p.start + p.count)], dtype=np.int32)
        firsts = np.cumsum(counts) - counts
        starts = np.array([part.start for part in parts])
        positions = (np.arange(total) - np.repeat(firsts - starts, counts)).astype(np.int32)
        owner = [0] * len(parts)  # parts of one request, which verify a draft, are one sequence
        for i in range(1, len(parts)):
            owner[i] = owner[i - 1] if parts[i].request is parts[i - 1].request else i
        sequence = np.repeat(np.array(owner, dtype=np.int32), counts)
        width = max(len(part.request.block_table) for part in parts)
        tables = np.zeros((len(parts), width), dtype=np.int32)
        for row, part in enumerate(parts):
            tables[row, : len(part.request.block_table)] = part.request.block_table
        sampled = (firsts + counts - 1)[[part.samples for part in parts]].astype(np.int32)
        logits = torch.empty((len(sampled), self.vocab), dtype=torch.float32)
        longest = int(positions.max()) + 1
        needed = self._kernels.fb_scratch_bytes(ctypes.byref(self._model), total, longest, self._threads)
        if self._scratch.numel() < needed:
            self._scratch = torch.empty(needed, dtype=torch.uint8)
        step = Step(
            tokens=total, samples=len(sampled), table_width=width, longest=longest, threads=self._threads,
            ids=ids.ctypes.data, positions=positions.ctypes.data, sequence=sequence.ctypes.data,
            tables=tables.ctypes.data, sampled=sampled.ctypes.data, logits=logits.data_ptr(),
            scratch=self._scratch.data_ptr(),
        )  # fmt: skip
        self._run(step)
        self._last = (total, torch.from_numpy(sampled).long())
        return logits

    @property
    def weight_bytes(self) -> int:
        """Resident memory of the packed weights, norms and tables."""
        return sum({t.data_ptr(): t.nbytes for t in self._keep}.values())

    def states(self) -> Tensor:
        """States [R, hidden] after the last norm, of the rows that the last step sampled; float32.

        The residual stream lies first in the scratch and is left there by a step.
        """
        tokens, sampled = self._last
        hidden, start = self._model.hidden, -self._scratch.data_ptr() % 64
        whole = self._scratch[start : start + tokens * hidden * 4].view(torch.float32)
        stream: Tensor = whole.view(tokens, hidden)[sampled]
        scale = torch.rsqrt(stream.square().mean(-1, keepdim=True) + self._model.eps)
        normed: Tensor = stream * scale * self._norm
        return normed

    def logits_of(self, states: Tensor) -> Tensor:
        """Logits [R, V] of states [R, hidden] by the output layer."""
        x = states.to(torch.bfloat16).contiguous()
        logits = torch.empty((len(x), self.vocab), dtype=torch.float32)
        self._output(x, logits)
        return logits

    def _output(self, x: Tensor, logits: Tensor) -> None:
        m = self._model
        self._kernels.fb_linear(x.data_ptr(), len(x), m.hidden, m.head, m.vocab, logits.data_ptr(), self._threads)

    def _run(self, step: Step) -> None:
        self._kernels.fb_forward(ctypes.byref(self._model), ctypes.byref(step))

    def _layer(self, layer: Any, cache: PagedTensors, index: int) -> _Layer:  # noqa: ANN401  # untyped library
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        biases = [p.bias for p in projections]
        window = getattr(attention, "sliding_window", None)
        if window is None and attention.config.model_type == "mistral":
            window = attention.config.sliding_window
        return _Layer(
            qkv=self._matrix(*projections),
            o=self._matrix(attention.o_proj),
            gate_up=self._matrix(mlp.gate_proj, mlp.up_proj, gated=True),
            down=self._matrix(mlp.down_proj),
            qkv_bias=self._pointer(torch.cat(biases).float()) if biases[0] is not None else None,
            o_bias=self._pointer(attention.o_proj.bias.float()) if attention.o_proj.bias is not None else None,
            norm_in=self._pointer(layer.input_layernorm.weight.float()),
            norm_post=self._pointer(layer.post_attention_layernorm.weight.float()),
            q_norm=self._pointer(attention.q_norm.weight.float()) if hasattr(attention, "q_norm") else None,
            k_norm=self._pointer(attention.k_norm.weight.float()) if hasattr(attention, "k_norm") else None,
            keys=cache.keys[index].data_ptr(),
            values=cache.values[index].data_ptr(),
            window=window or 0,
        )

    def _embedding(self, table: Any) -> tuple[int, int | None]:  # noqa: ANN401  # untyped library
        """Where the rows of the embedding are, and where their scales are, if they have any."""
        return self._pointer(table.weight), None

    def _matrix(self, *layers: Any, gated: bool = False) -> int:  # noqa: ANN401  # untyped library
        """What the kernels read the weights of some layers, one below the other, from."""
        weight = torch.cat([layer.weight for layer in layers])
        n, k = weight.shape
        out = self._arena.empty(self._kernels.fb_packed_elements(n, k), torch.bfloat16)
        source = weight.contiguous()
        self._kernels.fb_pack(source.data_ptr(), n, k, int(gated), out.data_ptr(), self._threads)
        return self._pointer(out)

    def _pointer(self, tensor: Tensor) -> int:
        tensor = tensor.contiguous()
        self._keep.append(tensor)
        return tensor.data_ptr()


def check_supported(model: Any) -> None:  # noqa: ANN401  # untyped library
    """Raise KernelsUnavailable, with the reason, for a model that the kernels do not compute exactly."""
    config = model.config
    if config.model_type not in FAMILIES:
        raise KernelsUnavailable(f"the kernels know {', '.join(FAMILIES)} models, not {config.model_type}")
    if model.dtype != torch.bfloat16 or model.device.type != "cpu":
        raise KernelsUnavailable(f"the kernels compute in bfloat16 on the CPU, not in {model.dtype} on {model.device}")
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    checks = (
        (config.hidden_act == "silu", f"the activation {config.hidden_act}"),
        (rope in STATIC_ROPE, f"rotary positions of type {rope}"),
        (attention.head_dim % 32 == 0 and attention.head_dim <= 512, f"heads of {attention.head_dim}"),
        (config.hidden_size % 16 == 0 and config.intermediate_size % 16 == 0, "sizes that are no multiples of 16"),
        (mlp.gate_proj.bias is None and mlp.down_proj.bias is None, "biases in the MLP"),
        (abs(attention.scaling * attention.head_dim**0.5 - 1) < 1e-6, "its own attention scale"),
    )
    for good, what in checks:
        if not good:
            raise KernelsUnavailable(f"the kernels do not know {what}")


def _rotary_tables(decoder: Any, positions: int) -> tuple[Tensor, Tensor]:  # noqa: ANN401  # untyped library
    """Cosines and sines [positions, D] as transformers computes them, in float32."""
    probe = torch.zeros(1, positions, 1)
    cos, sin = decoder.rotary_emb(probe, torch.arange(positions)[None])
    return cos[0].float(), sin[0].float()
