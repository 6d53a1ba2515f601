"""A plan is tried in the simulator on the recent trace before it is acted on: formulas propose, simulation disposes.

Tried is each server whose count is about to change, step by step of its engines, from the minutes just seen (their
rates, brought to the demand that the plan is for; the lengths' means). Where fewer requests would see what was promised
than shall, a replica is not given up, or one more is asked for; the shares are told.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from flyball.core.fleet import FleetSpec, Targets
from flyball.core.observation import FleetState
from flyball.performance.request_streams import Rates, poisson_process
from flyball.performance.simulator import DONE, Law, new_core
from flyball.planner.caps import prices, within_caps
from flyball.planner.loop import FleetDecision, FleetLoop, LoopMemory, LoopSettings, ServerMemory

MINUTES = 5  # of the recent trace
SHARE = 0.95  # of requests, where the settings promise means
_LENGTHS = 257  # quantiles of a length's distribution; a prime, so that pairs of them mix
_STRIDE = 101
_SHORTEST_S = 60.0
_KV_TOKENS = 524_288  # of a replica that does not say


def lengths(input_tokens: float, output_tokens: float) -> list[tuple[int, int]]:
    """Pairs of prompt and answer lengths with these means, each spread like an exponential, in no relation.

    >>> pairs = lengths(1000.0, 200.0)
    >>> round(sum(n for n, _ in pairs) / len(pairs), -2), round(sum(m for _, m in pairs) / len(pairs), -2)
    (1000.0, 200.0)
    """
    spread = [-math.log(1.0 - (k + 0.5) / _LENGTHS) for k in range(_LENGTHS)]
    return [
        (max(round(input_tokens * spread[k]), 1), max(round(output_tokens * spread[k * _STRIDE % _LENGTHS]), 1))
        for k in range(_LENGTHS)
    ]


def rehearse(
    law: Law, replicas: int, rates_rps: Sequence[float], targets: Targets, pairs: Sequence[tuple[int, int]], seed: int
) -> float:
    """The share of requests that see what was promised, with so many replicas and these rates minute by minute."""
    duration_s = max(60.0 * len(rates_rps), _SHORTEST_S)
    times = [60.0 * k for k in range(len(rates_rps) + 1)]
    curve = Rates.of(times, [*rates_rps, rates_rps[-1]])
    core = new_core(1, "least_loaded")
    for _ in range(replicas):
        core.add(0, law)
    for requests in poisson_process(curve, list(pairs), duration_s=duration_s, seed=seed):
        core.offer(requests)
    core.close()
    core.run(math.inf)
    seen, _ = core.take()
    if not len(seen):
        return 1.0
    ttft_s = seen["first_s"] - seen["arrival_s"]
    gaps = np.maximum(seen["output"] - 1, 1)
    itl_s = (seen["last_s"] - seen["first_s"]) / gaps
    good = (seen["outcome"] == DONE) & (ttft_s <= (targets.ttft_s or math.inf)) & (itl_s <= (targets.itl_s or math.inf))
    return float(good.mean())


class RehearsedLoop(FleetLoop):
    """The loop, with each change tried before it is decided; `seed` draws the arrivals."""

    def __init__(
        self, spec: FleetSpec, settings: LoopSettings | None = None, *, seed: int = 0, kv_tokens: int = _KV_TOKENS
    ) -> None:
        super().__init__(spec, settings)
        self._seed = seed
        self._kv_tokens = kv_tokens

    def decide(self, state: FleetState, memory: LoopMemory) -> tuple[FleetDecision, LoopMemory]:
        """The loop's decision, mended where the rehearsal fails."""
        decision, after = super().decide(state, memory)
        before = {name: _asked(name, state, memory) for name in decision.replicas}
        replicas = {name: dict(counts) for name, counts in decision.replicas.items()}
        reasons = dict(decision.reasons)
        for name, counts in decision.replicas.items():
            if decision.explanations[name].held or counts == before[name] or not sum(counts.values()):
                continue
            tried = self._try(name, counts, before[name], after.servers[name], decision)
            if tried is not None:
                replicas[name], said = tried
                reasons[name] = (*reasons[name], said)
        views = {name: view for name, view in state.servers.items() if name in replicas}
        allowed, _ = within_caps(self.spec, replicas, before, views, self.settings.budget_per_h)
        servers = {
            name: replace(one, asked=allowed[name]) if name in allowed else one for name, one in after.servers.items()
        }
        price = prices(self.spec)
        explanations = {
            name: replace(
                one, cost_per_h=math.fsum(price[name, a].cost_per_h * n for a, n in allowed[name].items() if n)
            )
            if name in allowed and allowed[name] != decision.replicas[name]
            else one
            for name, one in decision.explanations.items()
        }
        mended = replace(decision, replicas=allowed, reasons=reasons, explanations=explanations)
        return mended, replace(after, servers=servers)

    def _try(
        self,
        name: str,
        counts: Mapping[str, int],
        before: Mapping[str, int],
        memory: ServerMemory,
        decision: FleetDecision,
    ) -> tuple[dict[str, int], str] | None:
        """The counts after the rehearsal and what it showed; None for a server on several accelerators."""
        used = [accelerator for accelerator, count in counts.items() if count]
        if len(used) != 1 or any(before.get(a) for a in before if a not in used):
            return None  # a move under way: two kinds of replicas side by side
        server = next(s for s in self.spec.servers if s.name == name)
        profile = next(p for p in self.spec.profiles if (p.model, p.accelerator) == (server.model, used[0]))
        targets = next(c for c in self.spec.service_classes if c.name == server.service_class).targets[server.model]
        demand_rps = decision.explanations[name].figures.get("demand_rps", 0.0)
        if not demand_rps or math.isnan(memory.lengths[0]) or not memory.lengths[2]:
            return None
        law = Law.of(profile, kv_tokens=self._kv_tokens)
        rates = recent_rates(memory, demand_rps)
        pairs = lengths(*memory.lengths[:2])
        count, had = counts[used[0]], before.get(used[0], 0)
        share = rehearse(law, count, rates, targets, pairs, self._seed)
        promised = self.settings.share or SHARE
        said = f"rehearsed on the last {len(rates)} min: {share:.1%} of requests are served as promised with {count}"
        if share >= promised:
            return dict(counts), said
        if count < had:
            return {**counts, used[0]: had}, f"{said}, fewer than {promised:.0%}: {had} are kept"
        limit = self.settings.max_replicas
        if limit and count >= limit:
            return dict(counts), f"{said}, but no more are allowed"
        return {**counts, used[0]: count + 1}, f"{said}, fewer than {promised:.0%}: one more is asked for"


def recent_rates(memory: ServerMemory, demand_rps: float) -> list[float]:
    """Rates of the last minutes, brought to a demand as their most; that demand alone where none were kept."""
    kept = next((one.state.bins for one in memory.outlook.tracked.values() if one.state.bins), ())[-MINUTES:]
    most = max(kept, default=0.0)
    return [rate * demand_rps / most for rate in kept] if most > 0 else [demand_rps]


def _asked(name: str, state: FleetState, memory: LoopMemory) -> dict[str, int]:
    view, old = state.servers.get(name), memory.servers.get(name)
    if view is not None and view.wanted:
        return dict(view.wanted)
    return dict((old.asked if old is not None else None) or {})
