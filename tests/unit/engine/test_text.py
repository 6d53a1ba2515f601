"""Text at the edges of the engine: what is streamed is what was decoded, and stop strings cut where they should."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flyball.core.errors import InvalidInput
from flyball.engine.text import StopStrings, TextCodec
from flyball.engine.tiny_model import train_tokenizer

TEXT = "The cat sat on the mat; 😀 家 naïve ☕ 👩‍🚀 said: stop here. "
TOKENIZER = train_tokenizer([TEXT * 50], 420, 256)
CODEC = TextCodec(TOKENIZER)
IDS = st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=80)
BYTE_IDS = st.lists(st.integers(4, 259), max_size=200)  # single bytes: mostly no valid UTF-8 at all


def decode(ids: list[int]) -> str:
    """The whole answer at once."""
    return str(TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def split(items: Any, cuts: list[int]) -> list[Any]:
    """The items in runs that end at the cuts."""
    marks = [0, *sorted(min(cut, len(items)) for cut in cuts), len(items)]
    return [items[a:b] for a, b in pairwise(marks)]


@given(ids=IDS | BYTE_IDS, cuts=st.lists(st.integers(0, 200), max_size=8))
def test_streamed_text_is_the_decoded_text_for_any_ids(ids: list[int], cuts: list[int]) -> None:
    """O14: the pieces of a stream, however tokens are grouped, join to decode(all)."""
    detokenizer = CODEC.detokenizer()
    pieces = [detokenizer.push(run) for run in split(ids, cuts)]
    assert "".join(pieces) + detokenizer.flush() == decode(ids)


@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=40))
def test_no_piece_of_valid_text_shows_a_broken_character(text: str) -> None:
    """O14: U+FFFD never appears mid-character, and nothing is left to flush after valid text."""
    detokenizer = CODEC.detokenizer()
    ids = TOKENIZER(text)["input_ids"]
    pieces = [detokenizer.push([i]) for i in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == decode(ids)
    assert detokenizer.flush() == ""


def test_an_emoji_of_four_byte_tokens_comes_whole() -> None:
    """A character split over four tokens is given out with its last byte."""
    byte_tokens, _ = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("🦊")[0]
    ids = [TOKENIZER.convert_tokens_to_ids(c) for c in byte_tokens]
    assert len(ids) == 4
    detokenizer = CODEC.detokenizer()
    assert [detokenizer.push([i]) for i in ids] == ["", "", "", "🦊"]


def test_endless_broken_bytes_keep_the_window_short() -> None:
    """A model that repeats one stray byte for ever costs the same at each step, and the text is still exact."""
    stray = next(i for i in range(4, 260) if decode([i]) == "\ufffd")
    detokenizer = CODEC.detokenizer()
    text = "".join(detokenizer.push([stray]) for _ in range(1000))
    assert len(detokenizer._window) <= 65
    assert text + detokenizer.flush() == decode([stray] * 1000)


def test_special_tokens_leave_no_text() -> None:
    """Ids of special tokens, even repeated for ever as with ignore_eos, add nothing."""
    detokenizer = CODEC.detokenizer()
    assert "".join(detokenizer.push([0]) for _ in range(500)) + detokenizer.flush() == ""


@given(ids=IDS | BYTE_IDS)
def test_the_bytes_of_tokens_join_to_the_text(ids: list[int]) -> None:
    """Each token's bytes, special ones by their names, are exactly its share of decode(all)."""
    spelled = b"".join(CODEC.token_bytes(i) for i in ids)
    whole = str(TOKENIZER.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    assert spelled.decode(errors="replace") == whole


def test_a_part_of_a_character_is_shown_as_bytes() -> None:
    r"""OpenAI's way: `bytes:\xf0\x9f`, so that no two tokens look the same; an id beyond the tokenizer is nothing."""
    (part, *_) = [i for i in TOKENIZER("🦊")["input_ids"] if "\ufffd" in decode([i])]
    assert CODEC.token_text(part).startswith("bytes:\\x")
    texts = [CODEC.token_text(i) for i in range(4, len(TOKENIZER))]
    assert len(set(texts)) == len(texts)
    assert CODEC.token_text(10**6) == ""


def test_tokens_of_trimming_and_byte_fallback_tokenizers_are_spelled() -> None:
    """A leading space is the token's own, though decoders trim a text's first; <0xF0> is a byte."""
    raw = Tokenizer(models.BPE({"▁": 0, "a": 1, "▁a": 2, "<0xF0>": 3, "▁b": 4, "b": 5}, [("▁", "a"), ("▁", "b")]))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    codec = TextCodec(PreTrainedTokenizerFast(tokenizer_object=raw))
    assert [codec.token_bytes(i) for i in (2, 4, 5, 3)] == [b" a", b" b", b"b", b"\xf0"]


def test_special_tokens_are_shown_to_those_who_ask() -> None:
    """skip_special_tokens=false: the end of a turn by its name."""
    detokenizer = CODEC.detokenizer(show_special=True)
    ids = [*TOKENIZER("the cat")["input_ids"], 0]
    assert "".join(detokenizer.push([i]) for i in ids) == "the cat" + TOKENIZER.convert_ids_to_tokens(0)


def test_an_answer_keeps_its_first_space_with_a_trimming_tokenizer() -> None:
    """Decoders that trim a text's first space (Metaspace, as in Llama 2) leave it where the prompt precedes it."""

    raw = Tokenizer(models.WordLevel({"▁hello": 0, "▁world": 1, "!": 2}, unk_token="!"))
    raw.decoder = decoders.Metaspace()
    detokenizer = TextCodec(PreTrainedTokenizerFast(tokenizer_object=raw)).detokenizer(context=[0])
    assert [detokenizer.push([i]) for i in (1, 1, 2)] == [" world", " world", "!"]


@given(
    text=st.text(alphabet="abc", max_size=30),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(0, 30), max_size=10),
)
def test_stop_strings_cut_the_same_place_however_the_text_is_split(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    """The first stop string to be completed ends the answer before it, and pieces never show any of it."""
    ends = [(i + 1, i + 1 - len(s), s) for i in range(len(text)) for s in stops if text[: i + 1].endswith(s)]
    expected = (text[: min(ends)[1]], min(ends)[2]) if ends else (text, None)
    search = StopStrings(stops)
    shown, hit = "", None
    for piece in split(text, cuts):
        new, hit = search.push(piece)
        shown += new
        assert expected[0].startswith(shown)
        if hit:
            break
    assert (shown if hit else shown + search.flush(), hit) == expected


def test_a_stop_string_is_shown_to_those_who_ask() -> None:
    """Up to its end, and nothing after it."""
    search = StopStrings(["STOP"], include=True)
    assert [search.push(text) for text in ("one ST", "OP two")] == [("one ", None), ("STOP", "STOP")]


def test_only_the_beginning_of_a_stop_string_is_held_back() -> None:
    """Text that cannot become a stop string is shown at once."""
    search = StopStrings(["###"])
    assert search.push("hello") == ("hello", None)
    assert search.push(" #") == (" ", None)
    assert search.push("!") == ("#!", None)
    assert search.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    """An empty stop string would end every answer before it began."""
    with pytest.raises(InvalidInput, match="at least one character"):
        StopStrings(["a", ""])


def test_a_chat_is_encoded_in_the_models_template() -> None:
    """Roles become special tokens, and the assistant's turn is opened."""
    ids = CODEC.encode_chat([{"role": "user", "content": "the cat"}])
    assert TOKENIZER.decode(ids) == "<|user|>the cat<|assistant|>"


def test_a_model_without_a_chat_template_says_what_to_use() -> None:
    """No template is a sentence, not a guess."""
    tokenizer = train_tokenizer([TEXT * 50], 300, 256)
    tokenizer.chat_template = None
    with pytest.raises(InvalidInput, match="/v1/completions"):
        TextCodec(tokenizer).encode_chat([{"role": "user", "content": "hi"}])


def test_a_template_that_refuses_gives_its_reason() -> None:
    """A template's own raise_exception reaches the user as a sentence."""
    tokenizer = train_tokenizer([TEXT * 50], 300, 256)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidInput, match="roles must alternate"):
        TextCodec(tokenizer).encode_chat([{"role": "user", "content": "hi"}])
