"""Medusa heads: from the model's last hidden state to guesses of the tokens after the next one.

Head h of a row at position t guesses the token at t + 2 + h, since the model itself says what stands at t + 1 (Cai et
al. 2024, arXiv:2401.10774). Each head is a residual block before the model's own output layer, which all share.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from flyball.core.errors import InvalidInput

WEIGHTS, CONFIG = "medusa.safetensors", "medusa.json"


class MedusaHeads(nn.Module):
    """Some residual blocks; made so that each starts as the model's own next-token guess."""

    def __init__(self, *, heads: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.heads, self.hidden, self.inner = heads, hidden, inner
        self.up = nn.ModuleList(nn.Linear(hidden, inner) for _ in range(heads))
        self.down = nn.ModuleList(nn.Linear(inner, hidden, bias=False) for _ in range(heads))
        for layer in self.down:
            nn.init.zeros_(cast(nn.Linear, layer).weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """States [.., d] after the model's last norm to states [heads, .., d] before its output layer."""
        blocks = zip(self.up, self.down, strict=True)
        return torch.stack([hidden + down(F.silu(up(hidden))) for up, down in blocks])

    def save(self, folder: Path) -> None:
        """Write weights, bfloat16, and sizes."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: p.detach().to(torch.bfloat16).contiguous() for n, p in self.named_parameters()}, folder / WEIGHTS)
        sizes = {"heads": self.heads, "hidden": self.hidden, "inner": self.inner}
        (folder / CONFIG).write_text(json.dumps(sizes) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, hidden: int, dtype: torch.dtype, device: str = "cpu") -> MedusaHeads:
        """Heads for a model of this hidden size; raises InvalidInput where the folder holds none that fit."""
        try:
            sizes = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            heads = cls(heads=sizes["heads"], hidden=sizes["hidden"], inner=sizes["inner"])
            heads.load_state_dict(load_file(folder / WEIGHTS))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise InvalidInput(
                f"cannot read Medusa heads from {folder}: {error}; give a folder that flyball train-tiny wrote"
            ) from error
        if heads.hidden != hidden:
            raise InvalidInput(
                f"the Medusa heads in {folder} are for a hidden size of {heads.hidden}, this model's is {hidden}; "
                "give the heads that were trained with this model"
            )
        return heads.to(device=device, dtype=dtype).eval().requires_grad_(False)
