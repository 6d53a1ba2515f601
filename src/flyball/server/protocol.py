"""Bodies that clients send. What we do not know is ignored; what we know but cannot do is refused by name."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from flyball.engine.request import Grammar, Optimization, SamplingParams
from flyball.server.errors import ApiError, invalid

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Prompt = str | list[TokenId]

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for completions; a chat's default is all that fits
MAX_ANSWERS = 1024  # of one request
MAX_STOPS = 64
MAX_STOP_LENGTH = 1024  # characters; each may be held back while the answer is streamed

# Fields that would change the answer, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "prompt_logprobs": (),
    "suffix": ("",),
    "bad_words": ([],),
    "use_beam_search": (False,),
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
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "truncate_prompt_tokens": (),
}
_INSTEAD = {f"guided_{kind}": "use structured_outputs instead" for kind in ("json", "regex", "choice", "grammar")}


class StreamOptions(BaseModel):
    """How to stream."""

    include_usage: bool = False


class ResponseFormat(BaseModel):
    """What the answer must look like: any text, any JSON object, JSON of a schema, or a regular expression."""

    model_config = ConfigDict(extra="allow")

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: dict[str, Any] | None = None  # {"name": ..., "schema": {...}}, as OpenAI has it
    pattern: str | None = None  # of type regex

    def grammar(self) -> Grammar | None:
        """For the engine; None for text."""
        if self.type == "json_schema":
            schema = (self.json_schema or {}).get("schema")
            if not isinstance(schema, dict | bool):
                raise invalid(
                    "response_format",
                    "response_format of type json_schema needs json_schema.schema, a JSON schema; give one",
                )
            return Grammar(kind="json_schema", text=json.dumps(schema))
        if self.type == "regex":
            if not self.pattern:
                raise invalid("response_format", "response_format of type regex needs a field pattern; give one")
            return Grammar(kind="regex", text=self.pattern)
        return Grammar(kind="json_object") if self.type == "json_object" else None


class StructuredOutputs(BaseModel):
    """The same and more, in vLLM's words; exactly one of these."""

    model_config = ConfigDict(extra="forbid")

    json_object: Literal[True] | None = None
    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: Annotated[str, Field(min_length=1)] | None = None
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    grammar: Annotated[str, Field(min_length=1)] | None = None  # EBNF, with a rule `root`

    def engine_grammar(self) -> Grammar:
        """For the engine."""
        given: list[Grammar] = []
        if self.json_object:
            given.append(Grammar(kind="json_object"))
        if self.json_ is not None:
            text = self.json_ if isinstance(self.json_, str) else json.dumps(self.json_)
            given.append(Grammar(kind="json_schema", text=text))
        if self.regex is not None:
            given.append(Grammar(kind="regex", text=self.regex))
        if self.choice is not None:
            given.append(Grammar(kind="choice", text=json.dumps(self.choice)))
        if self.grammar is not None:
            given.append(Grammar(kind="ebnf", text=self.grammar))
        if len(given) != 1:
            raise invalid(
                "structured_outputs",
                "structured_outputs needs exactly one of json, json_object, regex, choice and grammar; give one",
            )
        return given[0]


class SamplingBody(BaseModel):
    """What every route that generates understands."""

    model_config = ConfigDict(extra="allow")

    max_tokens: int | None = None
    max_completion_tokens: int | None = None  # OpenAI's newer word for max_tokens
    min_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None  # 0 or -1: all
    min_p: float | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[TokenId, float] | None = None
    allowed_token_ids: list[TokenId] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True  # false: show tokens such as the end of a turn by their names
    structured_outputs: StructuredOutputs | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None  # lower goes first under policy "priority"
    timeout: Annotated[float, Field(gt=0, le=1e6)] | None = None  # seconds to the last token
    cache_salt: Annotated[str, Field(min_length=1)] | None = None  # prefixes are shared within one salt only
    optimization: Optimization = "full"  # what the engine may do for it; see engine.request.Optimization
    stream: bool | None = None
    return_token_ids: bool | None = None  # put each chunk's token ids beside its text, as vLLM does

    def stops(self) -> list[str]:
        """The stop strings."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_LENGTH for stop in stops):
            raise invalid("stop", f"stop: give at most {MAX_STOPS} strings of at most {MAX_STOP_LENGTH} characters")
        return stops

    def token_limit(self) -> int | None:
        """The answer's limit, by either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def answers(self) -> int:
        """How many answers to each prompt."""
        return 1

    def top_logprobs_wanted(self) -> int | None:
        """How many alternatives of each token to tell; None: no log-probabilities at all."""
        return None

    def grammar(self) -> Grammar | None:
        """What the answer must look like."""
        return self.structured_outputs.engine_grammar() if self.structured_outputs else None

    def refuse_unsupported(self) -> None:
        """Raise for the first field that asks for something this server does not do."""
        for name, value in (self.model_extra or {}).items():
            if name in _UNSUPPORTED and value is not None and not _neutral(value, _UNSUPPORTED[name]):
                raise ApiError(
                    400,
                    f"{name}={_short(value)} is not supported by this server; "
                    f"{_INSTEAD.get(name, 'leave the field out')}",
                    code="unsupported_field",
                    param=name,
                )

    def sampling(self, *, max_tokens: int) -> SamplingParams:
        """The engine's parameters; raises InvalidInput for a value out of range."""
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            temperature=_or(self.temperature, 1.0),
            top_k=0 if self.top_k in (None, -1) else self.top_k,
            top_p=_or(self.top_p, 1.0),
            min_p=_or(self.min_p, 0.0),
            seed=self.seed,
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            logit_bias=tuple((self.logit_bias or {}).items()),
            allowed_token_ids=tuple(self.allowed_token_ids or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            logprobs=self.top_logprobs_wanted(),
            grammar=self.grammar(),
            n=self.answers(),
            priority=self.priority or 0,
            timeout_s=self.timeout,
            optimization=self.optimization,
        )


