"""Text at the edges of the engine: prompts and chats to token ids, token ids to text as they come, stop strings.

The engine itself deals in token ids. Whoever speaks text with a client holds one `TextCodec` for the model, and one
`Detokenizer` and one `StopStrings` for each answer.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from flyball.core.errors import InvalidInput

Decode = Callable[[list[int]], str]

_UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet one
_MAX_PENDING = 3  # a character of four bytes may still come after three; byte-fallback decoders write one mark a byte
_CONTEXT_TOKENS = 5  # of the prompt, so that decoders which trim a text's first space leave it to the answer
_LONG_WINDOW = 64


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    chat_template: Any

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """Tokens outside the vocabulary proper, each with a flag `special`."""
        ...

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> Mapping[str, Any]:
        """Encode; the ids are under `input_ids`. Verbose: warn of texts longer than the model's context."""
        ...

    def decode(self, ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """Ids to text."""
        ...

    def apply_chat_template(
        self, messages: list[Mapping[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """A conversation in the model's own form."""
        ...

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        """A token as the vocabulary spells it; None for an id beyond it."""
        ...


class TextCodec:
    """One model's text to token ids and back; safe to call from several threads.

    A Hugging Face fast tokenizer fails with "Already borrowed" when one thread sets its truncation while another
    encodes, hence the lock.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._special = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        self._decode = self._decoder()
        self._bytes: dict[int, bytes] = {}  # of single tokens, as they are asked for
        self._is_byte_level = "ByteLevel" in _decoder_types(tokenizer)
        self._anchor: list[int] | None = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, with the special tokens that the tokenizer puts around a text by itself."""
        return self._encode(text, add_special_tokens=add_special_tokens)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation in the model's own chat template, up to where the assistant speaks next.

        Raises InvalidInput when the model has no template, or when the template refuses the conversation.
        """
        from jinja2 import TemplateError

        if not self._tokenizer.chat_template:
            raise InvalidInput(
                "this model's tokenizer has no chat template; send a plain prompt to /v1/completions instead"
            )
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise InvalidInput(f"the model's chat template refuses these messages: {error}") from error
        return self._encode(text, add_special_tokens=False)  # the template wrote them

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out and spaces left as they are."""
        return self._decode(list(ids))

    def detokenizer(self, context: Sequence[int] = (), *, show_special: bool = False) -> Detokenizer:
        """Text of one answer as it comes, after a prompt of these ids, whose own text is not given out."""
        if show_special:
            return Detokenizer(self._decoder(skip_special_tokens=False), frozenset(), context)
        return Detokenizer(self._decode, self._special, context)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text, in UTF-8; it may be part of a character. A special token is its own name."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spell(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        r"""One token as OpenAI shows it: its text, or `bytes:\xf0\x9f` where that is no whole character."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _spell(self, token_id: int) -> bytes:
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # models pad their vocabulary
            return b""
        if token_id in self._tokenizer.added_tokens_decoder:
            return token.encode()
        if self._is_byte_level:
            return bytes(_BYTE_OF[character] for character in token)
        if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            return bytes.fromhex(byte[1])
        if self._anchor is None:  # behind another token, since decoders trim a text's first space
            self._anchor = self._encode("a", add_special_tokens=False)[-1:]
        return self._decode([*self._anchor, token_id])[len(self._decode(self._anchor)) :].encode()

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidInput(f"the text cannot be encoded ({error}); send whole Unicode characters") from error
        with self._lock:
            ids: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return ids

    def _decoder(self, *, skip_special_tokens: bool = True) -> Decode:
        """The Rust tokenizer's own decoding where there is one: the wrapper costs three times the call."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        skip = skip_special_tokens
        if backend is not None:
            return lambda ids: str(backend.decode(ids, skip_special_tokens=skip))
        return lambda ids: self._tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def _decoder_types(tokenizer: Tokenizer) -> set[str]:
    """The parts that a fast tokenizer's decoder is made of; none for a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)

    def types(part: Any) -> Iterator[str]:  # noqa: ANN401  # JSON
        if part:
            yield part["type"]
            for inner in part.get("decoders", ()):
                yield from types(inner)

    return set(types(json.loads(backend.to_str())["decoder"])) if backend is not None else set()


def _byte_of() -> dict[str, int]:
    """Byte-level tokenizers write each byte as one printable character: itself, or the next free one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}


_BYTE_OF = _byte_of()


class Detokenizer:
    """Text of one answer as its tokens come: the pieces together are the text of all tokens together.

    Only a short window of tokens is decoded again at each step. It begins where the text before the last one settled
    (vLLM and TGI call its two marks prefix and read offset), since a token's text can depend on its neighbour. A tail
    that may yet become a character is held back; `flush` gives what is left of it at the end. Exact for byte-level
    tokenizers on any ids; for byte-fallback ones wherever the bytes are valid UTF-8, because those decoders change
    characters already complete when an invalid byte follows.
    """

    def __init__(self, decode: Decode, special: frozenset[int], context: Sequence[int]) -> None:
        self._decode = decode
        self._special = special  # ids without text
        self._window = [i for i in context[-_CONTEXT_TOKENS:] if i not in self._special]
        self._fresh = len(self._window)  # index in the window of the first token whose text has not all settled
        text = self._decode(self._window)
        self._given = len(text) - _pending(text)  # characters of the window's text that were given out

    def push(self, ids: Sequence[int]) -> str:
        """The text that these tokens settle; often one token's, sometimes none."""
        self._window += [i for i in ids if i not in self._special]
        text = self._decode(self._window)
        settled = len(text) - _pending(text)
        new = text[self._given : settled]
        self._given = max(self._given, settled)
        if new and settled == len(text):
            self._window = self._window[self._fresh :]
            self._fresh = len(self._window)
            self._given = len(self._decode(self._window))
        elif len(self._window) > _LONG_WINDOW:
            self._drop_settled_half(text)
        return new

    def flush(self) -> str:
        """What was held back, when no token follows any more."""
        text = self._decode(self._window)
        rest = text[self._given :]
        self._given = max(self._given, len(text))
        return rest

    def _drop_settled_half(self, text: str) -> None:
        """Keep the window short when bytes keep coming that are no characters.

        Where both halves decode to the whole's text, no character crosses the cut, nor will one: what follows the cut
        is there already.
        """
        middle = len(self._window) // 2
        head = self._decode(self._window[:middle])
        if len(head) <= self._given and head + self._decode(self._window[middle:]) == text:
            self._window = self._window[middle:]
            self._fresh = max(0, self._fresh - middle)
            self._given -= len(head)


def _pending(text: str) -> int:
    """Characters at the end of a text that a next byte might still change."""
    return min(len(text) - len(text.rstrip(_UNFINISHED)), _MAX_PENDING)


class StopStrings:
    """Cuts an answer before the first stop string to be completed, however the text is split into pieces.

    Of two that end at the same character the longer wins. At most `max(len(stop)) - 1` characters are held back, and
    only while they are the beginning of a stop string.

    >>> stops = StopStrings(["STOP"])
    >>> stops.push("one ST"), stops.push("AR STO"), stops.push("P two")
    (('one ', None), ('STAR ', None), ('', 'STOP'))
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        if not all(stops):
            raise InvalidInput("a stop string is empty; give at least one character, or leave it out")
        self._stops = tuple(stops)
        self._include = include  # show the stop string, too
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that may be shown, and the stop string that ended the answer, if one did."""
        if not self._stops:
            return text, None
        text = self._held + text
        matches = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if matches:
            end, start, stop = min(matches)
            self._held = ""
            return text[: end if self._include else start], stop
        kept = len(text) - self._beginning(text)
        self._held = text[kept:]
        return text[:kept], None

    def flush(self) -> str:
        """What was held back, when no text follows any more."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """Length of the longest tail of the text with which a stop string begins."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
