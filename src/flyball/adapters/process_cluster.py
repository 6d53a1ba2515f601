"""A cluster of child processes on this machine (a `core.ports.Cluster`): each replica is one engine's server.

A replica that is to go is taken off its gateway first, and ended when its last answer has, or after the drain limit.
One that ends by itself is started again. Prometheus finds the replicas through a file of targets that is rewritten at
each change (its `file_sd_configs`).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from flyball.adapters.engines.process import ChildProcess, free_port
from flyball.adapters.gateway import Gateway
from flyball.adapters.prometheus import KnownReplica
from flyball.core.clock import Clock, SystemClock
from flyball.core.errors import ActuationFailed
from flyball.core.observation import Counts, Phase


@dataclass
class _Replica:
    name: str
    server: str
    accelerator: str
    port: int
    child: ChildProcess
    asked_s: float
    ready: bool = False
    draining_s: float | None = None

    @property
    def phase(self) -> Phase:
        if self.draining_s is not None:
            return "draining"
        return "ready" if self.ready else "starting"


class ProcessCluster:
    """Runs `commands[server][accelerator]`, words in which `{port}` stands for the port to listen on.

    It also knows its replicas (`adapters.prometheus.Inventory`). Whoever uses it calls `settle` now and then, as
    `observe` and `scale` do; nothing happens behind anybody's back.
    """

    def __init__(
        self,
        commands: Mapping[str, Mapping[str, Sequence[str]]],
        gateways: Mapping[str, Gateway],
        folder: Path,
        *,
        ready_path: str = "/health/ready",
        drain_s: float = 120.0,
        most: int = 16,
        clock: Clock | None = None,
    ) -> None:
        self._commands = commands
        self._gateways = gateways
        self._folder = folder
        self._ready_path = ready_path
        self._drain_s = drain_s
        self._most = most
        self._clock = clock or SystemClock()
        self._replicas: list[_Replica] = []
        self._ending: list[threading.Thread] = []
        self._wanted: dict[str, dict[str, int]] = {}
        self._made = 0
        self._client = httpx.Client(timeout=1.0, trust_env=False)
        self.targets_file = folder / "targets.json"
        self._publish()

    def scale(self, wanted: Counts) -> None:
        """Start what is missing and drain what is too many."""
        for server, counts in wanted.items():
            for name in counts:
                if name not in self._commands.get(server, {}):
                    raise ActuationFailed(f"no command runs {server!r} on {name!r}; add one")
        total = sum(sum(c.values()) for c in {**self._wanted, **wanted}.values())
        if total > self._most:
            raise ActuationFailed(f"{total} replicas were asked for, but at most {self._most} may run here")
        for server, counts in wanted.items():
            self._wanted[server] = dict(counts)
        self.settle()

    def settle(self) -> None:
        """See who became ready, who died and who has nothing left to do; bring the counts to what is wanted."""
        for r in list(self._replicas):
            if r.child.ended() is not None:
                self._replicas.remove(r)
            elif not r.ready and r.draining_s is None:
                r.ready = self._answers(r)
        for server, counts in self._wanted.items():
            for name in {*counts, *(r.accelerator for r in self._replicas if r.server == server)}:
                self._bring(server, name, counts.get(name, 0))
        self._route()
        for r in [r for r in self._replicas if r.draining_s is not None]:
            idle = self._gateways[r.server].inside(r.name) == 0
            if idle or self._clock.now_s() - (r.draining_s or 0.0) > self._drain_s:
                self._replicas.remove(r)
                self._end(r)
        self._route()
        self._publish()

    def _bring(self, server: str, name: str, count: int) -> None:
        active = [
            r for r in self._replicas if (r.server, r.accelerator, r.draining_s) == (server, name, None)
        ]  # fmt: skip
        active.sort(key=lambda r: (not r.ready, r.asked_s))  # those that start, and the youngest, go first
        for r in active[count:]:
            r.draining_s = self._clock.now_s()
        for _ in range(count - len(active)):
            self._start(server, name)

    def _start(self, server: str, name: str) -> None:
        port = free_port()
        self._made += 1
        label = f"{server}-{self._made}"
        command = [word.replace("{port}", str(port)) for word in self._commands[server][name]]
        child = ChildProcess(command, log=self._folder / f"{label}.log")
        self._replicas.append(_Replica(label, server, name, port, child, self._clock.now_s()))

    def _end(self, r: _Replica) -> None:
        thread = threading.Thread(target=r.child.stop, name=f"end-{r.name}")
        thread.start()
        self._ending = [t for t in self._ending if t.is_alive()] + [thread]

    def _answers(self, r: _Replica) -> bool:
        try:
            return self._client.get(f"http://127.0.0.1:{r.port}{self._ready_path}").status_code == 200
        except httpx.HTTPError:
            return False

    def _route(self) -> None:
        for server, door in self._gateways.items():
            own = [r for r in self._replicas if r.server == server]
            door.route({r.name: (f"http://127.0.0.1:{r.port}", r.phase == "ready") for r in own})

    def _publish(self) -> None:
        """Write the targets for Prometheus: those that answer, and the gateways."""
        found = [
            {"targets": [f"127.0.0.1:{r.port}"], "labels": {"server": r.server, "accelerator": r.accelerator}}
            for r in self._replicas
            if r.ready
        ]
        text = json.dumps(found, indent=1)
        if not self.targets_file.exists() or self.targets_file.read_text() != text:
            fresh = self.targets_file.with_suffix(".new")
            fresh.write_text(text)
            fresh.rename(self.targets_file)

    def replicas(self, server: str) -> list[KnownReplica]:
        """All of a server that start, run or drain."""
        self.settle()
        return [
            KnownReplica(
                name=r.name,
                accelerator=r.accelerator,
                phase=r.phase,
                age_s=self._clock.now_s() - r.asked_s,
                instance=f"127.0.0.1:{r.port}",
            )
            for r in self._replicas
            if r.server == server
        ]

    def wanted(self, server: str) -> Mapping[str, int]:
        """Asked for last."""
        return dict(self._wanted.get(server, {}))

    def close(self) -> None:
        """End every replica."""
        for r in self._replicas:
            self._end(r)
        for thread in self._ending:
            thread.join()
        self._replicas = []
        self._client.close()


@contextmanager
def process_cluster(
    commands: Mapping[str, Mapping[str, Sequence[str]]],
    gateways: Mapping[str, Gateway],
    folder: Path,
    *,
    ready_path: str = "/health/ready",
    drain_s: float = 120.0,
    most: int = 16,
) -> Iterator[ProcessCluster]:
    """A cluster while the block runs; every replica is ended with it."""
    cluster = ProcessCluster(commands, gateways, folder, ready_path=ready_path, drain_s=drain_s, most=most)
    try:
        yield cluster
    finally:
        cluster.close()