class OpenAIBody(SamplingBody):
    """What completions and chats have in common."""

    model: str | None = None  # None: the one model served
    n: int | None = None
    response_format: ResponseFormat | None = None
    stream_options: StreamOptions | None = None

    def answers(self) -> int:
        """How many answers to each prompt."""
        return 1 if self.n is None else self.n

    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def grammar(self) -> Grammar | None:
        """What the answer must look like, by OpenAI's field or vLLM's."""
        wanted = self.response_format.grammar() if self.response_format else None
        if wanted is None:
            return super().grammar()
        if self.structured_outputs is not None:
            raise invalid("structured_outputs", "give response_format or structured_outputs, not both")
        return wanted

    def refuse_unsupported(self) -> None:
        """Raise for the first field that asks for something this server does not do."""
        super().refuse_unsupported()
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "stream_options is only for streams; set stream to true or leave it out")


class CompletionBody(OpenAIBody):
    """POST /v1/completions."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    logprobs: Count | None = None  # alternatives of each token; OpenAI stops at 5, we at 20
    echo: bool = False  # begin each answer with its prompt

    def prompts(self) -> list[Prompt]:
        """Each prompt, as text or as token ids; one list of ids is one prompt."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return cast("list[Prompt]", self.prompt)

    def top_logprobs_wanted(self) -> int | None:
        """A count; 0 asks for the chosen tokens' own."""
        return self.logprobs

    def refuse_unsupported(self) -> None:
        """Raise for the first field that asks for something this server does not do."""
        super().refuse_unsupported()
        if self.echo and self.logprobs is not None:
            raise invalid("echo", "echo with logprobs would need the prompt's log-probabilities; leave one of them out")


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


class GenerateBody(SamplingBody):
    """POST /v1/generate."""

    prompt: Prompt


class BatchBody(SamplingBody):
    """POST /v1/generate/batch: prompts that share what stands beside them, or requests of their own."""

    prompts: Annotated[list[Prompt], Field(max_length=MAX_ANSWERS)] | None = None
    requests: Annotated[list[GenerateBody], Field(max_length=MAX_ANSWERS)] | None = None

    def bodies(self) -> list[GenerateBody]:
        """Each request."""
        if (self.prompts is None) == (self.requests is None):
            raise invalid("prompts", "give either prompts, a list, or requests, a list of bodies of /v1/generate")
        if self.requests is not None:
            return self.requests
        shared = self.model_dump(exclude={"prompts", "requests"}, by_alias=True, exclude_unset=True)
        return [GenerateBody.model_validate({**shared, "prompt": prompt}) for prompt in self.prompts or ()]


class TokenizeBody(BaseModel):
    """POST /v1/tokenize: a text, or a conversation in the model's own form."""

    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool = True  # of a text; a conversation's template writes its own
    return_token_strs: bool = False


class DetokenizeBody(BaseModel):
    """POST /v1/detokenize."""

    tokens: list[TokenId]


class ChatBody(OpenAIBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Count | None = None

    def top_logprobs_wanted(self) -> int | None:
        """Only with logprobs, as OpenAI has it."""
        if not self.logprobs:
            if self.top_logprobs:
                raise invalid("top_logprobs", "top_logprobs needs logprobs; set logprobs to true or leave both out")
            return None
        return self.top_logprobs or 0


def _neutral(value: Any, neutral: tuple[object, ...]) -> bool:  # noqa: ANN401  # anything JSON can hold
    return any(type(value) is type(other) and value == other for other in neutral)


def _short(value: object) -> str:
    """A value as a message shows it; a client may send a megabyte."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
