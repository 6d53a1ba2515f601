"""The greedy solver of llm-inferno, for comparison: one server after the other takes its best candidate that fits.

Next comes the server of the highest priority, among these the one that would lose most by its next-best candidate.
Where a server finds no room for all its replicas, a saturation policy says what it gets:

None                nothing
PriorityExhaustive  as many replicas as fit of its first candidate that fits, server after server
PriorityRoundRobin  one replica in turn, within a priority
RoundRobin          one replica in turn; among all servers if best effort is delayed

What runs with fewer replicas than its targets need is flagged, with the latencies of its real load. Ties are broken by
name, so the order of the choices is no matter. Nothing is proven of the value.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from flyball.planner.problem import Candidate, Choice, Problem, with_replicas
from flyball.planner.solvers import ROUNDING, Solution, lacking, no_room


@dataclass(slots=True)
class _Entry:
    """A server in the queue, and the candidate it would take next."""

    choice: Choice
    at: int = 0

    @property
    def candidate(self) -> Candidate:
        return self.choice.candidates[self.at]

    @property
    def key(self) -> tuple[int, float, float, str]:
        """Priority; then the most to lose by the next candidate; then the least value; then the name."""
        rest = self.choice.candidates[self.at + 1 :]
        loss = rest[0].value - self.candidate.value if rest else math.inf
        return self.choice.priority, -loss, self.candidate.value, self.choice.server.name


@dataclass(slots=True)
class _State:
    """What is left, and who has what."""

    left: dict[str, float]
    taken: dict[str, Candidate] = field(default_factory=dict)

    def take(self, choice: Choice, candidate: Candidate) -> None:
        self.taken[choice.server.name] = candidate
        self.use(candidate, 1.0)

    def use(self, candidate: Candidate, share: float) -> None:
        """Take a share of what the candidate uses."""
        for name, amount in candidate.uses:
            self.left[name] -= amount * share

    def fitting(self, candidate: Candidate) -> int:
        """Replicas of the candidate that there is room for, at most its own."""
        most = candidate.allocation.replicas
        rooms = ((self.left.get(name, 0) + ROUNDING) * most / amount for name, amount in candidate.uses if amount)
        return max(int(min((*rooms, most))), 0)


def solve(problem: Problem, *, time_limit_s: float) -> Solution:  # noqa: ARG001 - it needs no time
    """A candidate for each server, or what its saturation policy leaves it."""
    state = _State(dict(problem.capacity))
    groups: list[list[Choice]] = []
    able = sorted((c for c in problem.choices if c.candidates), key=lambda c: c.priority)
    for _, members in groupby(able, key=lambda c: c.priority):
        unserved = _allocate(list(members), state)
        if problem.delayed_best_effort:
            groups.append(unserved)
        else:
            _POLICIES[problem.saturation_policy](unserved, state)
    if problem.saturation_policy == "RoundRobin":
        groups = [[choice for group in groups for choice in group]]
    for group in groups:
        _POLICIES[problem.saturation_policy](group, state)
    chosen = tuple(state.taken.get(choice.server.name) for choice in problem.choices)
    reasons = tuple(
        "" if got else no_room(choice, state.left) for choice, got in zip(problem.choices, chosen, strict=True)
    )
    return Solution(chosen=chosen, reasons=reasons, bound=None)


def _allocate(choices: Sequence[Choice], state: _State) -> list[Choice]:
    """Serve what fits whole; the rest comes back in the order it was given up."""
    queue = sorted((_Entry(choice) for choice in choices), key=lambda e: e.key)
    unserved = []
    while queue:
        entry = queue.pop(0)
        if not lacking(entry.candidate, state.left):
            state.take(entry.choice, entry.candidate)
        elif entry.at + 1 < len(entry.choice.candidates):
            entry.at += 1
            insort(queue, entry, key=lambda e: e.key)
        else:
            unserved.append(entry.choice)
    return unserved


def _reduced(candidate: Candidate, replicas: int) -> Candidate:
    assert candidate.sizing is not None
    value = candidate.value * replicas / candidate.allocation.replicas
    return with_replicas(candidate, replicas, rate_rps=candidate.sizing.rate_rps, value=value)


def _nothing(choices: Sequence[Choice], state: _State) -> None:
    """Who has no room for all gets nothing."""


def _exhaustive(choices: Sequence[Choice], state: _State) -> None:
    """As many replicas as fit, server after server."""
    for choice in choices:
        candidate = next((c for c in choice.candidates if state.fitting(c)), None)
        if candidate is not None:
            state.take(choice, _reduced(candidate, state.fitting(candidate)))


def _round_robin(choices: Sequence[Choice], state: _State) -> None:
    """One replica in turn; a server stays with the candidate it began with."""
    counts: dict[str, tuple[Choice, Candidate, int]] = {}
    turns = deque(choices)
    while turns:
        choice = turns.popleft()
        name = choice.server.name
        _, candidate, count = counts.get(name) or (
            choice, next((c for c in choice.candidates if state.fitting(c)), None), 0,
        )  # fmt: skip
        if candidate is None or not state.fitting(candidate):
            continue
        state.use(candidate, 1 / candidate.allocation.replicas)
        counts[name] = (choice, candidate, count + 1)
        if count + 1 < candidate.allocation.replicas:
            turns.append(choice)
    for name, (_, candidate, count) in counts.items():
        state.taken[name] = _reduced(candidate, count)


_POLICIES: dict[str, Callable[[Sequence[Choice], _State], None]] = {
    "None": _nothing,
    "PriorityExhaustive": _exhaustive,
    "PriorityRoundRobin": _round_robin,
    "RoundRobin": _round_robin,
}
