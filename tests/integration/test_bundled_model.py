"""The model that ships is what its card says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flyball.engine.bundled import bundled_model_path
from flyball.engine.config import EngineConfig
from flyball.engine.core import EngineCore
from flyball.engine.request import SamplingParams
from flyball.engine.tiny_model import acceptance, validation_loss

HELD_OUT = Path(__file__).parent.parent / "data" / "text" / "held_out.txt"
FOLDER = bundled_model_path().parent
CARD = json.loads((FOLDER / "recipe.json").read_text())["figures"]


def test_all_weights_together_stay_within_16_mb() -> None:
    """A wheel must stay small."""
    assert sum(path.stat().st_size for path in FOLDER.rglob("*.safetensors")) <= 16 * 10**6


def test_the_card_states_the_figures_that_were_measured() -> None:
    """The page that people read agrees with the recipe's own record."""
    text = (FOLDER / "README.md").read_text()
    for name in ("target_loss_nats", "draft_loss_nats", "draft_acceptance"):
        assert f"{CARD[name]:.3f}" in text, name


@pytest.mark.parametrize(("part", "name"), [("target", "target_loss_nats"), ("draft", "draft_loss_nats")])
def test_the_held_out_loss_is_near_the_card(part: str, name: str) -> None:
    """On a slice of the held-out text the loss is within a quarter nat of the card's, far below a uniform guess."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path(part))
    ids = torch.tensor(tokenizer(HELD_OUT.read_text())["input_ids"])
    model = AutoModelForCausalLM.from_pretrained(bundled_model_path(part), dtype=torch.float32).eval()
    loss = validation_loss(model, ids, 256, windows=24)
    assert abs(loss - CARD[name]) < 0.25
    assert loss < math.log(len(tokenizer)) - 3  # a uniform guess, far off


def test_the_draft_agrees_with_the_target_as_the_card_says() -> None:
    """Expected acceptance of speculative sampling on the slice is within .06 of the card's."""
    target, draft = (
        AutoModelForCausalLM.from_pretrained(bundled_model_path(p), dtype=torch.float32) for p in ("target", "draft")
    )
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    ids = torch.tensor(tokenizer(HELD_OUT.read_text())["input_ids"])
    assert abs(acceptance(target, draft, ids, 256) - CARD["draft_acceptance"]) < 0.06


def test_it_writes_words_and_knows_chats() -> None:
    """Greedy text from the engine is made of words of its books; a chat prompt ends at the assistant's turn."""
    core = EngineCore(EngineConfig(model=bundled_model_path(), threads=1))
    prompt = core.tokenizer("And God said, ")["input_ids"]
    words = core.tokenizer.decode(core.generate([prompt], SamplingParams(max_tokens=40, temperature=0.0))[0]).split()
    book = set(HELD_OUT.read_text().split())
    assert len(words) > 10
    assert sum(word in book for word in words) > len(words) / 2
    chat = core.tokenizer.apply_chat_template([{"role": "user", "content": "Speak."}], add_generation_prompt=True)
    ids = chat["input_ids"] if not isinstance(chat, list) else chat
    assert core.tokenizer.decode(ids) == "<|user|>Speak.<|assistant|>"
