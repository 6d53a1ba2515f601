"""One request inside the engine: what was asked, what is known, and how much of it has valid KV."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from flyball.core.errors import InvalidInput

MAX_LOGPROBS = 20  # OpenAI's bound on top_logprobs
MAX_CHOICES = 128  # OpenAI's bound on n


class FinishReason(Enum):
    """Why a request ended."""

    STOP = "stop"  # end-of-sequence, a stop token, or a grammar that is complete
    LENGTH = "length"  # max_tokens reached
    ABORT = "abort"  # the caller went away
    TIMEOUT = "timeout"  # its deadline passed, waiting or running
    ERROR = "error"  # the engine failed


Optimization = Literal["none", "basic", "full"]
"""What the engine may do for a request: `none` runs it in steps of its own, without prefix cache and speculation;
`basic` batches it with others; `full` adds the prefix cache and speculation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What an answer must look like."""

    kind: Literal["json_object", "json_schema", "regex", "ebnf", "choice"]
    text: str = ""  # the schema as JSON, the expression, the grammar, or a JSON list of choices; empty: json_object


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen, when to stop, and how the request is treated.

    Logits are changed by the penalties (repetition, then frequency and presence), then by bias and masks; the order of
    the filters is temperature, top-k, top-p, min-p, as in the field. `temperature=0` is greedy: the lowest id wins a
    tie; so is any below 1e-5, by which logits could not be divided in float32.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None  # None: drawn by the engine when the request is added; choice i of n uses seed + i
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0  # until then neither the end of sequence nor a stop token is chosen
    presence_penalty: float = 0.0  # subtracted from the logit of each token the answer holds
    frequency_penalty: float = 0.0  # the same, times how often it holds it
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens of prompt and answer
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    allowed_token_ids: tuple[int, ...] = ()  # empty: all
    logprobs: int | None = None  # None: none; k: of the chosen token and of the k likeliest ones, raw
    grammar: Grammar | None = None
    n: int = 1  # answers to one prompt
    priority: int = 0  # under the policy `priority`, lower goes first
    timeout_s: float | None = None  # from arrival to the last token; None: the knob request_timeout_s
    optimization: Optimization = "full"

    def __post_init__(self) -> None:
        checks = (
            (self.max_tokens >= 1, f"max_tokens={self.max_tokens}: ask for at least 1"),
            (self.temperature >= 0 and math.isfinite(self.temperature),
             f"temperature={self.temperature}: give 0 (greedy) or a positive number"),
            (self.top_k >= 0, f"top_k={self.top_k}: give 0 (off) or a count of tokens"),
            (0 < self.top_p <= 1, f"top_p={self.top_p}: give a share above 0 and up to 1"),
            (0 <= self.min_p <= 1, f"min_p={self.min_p}: give a share from 0 to 1"),
            (0 <= self.min_tokens <= self.max_tokens,
             f"min_tokens={self.min_tokens}: give a count from 0 to max_tokens={self.max_tokens}"),
            (-2 <= self.presence_penalty <= 2, f"presence_penalty={self.presence_penalty}: give -2 to 2"),
            (-2 <= self.frequency_penalty <= 2, f"frequency_penalty={self.frequency_penalty}: give -2 to 2"),
            (1e-3 <= self.repetition_penalty <= 1e3,
             f"repetition_penalty={self.repetition_penalty}: give a positive number, 1 for none, at most 1000"),
            (all(-100 <= bias <= 100 for _, bias in self.logit_bias),
             "logit_bias holds a value outside -100 to 100; give one inside"),
            (self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
             f"logprobs={self.logprobs}: give a count of alternatives from 0 to {MAX_LOGPROBS}"),
            (1 <= self.n <= MAX_CHOICES, f"n={self.n}: ask for 1 to {MAX_CHOICES} answers"),
            (self.timeout_s is None or self.timeout_s > 0,
             f"timeout_s={self.timeout_s}: give seconds above 0, or leave it out"),
            (self.grammar is None or not (self.min_tokens or self.allowed_token_ids),
             "a grammar decides itself which tokens are allowed and when the answer ends; leave out min_tokens and "
             "allowed_token_ids"),
        )  # fmt: skip
        for good, sentence in checks:
            if not good:
                raise InvalidInput(sentence)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, whatever the seed."""
        return self.temperature < 1e-5

    @property
    def penalized(self) -> bool:
        """Whether what was said before changes what is said next."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def edited(self) -> bool:
        """Whether logits are changed before they are sampled from."""
        return bool(
            self.penalized or self.min_tokens or self.logit_bias or self.allowed_token_ids or self.grammar is not None
        )


@dataclass(slots=True, eq=False)
class Request:
    """State of one answer; only the scheduler and the engine core change it."""

    id: str
    prompt_ids: list[int]
    params: SamplingParams
    arrival_s: float
    seed: int
    salt: bytes = b""  # prefix blocks are shared between requests of one salt only
    group: str = ""  # what the caller asked for: n answers are n requests of one group
    index: int = 0  # among the answers of its group
    deadline_s: float | None = None
    order: int = 0  # of arrival, given by the scheduler
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0  # tokens with valid KV
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of full blocks of known tokens
    num_hashed_blocks: int = 0  # leading blocks of the table that the pool knows by hash
    epoch: int = 0  # of the prefix cache, when its KV was begun
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache at first admission
    num_preemptions: int = 0
    batch_size_seen: int = 0  # largest number of requests in one step with it
    last_step: int = -1  # last step that scheduled it
    finish_reason: FinishReason | None = None
    num_sent: int = 0  # output tokens that the caller has
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of output tokens that the caller has not
    error: str | None = None  # one sentence, with FinishReason.ERROR
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    edits: Any = None  # the sampler's own state for it, where its logits are changed
    matcher: Any = None  # where in its grammar the answer is
    spec_ids: list[int] = field(default_factory=list)  # guessed tokens after the known ones, while they are verified
    spec_accepted: int = 0  # guessed tokens that were kept
    draft_computed: int = 0  # tokens with valid KV of the draft model
    lookup: Any = None  # of its own text, for guesses by n-grams
    medusa_state: tuple[int, Any] | None = None  # known tokens, and the model's state [d] under the newest
    edited: bool = field(init=False)
    plain: bool = field(init=False)  # not edited, and nothing but the token is wanted
    solo: bool = field(init=False)  # runs in steps of its own
    caching: bool = field(init=False)  # may read and write the prefix cache

    def __post_init__(self) -> None:
        self.group = self.group or self.id
        self.edited = self.params.edited
        self.plain = not self.edited and self.params.logprobs is None
        self.solo = self.params.optimization == "none"
        self.caching = self.params.optimization == "full"

    @property
    def num_known(self) -> int:
        """Prompt and output tokens."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def deficit(self) -> int:
        """Known tokens whose KV is still to be computed; 1 while decoding."""
        return self.num_known - self.num_computed

    def tokens(self, start: int, stop: int) -> list[int]:
        """Known tokens start..stop, and guessed ones beyond."""
        prompt = len(self.prompt_ids)
        if self.spec_ids and stop > self.num_known:
            known = self.tokens(start, self.num_known) if start < self.num_known else []
            return known + self.spec_ids[max(0, start - self.num_known) : stop - self.num_known]
        if stop <= prompt:
            return self.prompt_ids[start:stop]
        if start >= prompt:
            return self.output_ids[start - prompt : stop - prompt]
        return self.prompt_ids[start:] + self.output_ids[: stop - prompt]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of raw probabilities at one place: of the token chosen and of the likeliest ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), likeliest first


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestReport:
    """What really happened to an answer; comes with its last output. Times are the engine clock's, monotonic."""

    arrival_s: float
    first_scheduled_s: float | None  # None: it never ran
    first_token_s: float | None
    finished_s: float
    num_preemptions: int
    batch_size_seen: int  # largest number of requests in one step with it; 1: it always ran alone
    num_cached_tokens: int
    spec_accepted_tokens: int = 0  # drafted tokens that were kept


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """What one step gave one answer; with `stream_interval` above 1, what several steps gave it."""

    request_id: str  # the group's: as the caller named it
    new_token_ids: tuple[int, ...]
    index: int = 0  # which of the n answers
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one for each new token, if asked for
    finish_reason: FinishReason | None = None  # of this answer; the request ends with its last answer
    error: str | None = None  # one sentence, with FinishReason.ERROR
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    report: RequestReport | None = None  # with finish_reason
