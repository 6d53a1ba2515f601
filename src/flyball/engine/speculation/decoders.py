"""Speculative decoding for programs without a server: a prompt in, an answer and what was guessed of it out.

Both decoders run an engine of their own in a thread, so that the event loop is never held up, and any number of calls
share its steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from flyball.core.errors import EngineFailed, InvalidInput
from flyball.engine.async_engine import AsyncEngine
from flyball.engine.config import EngineConfig, Method
from flyball.engine.request import FinishReason, SamplingParams
from flyball.engine.text import TextCodec


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """How much is guessed at once, and how tokens are chosen; temperature and top-p hold for model and draft alike."""

    num_speculative_tokens: int = 4  # the most; fewer are tried where lately fewer were kept
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    seed: int | None = None  # the same one gives the same answer; None: each answer another

    def __post_init__(self) -> None:
        if self.num_speculative_tokens < 1:
            raise InvalidInput(f"num_speculative_tokens={self.num_speculative_tokens}: guess at least 1")
        self.params(1)

    def params(self, max_tokens: int, *, ignore_eos: bool = False) -> SamplingParams:
        """As the engine takes it; raises InvalidInput for a value out of range."""
        return SamplingParams(
            max_tokens=max_tokens, temperature=self.temperature, top_p=self.top_p, seed=self.seed, ignore_eos=ignore_eos
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeResult:
    """One answer, and how it came about."""

    text: str | None  # None: the model's folder holds no tokenizer
    token_ids: tuple[int, ...]  # the token that ended the answer included
    finish_reason: str  # stop, length or error
    steps: int  # of the model, in which tokens came
    accepted_tokens: int  # guesses that were kept; the others are the model's own, one a step
    error: str | None = None

    @property
    def tokens_per_step(self) -> float:
        """1 without any guess kept."""
        return len(self.token_ids) / self.steps if self.steps else math.nan


class _Decoder:
    """An engine that guesses by one method; begins with `start` or `async with`."""

    def __init__(self, engine: EngineConfig, method: Method, config: SpeculativeConfig, seed: int | None) -> None:
        self.config = config
        self.engine = AsyncEngine(replace(engine, spec_method=method), seed=seed)
        tokenizer = self.engine.tokenizer
        self._codec = TextCodec(tokenizer) if tokenizer is not None else None
        self._ids = itertools.count()
        self._started = False

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Begin to work; a second call does nothing."""
        if not self._started:
            self._started = True
            self.engine.start()
            changes = {"num_speculative_tokens": self.config.num_speculative_tokens}
            await self.engine.update_runtime(changes, by=type(self).__name__)

    async def stop(self) -> None:
        """End; calls under way fail."""
        if self._started:
            await self.engine.stop()

    @property
    def acceptance_rate(self) -> float:
        """Guesses kept over guesses made since the start; not a number before the first."""
        stats = self.engine.stats()
        return stats.spec_accepted_tokens / stats.spec_draft_tokens if stats.spec_draft_tokens else math.nan

    async def generate(
        self, prompt: str | Sequence[int], max_tokens: int = 100, *, ignore_eos: bool = False
    ) -> SpeculativeResult:
        """Answer a prompt, text or token ids, with at most `max_tokens` tokens; cancelling the call drops it.

        Raises InvalidInput or ContextLengthExceeded where it is not taken, EngineFailed where the engine ended.
        """
        ids = self._encode(prompt)
        tokens: list[int] = []
        steps = 0
        outputs = self.engine.generate(
            ids, self.config.params(max_tokens, ignore_eos=ignore_eos), request_id=f"decode-{next(self._ids)}"
        )
        async with aclosing(outputs):
            async for output in outputs:
                tokens += output.new_token_ids
                steps += bool(output.new_token_ids)
                finish = output.finish_reason
                if finish is None:
                    continue
                if finish is FinishReason.ABORT:
                    break
                shown = tokens[:-1] if finish is FinishReason.STOP else tokens
                return SpeculativeResult(
                    text=self._decode(ids, shown),
                    token_ids=tuple(tokens),
                    finish_reason=finish.value,
                    steps=steps,
                    accepted_tokens=output.report.spec_accepted_tokens if output.report else 0,
                    error=output.error,
                )
        raise EngineFailed("the answer was dropped because the decoder stopped; ask again after start()")

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self._codec is None:
            raise InvalidInput("the model's folder holds no tokenizer; give the prompt as token ids")
        return self._codec.encode(prompt)

    def _decode(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str | None:
        if self._codec is None:
            return None
        text = self._codec.detokenizer(prompt_ids)
        return text.push(ids) + text.flush()


class SpeculativeDecoder(_Decoder):
    """A small model guesses, the large one verifies: the answers are the large model's.

    Greedy answers are those of the large model token for token, sampled ones have its distribution.

        async with SpeculativeDecoder(Path("large"), Path("small")) as decoder:
            result = await decoder.generate("Once upon", max_tokens=50)
    """

    def __init__(
        self,
        target_model: Path,
        draft_model: Path,
        config: SpeculativeConfig | None = None,
        *,
        engine: EngineConfig | None = None,
        seed: int | None = None,
    ) -> None:
        """`engine` holds what else an engine may be told; `seed` is that of answers whose `config` names none.

        Raises InvalidInput for a draft of another vocabulary or with too few positions.
        """
        base = replace(engine or EngineConfig(model=target_model), model=target_model, draft_model=draft_model)
        super().__init__(base, "draft", config or SpeculativeConfig(), seed)


class MedusaDecoder(_Decoder):
    """Heads on the model's last state guess, the model verifies all guesses in one step, as a chain.

    Answers are the model's, token for token at any temperature with a seed. Each head gives its first choice alone:
    trees of several candidates a head are not verified.
    """

    def __init__(
        self,
        model: Path,
        heads: Path,
        num_heads: int = 4,
        config: SpeculativeConfig | None = None,
        *,
        engine: EngineConfig | None = None,
        seed: int | None = None,
    ) -> None:
        """`num_heads` bounds how many heads guess at once, if the folder holds as many.

        Raises InvalidInput for heads of another model.
        """
        base = replace(engine or EngineConfig(model=model), model=model, medusa_heads=heads)
        chosen = replace(config or SpeculativeConfig(), num_speculative_tokens=num_heads)
        super().__init__(base, "medusa", chosen, seed)
