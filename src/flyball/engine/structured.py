"""Answers of a given form: a JSON schema, an expression or a grammar becomes a mask over the next token (xgrammar).

Compiling can take a while and is done before a request reaches the engine thread; compiled forms are kept, the least
recently used are dropped first. A matcher walks along one answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Set
from typing import Any

from flyball.core.errors import InvalidInput, MissingExtra
from flyball.engine.request import Grammar

_CACHE_BYTES = 64 * 2**20

# What xgrammar writes for a character of a bounded string, and what it should be.
_TOO_MUCH = r"[^\"\\\r\n]"
_STRING_CHARACTER = r"[^\"\\\0-\x1f\uD800-\uDFFF]"


class GrammarCompiler:
    """Grammars of one model's tokens; safe to call from several threads."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Set[int]) -> None:  # noqa: ANN401  # untyped
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = sorted(eos_token_ids)
        self._compiler: Any = None

    def compile(self, grammar: Grammar) -> Any:  # noqa: ANN401  # untyped library
        """The compiled grammar; raises InvalidInput for one that cannot be used, MissingExtra without xgrammar."""
        compiler = self._ready()
        try:
            if grammar.kind == "regex":
                return compiler.compile_regex(grammar.text)
            if grammar.kind == "json_object":
                return compiler.compile_json_schema('{"type": "object"}')
            if grammar.kind == "json_schema":
                return _compile_schema(compiler, json.dumps(json.loads(grammar.text)))
            text = _one_of(grammar.text) if grammar.kind == "choice" else grammar.text
            return compiler.compile_grammar(text)
        except (RuntimeError, ValueError, TypeError) as error:
            reason = re.sub(r"^\[.*?\] \S+: ", "", str(error).strip()).splitlines()[0] if str(error).strip() else error
            raise InvalidInput(f"this {grammar.kind} cannot be used: {reason}; change it") from error

    def matcher(self, grammar: Grammar) -> Any:  # noqa: ANN401  # untyped library
        """What follows one answer of this form, from its first token on."""
        compiled = self.compile(grammar)
        import xgrammar

        return xgrammar.GrammarMatcher(compiled)

    def _ready(self) -> Any:  # noqa: ANN401  # untyped library
        if self._compiler is None:
            if self._tokenizer is None:
                raise InvalidInput("this model's folder holds no tokenizer, so answers cannot be held to a form")
            try:
                import xgrammar
            except ImportError as error:
                raise MissingExtra(
                    "structured output needs xgrammar, which is not installed; run: pip install 'flyball[structured]'"
                ) from error
            info = xgrammar.TokenizerInfo.from_huggingface(
                self._tokenizer, vocab_size=self._vocab_size, stop_token_ids=self._eos
            )
            self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=_CACHE_BYTES)
        return self._compiler


def _compile_schema(compiler: Any, schema: str) -> Any:  # noqa: ANN401  # untyped library
    """Put right what xgrammar 0.2.8 lets into strings of bounded length.

    That is raw control characters, which JSON forbids, and surrogates, which are no UTF-8 and are decoded to more
    characters than were counted.
    """
    import xgrammar

    text = str(xgrammar.Grammar.from_json_schema(schema))
    if _TOO_MUCH not in text:
        return compiler.compile_json_schema(schema)
    return compiler.compile_grammar(text.replace(_TOO_MUCH, _STRING_CHARACTER))


def _one_of(text: str) -> str:
    """A grammar of alternatives, from a JSON list of strings."""
    choices = json.loads(text)
    if not (isinstance(choices, list) and choices and all(isinstance(c, str) and c for c in choices)):
        raise ValueError("give a list of texts, none of them empty")
    return "root ::= " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
