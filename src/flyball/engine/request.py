"""One request inside the engine: what was asked, what is known, and how much of it has valid KV."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from flyball.core.errors import InvalidInput


class FinishReason(Enum):
    """Why a request ended."""

    STOP = "stop"  # end-of-sequence or a stop token
    LENGTH = "length"  # max_tokens reached
    ABORT = "abort"  # the caller went away
    ERROR = "error"  # the engine failed


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    The order is temperature, top-k, top-p, min-p, as in the field. `temperature=0` is greedy: the lowest id wins a tie;
    so is any below 1e-5, by which logits could not be divided in float32.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None  # None: drawn by the engine when the request is added
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        checks = (
            (self.max_tokens >= 1, f"max_tokens={self.max_tokens}: ask for at least 1"),
            (self.temperature >= 0 and math.isfinite(self.temperature),
             f"temperature={self.temperature}: give 0 (greedy) or a positive number"),
            (self.top_k >= 0, f"top_k={self.top_k}: give 0 (off) or a count of tokens"),
            (0 < self.top_p <= 1, f"top_p={self.top_p}: give a share above 0 and up to 1"),
            (0 <= self.min_p <= 1, f"min_p={self.min_p}: give a share from 0 to 1"),
        )  # fmt: skip
        for good, sentence in checks:
            if not good:
                raise InvalidInput(sentence)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, whatever the seed."""
        return self.temperature < 1e-5


@dataclass(slots=True, eq=False)
class Request:
    """State of one request; only the scheduler and the engine core change it."""

    id: str
    prompt_ids: list[int]
    params: SamplingParams
    arrival_s: float
    seed: int
    salt: bytes = b""  # prefix blocks are shared between requests of one salt only
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0  # tokens with valid KV
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of full blocks of known tokens
    num_hashed_blocks: int = 0  # leading blocks of the table that the pool knows by hash
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache at first admission
    num_preemptions: int = 0
    last_step: int = -1  # last step that scheduled it
    finish_reason: FinishReason | None = None
    first_scheduled_s: float | None = None
    first_token_s: float | None = None

    @property
    def num_known(self) -> int:
        """Prompt and output tokens."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def deficit(self) -> int:
        """Known tokens whose KV is still to be computed; 1 while decoding."""
        return self.num_known - self.num_computed

    def tokens(self, start: int, stop: int) -> list[int]:
        """Known tokens start..stop."""
        prompt = len(self.prompt_ids)
        if stop <= prompt:
            return self.prompt_ids[start:stop]
        if start >= prompt:
            return self.output_ids[start - prompt : stop - prompt]
        return self.prompt_ids[start:] + self.output_ids[: stop - prompt]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """What one step gave one request."""

    request_id: str
    new_token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    error: str | None = None  # one sentence, with FinishReason.ERROR
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
