"""Grammars by hand-made texts: what each must take and must refuse."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from flyball.core.errors import InvalidInput
from flyball.engine.request import Grammar
from flyball.engine.structured import GrammarCompiler
from flyball.engine.tiny_model import train_tokenizer

TOKENIZER = train_tokenizer(["The cat sat on the mat; 😀 家 naïve. " * 50], 400, 128)
COMPILER = GrammarCompiler(TOKENIZER, len(TOKENIZER), {0})


def takes(grammar: Grammar, text: str) -> bool:
    """Whether the whole text is an answer of this form."""
    matcher = COMPILER.matcher(grammar)
    return bool(matcher.accept_string(text) and matcher.accept_token(0))


def of_schema(schema: Any) -> Grammar:
    """JSON of a schema."""
    return Grammar(kind="json_schema", text=json.dumps(schema))


@pytest.mark.parametrize("bounds", [{}, {"minLength": 1}, {"maxLength": 9}, {"pattern": "^.{1,9}$"}])
def test_no_string_holds_raw_control_characters(bounds: dict[str, Any]) -> None:
    """JSON forbids them, bounded or not; other characters are taken."""
    grammar = of_schema({"type": "object", "properties": {"a": {"type": "string", **bounds}}, "required": ["a"]})
    assert takes(grammar, '{"a": "x é 😀"}')
    for control in ("\x00", "\x01", "\t", "\n", "\r", "\x1f"):
        assert not takes(grammar, f'{{"a": "x{control}"}}')


def test_lengths_still_bind() -> None:
    """Neither shorter nor longer, however long."""
    grammar = of_schema({"type": "string", "minLength": 2, "maxLength": 500})
    assert [takes(grammar, json.dumps("é" * n, ensure_ascii=False)) for n in (1, 2, 500, 501)] == [
        False, True, True, False,
    ]  # fmt: skip


def test_a_bounded_string_holds_no_surrogates() -> None:
    """Bytes ED A0 80 are no character but would be decoded to three: the length would be wrong."""
    matcher = COMPILER.matcher(of_schema({"type": "string", "maxLength": 2}))
    encoded = dict(pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\ud7ff"))
    raw = [TOKENIZER.convert_tokens_to_ids(c) for c in '"' + "".join(encoded)]
    assert [matcher.accept_token(i) for i in raw] == [True] * 4  # ED 9F BF: the last character before them
    assert matcher.accept_token(raw[1])
    assert not matcher.accept_token(TOKENIZER.convert_tokens_to_ids("\u0142"))  # A0 in a byte-level vocabulary


def test_each_kind_takes_its_own() -> None:
    """Any object, an expression, one of several texts, a grammar."""
    cases = (
        (Grammar(kind="json_object"), '{"a": [1, null]}', "[1]"),
        (Grammar(kind="regex", text="[ab]+c"), "abac", "abd"),
        (Grammar(kind="choice", text='["yes", "no \\"really\\""]'), 'no "really"', "no"),
        (Grammar(kind="ebnf", text='root ::= "(" root ")" | "x"'), "((x))", "((x)"),
    )
    for grammar, good, bad in cases:
        assert takes(grammar, good)
        assert not takes(grammar, bad)


@pytest.mark.parametrize(
    "grammar",
    [of_schema({"type": "nothing"}), of_schema({"$ref": "#/nowhere"}), Grammar(kind="regex", text="(a"),
     Grammar(kind="json_schema", text="{"), Grammar(kind="choice", text="[]"), Grammar(kind="ebnf", text="nonsense")],
)  # fmt: skip
def test_a_bad_grammar_is_one_sentence(grammar: Grammar) -> None:
    """It names the kind and the reason."""
    with pytest.raises(InvalidInput, match=f"this {grammar.kind} cannot be used: ") as refused:
        COMPILER.compile(grammar)
    assert "\n" not in str(refused.value)
