"""The simulator's core in plain Python, one step at a time: what the compiled one is held against, and its fallback."""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flyball.performance.simulator import (
    BUCKETS,
    COUNTERS,
    DONE,
    LOST,
    RECORD,
    REFUSED,
    SERVER_COUNTERS,
    Books,
    Counters,
    Law,
    Records,
    Requests,
    Router,
)


@dataclass(slots=True, eq=False)
class _Request:
    id: int
    arrival_s: float
    server: int
    input: int
    output: int
    part_tokens: int  # prompt tokens that one prefix id stands for
    prefix_ids: tuple[int, ...]
    first_s: float = math.nan
    last_s: float = math.nan
    cached: int = 0
    preemptions: int = 0
    emitted: int = 0
    context: int = 0  # tokens whose keys and values are cached
    count: int = 0  # tokens that the step in progress computes
    blocks: int = 0  # of its own
    shared: int = 0  # tokens in cache entries that it holds
    parts: int = 0  # of its prompt that were looked up or put into the cache
    held: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    share: float = 0.0  # request-level: own work a step

    @property
    def known(self) -> int:
        return self.input + self.emitted

    def forget(self) -> None:
        """Lose all that was computed."""
        self.context = self.count = self.blocks = self.shared = self.parts = 0
        self.held = []


