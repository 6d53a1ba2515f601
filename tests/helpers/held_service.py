"""A small honest service for the holder's tests: two models behind a router, speculation, and load, in virtual time.

A share of the traffic goes to the small model, which is fast and less good; the rest to the large one, which drafts
`draft_tokens` ahead. Latency grows without bound as either comes near its capacity:

    small_s = .05 / (1 - share · rate / 60)                  quality .70
    large_s = .30 / gain(k) / (1 - (1 - share) · rate / (12 gain(k)))     quality .95
    gain(k) = (1 + .7 + ... + .7^k) / (1 + .12 k)            k draft tokens, each accepted with probability .7
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from flyball.core.clock import VirtualClock
from flyball.core.errors import EngineFailed
from flyball.core.knobs import Configuration, Knob, Space, Value
from flyball.tuner.hold_reading import Reading
from flyball.tuner.objective import Score

ROUTED = Space((
    Knob(name="small_share", kind="float", default=0.0, low=0.0, high=1.0, doc="share of traffic to the small model"),
    Knob(name="draft_tokens", kind="int", default=0, low=0, high=8, doc="tokens drafted ahead by the large model"),
))  # fmt: skip
FLOOR, LIMIT_S = 0.80, 1.0


@dataclass
class HeldService:
    """Serves under its values; `read` is a window of ten seconds."""

    rate_rps: float = 6.0
    noise: float = 0.0
    values: dict[str, Value] = field(default_factory=ROUTED.defaults)
    version: int = 1
    clock: VirtualClock = field(default_factory=VirtualClock)
    fails: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)

    def apply(self, changes: Configuration) -> None:
        """Set some knobs."""
        if self.fails:
            raise EngineFailed("the service is gone")
        self.values |= changes
        self.version += 1

    def generation(self) -> str:
        """The version in force."""
        return str(self.version)

    def read(self, seconds: float = 10.0) -> Reading:
        """Some seconds pass."""
        start_s = self.clock.now_s()
        self.clock.advance(seconds)
        count = self.rate_rps * seconds
        return Reading(start_s=start_s, end_s=self.clock.now_s(), generation=self.generation(), finished=count,
                       failed=0.0, input_tokens=500 * count, output_tokens=100 * count)  # fmt: skip

    def judge(self, _: Reading) -> Score:
        """Mean latency, to be lowered; quality has a floor, latency a limit."""
        share, draft = float(self.values["small_share"]), int(self.values["draft_tokens"])
        gain = sum(0.7**i for i in range(draft + 1)) / (1 + 0.12 * draft)
        small = 0.05 / max(1 - share * self.rate_rps / 60, 0.02)
        large = 0.30 / gain / max(1 - (1 - share) * self.rate_rps / (12 * gain), 0.02)
        latency = (share * small + (1 - share) * large) * self._rng.lognormvariate(0, self.noise)
        quality = share * 0.70 + (1 - share) * 0.95
        return Score(value=latency, margins={"quality": FLOOR / quality - 1, "latency": latency / LIMIT_S - 1})
