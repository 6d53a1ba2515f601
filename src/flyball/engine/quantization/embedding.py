"""An embedding table kept in int8, one scale a token; what is looked up is widened, never the table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flyball.engine.quantization.integer import Int8Quantizer


class QuantizedEmbedding(nn.Module):
    """`codes[ids] * scales[ids]`; codes [V, d] int8 and scales [V] float32 are buffers."""

    codes: Tensor
    scales: Tensor

    def __init__(self, tokens: int, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype  # of what is looked up
        for name, tensor in Int8Quantizer().empty(tokens, size).items():
            self.register_buffer(name, tensor)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> QuantizedEmbedding:
        """Quantise a table, which is not kept."""
        with torch.device("meta"):
            made = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.weight.dtype)
        for name, tensor in Int8Quantizer().quantize(embedding.weight).items():
            made.register_buffer(name, tensor)
        return made

    def forward(self, ids: Tensor) -> Tensor:
        """Rows [.., d] of token ids [..]."""
        return (self.codes[ids].float() * self.scales[ids][..., None]).to(self.dtype)


def quantize_embedding(model: nn.Module) -> bool:
    """Replace a model's input embedding in place; False where it is none of the plain kind, and is left as it is."""
    table = model.get_input_embeddings()  # type: ignore[operator]  # of transformers' models
    if type(table) is not nn.Embedding:
        return False
    model.set_input_embeddings(QuantizedEmbedding.from_embedding(table))  # type: ignore[operator]
    return True