class _Cache:
    """KV blocks: free, held by requests, or holding parts of prompts."""

    def __init__(self, law: Law) -> None:
        self.law = law
        self.free = law.blocks
        self.parts: dict[int, list[int]] = {}  # id -> references, blocks
        self.unreferenced: dict[int, None] = {}  # ids, least recently released first

    @property
    def available(self) -> int:
        return self.free + sum(self.parts[i][1] for i in self.unreferenced)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.law.block_tokens)

    def matched(self, request: _Request) -> int:
        """Leading parts of the prompt that are cached; never all of it."""
        if not self.law.prefix_caching or not request.prefix_ids:
            return 0
        found = 0
        for part in request.prefix_ids[: (request.known - 1) // request.part_tokens]:
            if part not in self.parts:
                break
            found += 1
        return found

    def allocate(self, request: _Request, blocks: int) -> None:
        while self.free < blocks:
            oldest = next(iter(self.unreferenced))
            del self.unreferenced[oldest]
            self.free += self.parts.pop(oldest)[1]
        self.free -= blocks
        request.blocks += blocks

    def hold(self, request: _Request, part: int) -> None:
        self.unreferenced.pop(part, None)
        self.parts[part][0] += 1
        request.held.append(part)

    def keep(self, request: _Request) -> None:
        """Let parts of the prompt that are computed become the cache's."""
        if not self.law.prefix_caching:
            return
        computed = min(request.context, request.input)
        while request.parts < len(request.prefix_ids) and (request.parts + 1) * request.part_tokens <= computed:
            part = request.prefix_ids[request.parts]
            request.parts += 1
            if part in self.parts:
                continue  # another request was first: this one keeps its copy to itself
            request.shared += request.part_tokens
            kept = self.blocks_for(request.context - request.shared)
            self.parts[part] = [1, request.blocks - kept]
            request.blocks = kept
            request.held.append(part)

    def release(self, request: _Request) -> None:
        self.free += request.blocks
        for part in reversed(request.held):
            self.parts[part][0] -= 1
            if not self.parts[part][0]:
                self.unreferenced[part] = None


class _Replica:
    def __init__(self, server: int, law: Law, now_s: float) -> None:
        self.server, self.law, self.cache = server, law, _Cache(law)
        self.running: list[_Request] = []  # in order of admission
        self.waiting: deque[_Request] = deque()
        self.ends: list[tuple[float, int, _Request]] = []  # request-level: in service
        self.work = 0.0
        self.start_s = now_s
        self.next_s = math.inf
        self.busy = False
        self.accepting = True
        self.seen = np.zeros((), COUNTERS)
        self.seen["emptied_s"] = now_s

    @property
    def load(self) -> int:
        return len(self.running) + len(self.waiting) + len(self.ends)

    def emit(self, request: _Request, count: int, when_s: float) -> None:
        seen = self.seen
        seen["generated"] += count
        if request.emitted == 0:
            request.first_s = when_s
            seen["firsts"] += 1
            seen["prompt"] += request.input
            seen["ttft_sum_s"] += when_s - request.arrival_s
            seen["ttft_hist"][_bucket(when_s - request.arrival_s)] += 1
        else:
            seen["gaps"] += count
            seen["gap_sum_s"] += when_s - request.last_s
            seen["gap_hist"][_bucket((when_s - request.last_s) / count)] += count
        request.emitted += count
        request.last_s = when_s

    def finish_step(self, record: bool) -> list[_Request]:
        """Give out the tokens of the step that ends now; returns the requests that end with it."""
        self.seen["busy_s"] += self.next_s - self.start_s
        self.seen["steps"] += 1
        self.busy = False
        for request in self.running:
            if not request.count:
                continue
            request.context += request.count
            self.cache.keep(request)
            if request.context == request.known:
                self.emit(request, 1, self.next_s)
                if record:
                    request.times_s.append(self.next_s)
        ended = [r for r in self.running if r.emitted == r.output]
        self.running = [r for r in self.running if r.emitted < r.output]
        for request in ended:
            self.cache.release(request)
        return ended

    def begin_step(self, now_s: float) -> None:
        """Choose what the next step computes, and when it ends."""
        for request in self.running:
            request.count = 0
        budget, preempted = self._schedule_running(self.law.max_step_tokens)
        if not preempted:
            budget = self._admit(budget)
        if not self.running:
            self.next_s = math.inf
            self.seen["emptied_s"] = now_s
            return
        read = sum(r.context + r.count for r in self.running if r.count)
        tokens = self.law.max_step_tokens - budget
        self.busy, self.start_s = True, now_s
        self.next_s = now_s + (self.law.alpha_s + self.law.beta_s * tokens + self.law.gamma_s * read)

    def _schedule_running(self, budget: int) -> tuple[int, bool]:
        preempted, index = False, 0
        while index < len(self.running) and budget:
            request = self.running[index]
            count = min(request.known - request.context, budget)
            need = self.cache.blocks_for(request.context + count - request.shared) - request.blocks
            while need > self.cache.available:  # the one admitted last gives way
                victim = self.running.pop()
                self.cache.release(victim)
                victim.forget()
                victim.preemptions += 1
                self.seen["preemptions"] += 1
                self.waiting.appendleft(victim)
                preempted = True
                if victim is request:
                    return budget, True
            self.cache.allocate(request, need)
            request.count = count
            budget -= count
            index += 1
        return budget, preempted

    def _admit(self, budget: int) -> int:
        while self.waiting and len(self.running) < self.law.max_batch and budget:
            request = self.waiting[0]
            hits = self.cache.matched(request)
            context = hits * request.part_tokens
            count = min(request.known - context, budget)
            revived = sum(self.cache.parts[p][1] for p in request.prefix_ids[:hits] if p in self.cache.unreferenced)
            if self.cache.blocks_for(count) > self.cache.available - revived:
                break
            self.waiting.popleft()
            for part in request.prefix_ids[:hits]:
                self.cache.hold(request, part)
            request.context = request.shared = context
            request.parts, request.count = hits, count
            if not request.emitted:
                request.cached = context
            self.seen["hits"] += context
            self.cache.allocate(request, self.cache.blocks_for(count))
            self.running.append(request)
            budget -= count
        return budget

    def admit_requests(self, now_s: float) -> None:
        """Request-level: settle the latencies of those who wait and find room."""
        law = self.law
        while self.waiting and len(self.ends) < law.max_batch:
            request = self.waiting[0]
            blocks = self.cache.blocks_for(request.input + request.output)
            if blocks > self.cache.free:
                break
            self.waiting.popleft()
            self.cache.allocate(request, blocks)
            n, d = request.input, request.output - 1
            chunks = -(-n // law.max_step_tokens)
            prefill = (law.beta_s + law.gamma_s * (chunks + 1) / 2) * n
            token = law.beta_s + law.gamma_s * (n + (d + 1) / 2)
            step = law.alpha_s + self.work
            request.first_s = now_s + (step / 2 if self.ends else 0.0) + chunks * step + prefill
            request.last_s = request.first_s + d * (step + token)
            request.share = (prefill + d * token) / (chunks + d)
            self.work += request.share
            heapq.heappush(self.ends, (request.last_s, request.id, request))
        self.next_s = self.ends[0][0] if self.ends else math.inf

    def end_requests(self, now_s: float) -> list[_Request]:
        """Request-level: those whose last token comes now."""
        ended = []
        while self.ends and self.ends[0][0] <= now_s:
            request = heapq.heappop(self.ends)[2]
            self.work = self.work - request.share if self.ends else 0.0
            first_s, last_s = request.first_s, request.last_s
            self.emit(request, 1, first_s)
            if request.output > 1:
                self.emit(request, request.output - 1, last_s)
            self.cache.release(request)
            ended.append(request)
        if not self.ends:
            self.seen["emptied_s"] = now_s
        return ended


def _bucket(seconds: float) -> int:
    return 0 if seconds <= 1e-3 else min(BUCKETS - 1, math.ceil(math.log(seconds / 1e-3) / math.log(1.1)))


class ReferenceCore:
    """See `flyball.performance.simulator.Core`."""

    def __init__(self, servers: int, router: Router, record_times: bool) -> None:
        self._router = router
        self._record = record_times
        self._replicas: list[_Replica | None] = []
        self._gateway: list[deque[_Request]] = [deque() for _ in range(servers)]
        self._accepting: list[list[int]] = [[] for _ in range(servers)]
        self._cursor = [0] * servers
        self._seen = np.zeros(servers, SERVER_COUNTERS)
        self._coming: deque[_Request] = deque()
        self._offered = 0
        self._closed = False
        self._now_s = 0.0
        self._area = 0.0
        self._residence_s = 0.0
        self._here = 0
        self._ended: list[tuple[object, ...]] = []
        self._times_s: list[float] = []

    def _at(self, slot: int) -> _Replica:
        replica = self._replicas[slot]
        assert replica is not None, f"no replica has slot {slot}"
        return replica

    def add(self, server: int, law: Law) -> int:
        """See Core."""
        replica = _Replica(server, law, self._now_s)
        slot = next((i for i, r in enumerate(self._replicas) if r is None), len(self._replicas))
        self._replicas[slot : slot + 1] = [replica]
        self._accepting[server] = sorted([*self._accepting[server], slot])
        self._dispatch(server)
        return slot

    def drain(self, slot: int) -> None:
        """See Core."""
        replica = self._at(slot)
        replica.accepting = False
        self._accepting[replica.server] = [s for s in self._accepting[replica.server] if s != slot]

    def remove(self, slot: int) -> None:
        """See Core."""
        self.drain(slot)
        self._replicas[slot] = None

    def fail(self, slot: int) -> None:
        """See Core."""
        replica = self._at(slot)
        self.remove(slot)
        back = []
        for request in (*replica.running, *replica.waiting, *(r for _, _, r in sorted(replica.ends))):
            if request.first_s <= self._now_s:
                self._end(request, replica, slot, LOST)
            else:
                request.forget()
                back.append(request)
        self._gateway[replica.server].extendleft(sorted(back, key=lambda r: -r.id))
        self._dispatch(replica.server)

    def offer(self, requests: Requests) -> None:
        """See Core."""
        ids, offsets = requests.prefix_ids, requests.prefix_offsets
        for i in range(len(requests)):
            prefix = () if ids is None or offsets is None else tuple(ids[offsets[i] : offsets[i + 1]].tolist())
            self._coming.append(
                _Request(
                    id=self._offered,
                    arrival_s=float(requests.arrival_s[i]),
                    server=int(requests.server[i]),
                    input=int(requests.input_tokens[i]),
                    output=int(requests.output_tokens[i]),
                    part_tokens=int(requests.prefix_tokens[i]),
                    prefix_ids=prefix,
                )
            )
            self._offered += 1

    def close(self) -> None:
        """See Core."""
        self._closed = True

    def run(self, until_s: float) -> bool:
        """See Core."""
        while True:
            if not self._coming and not self._closed:
                return True
            arrival_s = self._coming[0].arrival_s if self._coming else math.inf
            soonest = min((r.next_s for r in self._replicas if r), default=math.inf)
            time_s = min(arrival_s, soonest)
            if time_s > until_s or time_s == math.inf:
                if until_s < math.inf:
                    self._advance(until_s)
                return False
            self._advance(time_s)
            if arrival_s <= soonest:
                self._arrive(self._coming.popleft())
            else:
                slot = next(i for i, r in enumerate(self._replicas) if r and r.next_s == soonest)
                self._boundary(slot, self._at(slot))

    def _advance(self, time_s: float) -> None:
        self._area += self._here * (time_s - self._now_s)
        self._now_s = time_s

    def _arrive(self, request: _Request) -> None:
        self._here += 1
        self._seen[request.server]["arrivals"] += 1
        self._seen[request.server]["input"] += request.input
        self._gateway[request.server].append(request)
        self._dispatch(request.server)

    def _dispatch(self, server: int) -> None:
        queue = self._gateway[server]
        while queue and self._accepting[server]:
            request = queue.popleft()
            self._take(self._choose(request), request)

    def _choose(self, request: _Request) -> int:
        slots = self._accepting[request.server]
        if self._router == "round_robin":
            index = self._cursor[request.server] % len(slots)
            self._cursor[request.server] = index + 1
            return slots[index]
        least = min(slots, key=lambda s: self._at(s).load)
        if self._router == "least_loaded" or not request.prefix_ids:
            return least
        limit = 2 * self._at(least).load + 8  # an affine replica may be this loaded
        near = [least, *(s for s in slots if self._at(s).load <= limit)]
        return max(near, key=lambda s: (self._at(s).cache.matched(request), -self._at(s).load))

    def _take(self, slot: int, request: _Request) -> None:
        replica = self._at(slot)
        replica.seen["arrivals"] += 1
        need = replica.cache.blocks_for(request.input + request.output) + len(request.prefix_ids)
        if need > replica.law.blocks:
            self._end(request, replica, slot, REFUSED)
            return
        replica.waiting.append(request)
        if replica.law.detail == "requests":
            replica.admit_requests(self._now_s)
        elif not replica.busy:
            replica.next_s = self._now_s  # begins once all that arrive at this moment are here

    def _boundary(self, slot: int, replica: _Replica) -> None:
        if replica.law.detail == "requests":
            for request in replica.end_requests(self._now_s):
                self._end(request, replica, slot, DONE)
            replica.admit_requests(self._now_s)
            return
        if replica.busy:
            for request in replica.finish_step(self._record):
                self._end(request, replica, slot, DONE)
        replica.begin_step(self._now_s)

    def _end(self, request: _Request, replica: _Replica, slot: int, outcome: int) -> None:
        seen = self._seen[request.server]
        name = "completed" if outcome == DONE else "lost"
        replica.seen[name] += 1
        seen[name] += 1
        seen["output"] += request.output if outcome == DONE else 0
        self._here -= 1
        self._residence_s += self._now_s - request.arrival_s
        self._ended.append(
            (request.id, request.arrival_s, request.first_s, request.last_s, request.server, slot, request.input,
             request.output, request.cached, request.preemptions, outcome, 0)
        )  # fmt: skip
        self._times_s.extend(request.times_s)

    def counters(self, slot: int) -> Counters:
        """See Core."""
        replica = self._at(slot)
        replica.seen["running"] = len(replica.running) + len(replica.ends)
        replica.seen["waiting"] = len(replica.waiting)
        replica.seen["blocks"] = replica.law.blocks
        replica.seen["blocks_used"] = replica.law.blocks - replica.cache.available
        return replica.seen.copy()

    def server(self, index: int) -> Counters:
        """See Core."""
        self._seen[index]["queued"] = len(self._gateway[index])
        return self._seen[index : index + 1].copy().reshape(())

    def take(self) -> tuple[Records, NDArray[np.float64]]:
        """See Core."""
        records, times_s = np.array(self._ended, RECORD), np.array(self._times_s)
        self._ended, self._times_s = [], []
        return records, times_s

    def books(self) -> Books:
        """See Core."""
        replicas = [r for r in self._replicas if r]
        here = [r for queue in self._gateway for r in queue]
        for replica in replicas:
            here += [*replica.running, *replica.waiting, *(r for _, _, r in replica.ends)]
        conserved = all(
            r.cache.free + sum(q.blocks for q in r.running) + sum(b for _, b in r.cache.parts.values()) == r.law.blocks
            for r in replicas
            if r.law.detail == "steps"
        )
        present_s = sum(self._now_s - r.arrival_s for r in here)
        return Books(self._now_s, self._area, self._residence_s + present_s, conserved)
