"""A quantised model in the compiled step: the same phases as `fused`, weights in their few bits.

Which: int8 with float or int8 activations, int4, fp8 and NF4, all symmetric; what the kernels do not know is computed
by the layers themselves in torch, and `check_quantized` says why.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from flyball.engine.cpu.build import KernelsUnavailable
from flyball.engine.cpu.fused import FusedModel, Step
from flyball.engine.quantization.embedding import QuantizedEmbedding
from flyball.engine.quantization.floating import Nf4Quantizer
from flyball.engine.quantization.formats import QuantizationType, unpack_nibbles
from flyball.engine.quantization.linear import QuantizedLinear

FORMATS = {  # as the enumeration in quantized.cpp; 0 is bfloat16
    QuantizationType.INT8_DYNAMIC: 1, QuantizationType.INT8: 2, QuantizationType.INT4: 3, QuantizationType.FP8: 4,
    QuantizationType.NF4: 5,
}  # fmt: skip


class Weight(ctypes.Structure):
    """A matrix as the kernels read it."""

    _fields_ = (
        ("format", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "sums")),
        *((name, ctypes.c_int64) for name in ("group", "groups")),
    )


class QuantizedFusedModel(FusedModel):
    """Packed quantised weights and the kernels that run them; layers that are not quantised stay bfloat16."""

    def __init__(self, model: Any, cache: Any, positions: int) -> None:  # noqa: ANN401  # untyped library
        check_quantized(model)
        self._weights: list[Weight] = []
        super().__init__(model, cache, positions)

    def _run(self, step: Step) -> None:
        self._kernels.fq_forward(ctypes.byref(self._model), ctypes.byref(step))

    def _output(self, x: Tensor, logits: Tensor) -> None:
        m = self._model
        self._kernels.fq_linear(x.data_ptr(), len(x), m.hidden, m.head, m.vocab, logits.data_ptr(), self._threads)

    def _embedding(self, table: Any) -> tuple[int, int | None]:  # noqa: ANN401  # untyped library
        if isinstance(table, QuantizedEmbedding):
            return self._pointer(table.codes), self._pointer(table.scales)
        return super()._embedding(table)

    def _matrix(self, *layers: Any, gated: bool = False) -> int:  # noqa: ANN401  # untyped library
        if isinstance(layers[0], QuantizedLinear):
            weight, tensors = pack(self._kernels, layers, gated=gated)
            self._keep += tensors
        else:
            weight = Weight(codes=super()._matrix(*layers, gated=gated))
        self._weights.append(weight)
        return ctypes.addressof(weight)


def pack(
    kernels: ctypes.CDLL, layers: tuple[QuantizedLinear, ...], *, gated: bool = False
) -> tuple[Weight, list[Tensor]]:
    """Layers of one format, one below the other, as the kernels read them, and the tensors that hold them."""
    first = layers[0]
    kind, k = first.config.quantization_type, first.in_features
    code = FORMATS[kind]
    plain = [bytes_and_scales(layer) for layer in layers]
    codes = torch.cat([codes for codes, _ in plain]).contiguous()
    scales = torch.cat([scales for _, scales in plain]).float().contiguous()
    n, groups = scales.shape
    panels = -(-n // 16)
    packed = torch.empty(kernels.fq_code_bytes(code, n, k), dtype=torch.uint8)
    packed_scales = torch.empty(panels * groups * 16)
    sums = torch.empty(panels * 16 if kind is QuantizationType.INT8_DYNAMIC else 0, dtype=torch.int32)
    kernels.fq_pack(
        code, codes.data_ptr(), scales.data_ptr(), n, k, groups, int(gated), packed.data_ptr(),
        packed_scales.data_ptr(), sums.data_ptr() if len(sums) else None,
    )  # fmt: skip
    group = first.config.group_size if groups > 1 else k
    weight = Weight(
        format=code, codes=packed.data_ptr(), scales=packed_scales.data_ptr(), sums=sums.data_ptr(), group=group,
        groups=groups,
    )  # fmt: skip
    return weight, [packed, packed_scales, sums]


def bytes_and_scales(layer: QuantizedLinear) -> tuple[Tensor, Tensor]:
    """A layer's codes, one byte a weight [N, K], and scales [N, G]."""
    parts = layer.parts
    match layer.config.quantization_type:
        case QuantizationType.INT4:
            return unpack_nibbles(parts["codes"], layer.in_features), parts["scales"]
        case QuantizationType.NF4:
            assert isinstance(layer.quantizer, Nf4Quantizer)
            return unpack_nibbles(parts["codes"], layer.in_features), layer.quantizer.scales(parts)
        case _:
            return parts["codes"].view(torch.uint8), parts["scales"][:, None]


def check_quantized(model: Any) -> None:  # noqa: ANN401  # untyped library
    """Raise KernelsUnavailable, with the reason, for quantised layers that the kernels cannot put together."""
    groups: list[tuple[Any, ...]] = [(model.lm_head,)]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        groups += [(attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,),
                   (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)]  # fmt: skip
    for together in groups:
        configs = {layer.config if isinstance(layer, QuantizedLinear) else None for layer in together}
        if len(configs) > 1:
            raise KernelsUnavailable("the kernels want layers that share an input in one format")
        config = configs.pop()
        if config is not None and not config.symmetric:
            raise KernelsUnavailable("the kernels do not know zero points")
        if config is not None and config.group_size % 2:
            raise KernelsUnavailable(f"the kernels do not know groups of {config.group_size}, an odd number")
