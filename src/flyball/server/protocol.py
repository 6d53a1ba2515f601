"""Bodies that clients send. What we do not know is ignored; what we know but cannot do yet is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from flyball.engine.request import SamplingParams
from flyball.server.errors import ApiError

TokenId = Annotated[int, Field(ge=0, lt=2**31)]

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for completions; a chat's default is all that fits

# Fields that would change the answer, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "min_tokens": (0,),
    "include_stop_str_in_output": (False,),
    "use_beam_search": (False,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
}


class StreamOptions(BaseModel):
    """How to stream."""

    include_usage: bool = False


class GenerationBody(BaseModel):
    """What completions and chats have in common."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None  # None: the one model served
    max_tokens: int | None = None
    max_completion_tokens: int | None = None  # OpenAI's newer word for max_tokens
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None  # 0 or -1: all
    min_p: float | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None  # put each chunk's token ids beside its text, as vLLM does

    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def token_limit(self) -> int | None:
        """The answer's limit, by either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def refuse_unsupported(self) -> None:
        """Raise for the first field that asks for something this server does not do."""
        for name, value in (self.model_extra or {}).items():
            if name in _UNSUPPORTED and value is not None and not _neutral(value, _UNSUPPORTED[name]):
                raise ApiError(
                    400,
                    f"{name}={value!r} is not supported by this server; leave the field out",
                    code="unsupported_field",
                    param=name,
                )
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400,
                "stream_options is only for streams; set stream to true or leave it out",
                code="invalid_value",
                param="stream_options",
            )

    def sampling(self, *, max_tokens: int) -> SamplingParams:
        """The engine's parameters; raises InvalidInput for a value out of range."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=0 if self.top_k in (None, -1) else self.top_k,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=0.0 if self.min_p is None else self.min_p,
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
        )


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as token ids; one list of ids is one prompt."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return cast("list[str | list[int]]", self.prompt)


class TextPart(BaseModel):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """As chat templates take it; `developer` is OpenAI's newer word for `system`."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]


def _neutral(value: Any, neutral: tuple[object, ...]) -> bool:  # noqa: ANN401  # anything JSON can hold
    return any(type(value) is type(other) and value == other for other in neutral)
