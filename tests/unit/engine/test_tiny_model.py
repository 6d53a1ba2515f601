"""The recipe of the bundled model: its tokenizer, its training, its refusals."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from flyball.core.clock import VirtualClock
from flyball.core.errors import InvalidInput
from flyball.engine.tiny_model import ASSISTANT, END, PRESETS, SYSTEM, USER, documents, train_tiny, train_tokenizer

NOUNS = ("king", "queen", "river", "mountain", "servant", "horse", "city", "prophet", "garden", "sword")
VERBS = ("saw", "feared", "loved", "followed", "forgot", "praised", "sought", "carried")
ADJECTIVES = ("old", "bright", "silent", "weary", "gentle", "proud")


def _sentences(count: int) -> str:
    """Text of a small grammar: about 3 nats a word to learn, the same on every machine."""
    pick = random.Random(0).choice
    return "".join(
        f"The {pick(ADJECTIVES)} {pick(NOUNS)} {pick(VERBS)} the {pick(NOUNS)} of the {pick(ADJECTIVES)} sea.\n"
        for _ in range(count)
    )


def _silent(stage: str, step: int, steps: int, loss: float) -> None:
    assert math.isfinite(loss), f"{stage} step {step} of {steps}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A small vocabulary learnt from the grammar alone."""
    return train_tokenizer([_sentences(500)], vocab_size=512, max_positions=256)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """The folder and the figures of one whole run of the `ci` preset."""
    folder = tmp_path_factory.mktemp("tiny")
    text = folder / "sentences.txt"
    text.write_text(_sentences(2500), encoding="utf-8")
    figures = train_tiny([text], folder / "out", PRESETS["ci"], _silent, clock=VirtualClock(), sources=["a grammar"])
    return folder / "out", figures


@given(text=st.text())
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """Byte-level tokens spell every text, so decoding gives back exactly what was encoded."""
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("text", ["naïve 👩‍👩‍👧 emoji 🦀", f"{USER}hi{ASSISTANT}ho{END}", "\x00\t \r\n", "ᚠᛇᚻ 漢字"])
def test_odd_text_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """Emoji of several code points, control characters and the special tokens themselves survive too."""
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_are_one_token_each(tokenizer: PreTrainedTokenizerFast) -> None:
    """A role or the end of a text costs one token, and the end is token 0 as the models' configurations say."""
    ids = tokenizer(END + USER + ASSISTANT + SYSTEM)["input_ids"]
    assert len(set(ids)) == len(ids) == 4
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == ids[0] == 0
    assert tokenizer.decode(ids, skip_special_tokens=True) == ""


def test_the_chat_template_marks_every_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    """A conversation becomes the turns that training saw, and ends where the assistant has to speak."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who sought the king?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == f"{SYSTEM}Be brief.{USER}Who sought the king?{ASSISTANT}"


@given(seed=st.integers(0, 10_000), count=st.integers(0, 60), chat_share=st.floats(0, 1))
def test_documents_lose_no_word(seed: int, count: int, chat_share: float) -> None:
    """Cutting a text into documents and chat turns adds marks and drops blanks at the cuts, nothing else."""
    text = _sentences(count)
    pieces = documents(text, random.Random(seed), chat_share)
    assert all(piece.endswith(END) for piece in pieces)
    joined = "".join(pieces)
    for mark in (USER, ASSISTANT, END):
        joined = joined.replace(mark, "\n")
    assert joined.split() == text.split()


@pytest.mark.parametrize("name", ["target", "draft"])
def test_training_writes_models_that_load(trained: tuple[Path, dict[str, float]], name: str) -> None:
    """Both folders hold a bfloat16 Llama that transformers loads and continues a prompt with."""
    folder = trained[0] / name
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.config.num_hidden_layers == (PRESETS["ci"].layers if name == "target" else 1)
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.chat_template
    prompt = tokenizer("The old king", return_tensors="pt")
    output = model.generate(**prompt, do_sample=False, min_new_tokens=4, max_new_tokens=4, pad_token_id=0)
    assert output.shape == (1, prompt["input_ids"].shape[1] + 4)


def test_training_learns(trained: tuple[Path, dict[str, float]]) -> None:
    """Thirty steps take the held-out loss far below that of guessing, and the draft follows the target."""
    folder, figures = trained
    assert all(math.isfinite(value) for value in figures.values())
    guessing = math.log(AutoModelForCausalLM.from_pretrained(folder / "target").config.vocab_size)
    assert figures["target_loss_nats"] < 0.7 * guessing
    assert figures["draft_loss_nats"] < 0.7 * guessing
    assert 0.5 < figures["draft_acceptance"] <= 1


def test_the_recipe_is_written_down(trained: tuple[Path, dict[str, float]]) -> None:
    """The recipe file states seeds, sources and figures: what a person needs to make the model again."""
    folder, figures = trained
    card = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    assert card["figures"] == figures
    assert card["sources"] == ["a grammar"]
    assert card["recipe"]["seed"] == PRESETS["ci"].seed


def test_training_repeats(trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    """The same text, recipe and seed give the same weights, bit for bit."""
    text = tmp_path / "sentences.txt"
    text.write_text(_sentences(2500), encoding="utf-8")
    train_tiny([text], tmp_path / "again", PRESETS["ci"], _silent, clock=VirtualClock())
    for name in ("target", "draft"):
        first, again = (folder / name / "model.safetensors" for folder in (trained[0], tmp_path / "again"))
        assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, r"cannot read .*novel\.txt as text \(.*\); give plain UTF-8 text files"),
        (b"\xff\xfe" * 10_000, r"cannot read .*novel\.txt as text \(.*\); give plain UTF-8 text files"),
        (b"Too short.", r"novel\.txt holds 10 characters; a model needs at least 10000 to learn from"),
        (b"word " * 2000, r"\d+ training and \d+ validation tokens; each part must exceed 256 tokens: give more text"),
    ],
    ids=["missing", "not text", "short", "too few tokens"],
)
def test_unusable_text_is_refused(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    """Text that cannot be read or is too little is refused before any training, with what to give instead."""
    novel = tmp_path / "novel.txt"
    if content is not None:
        novel.write_bytes(content)
    with pytest.raises(InvalidInput, match=sentence):
        train_tiny([novel], tmp_path / "out", PRESETS["ci"], _silent, clock=VirtualClock())
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_earlier_result_is_not_overwritten(tmp_path: Path, kind: str) -> None:
    """A folder that holds something, or a file of that name, is left as it is."""
    out = tmp_path / "out"
    kept = out / "weights" if kind == "folder" else out
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("precious")
    with pytest.raises(InvalidInput, match="name a new folder"):
        train_tiny([], out, PRESETS["ci"], _silent, clock=VirtualClock())
    assert kept.read_text() == "precious"


def test_no_text_at_all_is_refused(tmp_path: Path) -> None:
    """Without a text there is nothing to learn, and the sentence shows a command that works."""
    with pytest.raises(InvalidInput, match=r"give at least one, for example: flyball train-tiny book\.txt --out DIR"):
        train_tiny([], tmp_path / "out", PRESETS["ci"], _silent, clock=VirtualClock())
