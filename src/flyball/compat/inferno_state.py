"""The optimizer's state-full set: a fleet that is put together call by call, planned, and applied.

Kept are the specs as they came, with keys as llm-inferno writes them; each is checked when it comes. One state belongs
to one application; calls are served one at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any, TypeVar

from flyball.adapters.fields import Fields
from flyball.adapters.fleet_files import (
    allocation_solution,
    fleet_from_body,
    system_accelerator,
    system_class,
    system_profile,
    system_server,
)
from flyball.core.errors import Infeasible, InvalidInput
from flyball.core.fleet import LOWEST_PRIORITY
from flyball.planner.plan import plan

Spec = dict[str, Any]
_T = TypeVar("_T")
_KEYS = (
    "accelerators", "name", "type", "multiplicity", "memSize", "memBW", "power", "idle", "full", "midPower", "midUtil",
    "cost", "count", "models", "acc", "accCount", "maxBatchSize", "atTokens", "perfParms", "alpha", "beta", "gamma",
    "serviceClasses", "priority", "modelTargets", "model", "slo-itl", "slo-ttft", "slo-tps", "servers", "class",
    "keepAccelerator", "minNumReplicas", "maxQueueSize", "currentAlloc", "desiredAlloc", "accelerator", "numReplicas",
    "maxBatch", "itlAverage", "ttftAverage", "load", "arrivalRate", "throughput", "avgInTokens", "avgOutTokens",
    "optimizer", "unlimited", "heterogeneous", "delayedBestEffort", "saturationPolicy", "system", "acceleratorData",
    "modelData", "serviceClassData", "serverData", "optimizerData", "capacityData", "allocations", "kube-resources",
    "uid", "space",
)  # fmt: skip
_SPELLING = {key.lower(): key for key in _KEYS}


class NotFound(Infeasible):
    """Nothing of this name is there."""


def spelled(value: object) -> object:
    """The same with known keys as llm-inferno writes them."""
    if isinstance(value, Mapping):
        return {_SPELLING.get(str(key).lower(), str(key)): spelled(item) for key, item in value.items()}
    return [spelled(item) for item in value] if isinstance(value, list) else value


class FleetState:
    """What is known of a fleet."""

    def __init__(self, *, law: str, time_limit_s: float) -> None:
        self._law, self._time_limit_s, self._lock = law, time_limit_s, Lock()
        self._clear()

    def _clear(self) -> None:
        self.accelerators: dict[str, Spec] = {}
        self.capacities: dict[str, Spec] = {}
        self.models: dict[str, dict[str, Spec]] = {}  # name -> accelerator -> performance
        self.classes: dict[str, Spec] = {}
        self.servers: dict[str, Spec] = {}

    def call(self, change: Callable[[], _T]) -> _T:
        """Do one thing at a time; what comes back is a copy, that later calls do not change."""
        with self._lock:
            return copy.deepcopy(change())

    # -- accelerators and their counts

    def set_accelerators(self, body: Spec) -> Spec:
        """All accelerators, in place of those before."""
        found = {f.text("name", None): spec for f, spec in _each(body, "accelerators", system_accelerator)}
        self.accelerators = found
        return body

    def add_accelerator(self, body: Spec) -> Spec:
        """One accelerator, new or in place of the one of its name."""
        self.accelerators[system_accelerator(Fields(body, "body")).name] = body
        return body

    def set_capacities(self, body: Spec) -> Spec:
        """Counts of all types."""
        self.capacities = {f.text("type", None): spec for f, spec in _each(body, "count", _count)}
        return body

    def set_capacity(self, body: Spec) -> Spec:
        """Count of one type."""
        self.capacities[_count(Fields(body, "body"))] = body
        return body

    # -- models and their performance

    def set_models(self, body: Spec) -> Spec:
        """Performance of all models on all accelerators."""
        found: dict[str, dict[str, Spec]] = {}
        for f, spec in _each(body, "models", system_profile):
            found.setdefault(f.text("name", None), {})[f.text("acc", None)] = spec
        self.models = found
        return body

    def add_model(self, name: str) -> str:
        """A model without performance yet."""
        self.models.setdefault(name, {})
        return name

    def model(self, name: str) -> Spec:
        """Performance of one model."""
        return {"models": list(_named(self.models, name, "model").values())}

    def remove_model(self, name: str) -> str:
        """Forget a model."""
        _pop(self.models, name, "model")
        return name

    def add_performance(self, body: Spec) -> Spec:
        """Performance of a known model on an accelerator."""
        profile = system_profile(Fields(body, "body"))
        _named(self.models, profile.model, "model")[profile.accelerator] = body
        return body

    def performance(self, name: str, accelerator: str) -> Spec:
        """Performance of a model on an accelerator."""
        return _named(_named(self.models, name, "model"), accelerator, "accelerator")

    def remove_performance(self, name: str, accelerator: str) -> Spec:
        """Forget it."""
        return _pop(_named(self.models, name, "model"), accelerator, "accelerator")

    # -- service classes and their targets

    def set_classes(self, body: Spec) -> Spec:
        """All service classes."""
        self.classes = {f.text("name", None): spec for f, spec in _each(body, "serviceClasses", system_class)}
        return body

    def add_class(self, name: str, priority: str) -> Spec:
        """A class without targets yet."""
        if not priority.isascii() or not priority.isdigit() or not 1 <= int(priority[:9]) <= LOWEST_PRIORITY:
            raise InvalidInput(f"the priority is {priority!r}; give a whole number from 1 to {LOWEST_PRIORITY}")
        self.classes[name] = {"name": name, "priority": int(priority), "modelTargets": []}
        return self.classes[name]

    def add_targets(self, body: Spec) -> Spec:
        """A known class's targets for further models."""
        found = system_class(Fields(body, "body"))
        spec = _named(self.classes, found.name, "service class")
        kept = [t for t in spec.get("modelTargets") or [] if t.get("model") not in found.targets]
        spec["modelTargets"] = [*kept, *(body.get("modelTargets") or [])]
        return spec

    def targets(self, name: str, model: str) -> Spec:
        """A class's targets for a model."""
        targets = _named(self.classes, name, "service class").get("modelTargets") or []
        return _named({t["model"]: t for t in targets}, model, "model")

    def remove_targets(self, name: str, model: str) -> Spec:
        """Forget them."""
        gone = self.targets(name, model)
        spec = self.classes[name]
        spec["modelTargets"] = [t for t in spec["modelTargets"] if t["model"] != model]
        return gone

    # -- servers

    def set_servers(self, body: Spec) -> Spec:
        """All servers."""
        self.servers = {f.text("name", None): spec for f, spec in _each(body, "servers", system_server)}
        return body

    def add_server(self, body: Spec) -> Spec:
        """One server, new or in place of the one of its name."""
        self.servers[system_server(Fields(body, "body")).name] = body
        return body

    # -- planning

    def load(self, body: Spec) -> None:
        """A whole SystemData in place of everything."""
        fleet_from_body(Fields(body, "body"))  # complains where something is wrong
        system = body["system"]
        self._clear()
        for key, put in (
            ("acceleratorData", self.set_accelerators), ("capacityData", self.set_capacities),
            ("modelData", self.set_models), ("serviceClassData", self.set_classes), ("serverData", self.set_servers),
        ):  # fmt: skip
            put(system.get(key) or {})

    def one(self, body: Spec) -> Spec:
        """Plan a whole SystemData, which also becomes the state."""
        self.load(body)
        return self.optimize(((body["system"].get("optimizerData") or {}).get("optimizer")) or {})

    def optimize(self, optimizer: Spec) -> Spec:
        """Plan what is known; each server keeps its wanted allocation until it is applied."""
        system = {
            "acceleratorData": {"accelerators": list(self.accelerators.values())},
            "capacityData": {"count": list(self.capacities.values())},
            "modelData": {"models": [spec for of in self.models.values() for spec in of.values()]},
            "serviceClassData": {"serviceClasses": list(self.classes.values())},
            "serverData": {"servers": list(self.servers.values())},
            "optimizerData": {"optimizer": optimizer},
        }
        spec = fleet_from_body(Fields({"system": system}, "body"))
        found = plan(spec, queue_model=self._law, time_limit_s=self._time_limit_s)
        if not found.allocations:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in found.unserved.items())
            raise Infeasible(f"no feasible allocation for any server: {reasons}")
        solution = allocation_solution(spec, found)
        for name, allocation in solution["allocations"].items():
            self.servers[name]["desiredAlloc"] = allocation
        return solution

    def apply(self) -> str:
        """What is wanted becomes what runs, under the load as it is."""
        for server in self.servers.values():
            if server.get("desiredAlloc"):
                load = (server.get("currentAlloc") or {}).get("load")
                server["currentAlloc"] = server["desiredAlloc"] | ({"load": load} if load else {})
        return "Done"


def _count(f: Fields) -> str:
    f.whole("count")
    return f.text("type", None)


def _each(body: Spec, key: str, check: Callable[[Fields], object]) -> list[tuple[Fields, Spec]]:
    """The specs of a list, each checked."""
    found = []
    fields = Fields(body, "body")
    for f, spec in zip(fields.each(key), fields.items(key), strict=True):
        check(f)
        found.append((f, spec))
    return found


def _named(known: Mapping[str, _T], name: str, kind: str) -> _T:
    if name not in known:
        raise NotFound(f"{kind} {name!r} is not known; known are {', '.join(sorted(known)) or 'none'}")
    return known[name]


def _pop(known: dict[str, _T], name: str, kind: str) -> _T:
    _named(known, name, kind)
    return known.pop(name)


Route = tuple[str, str, Callable[..., Any]]


def routes(state: FleetState) -> list[Route]:
    """Method, path and what answers: with the body for POST, with the path's parts for GET."""
    s = state
    return [
        ("POST", "/setAccelerators", s.set_accelerators),
        ("GET", "/getAccelerators", lambda: {"accelerators": list(s.accelerators.values())}),
        ("GET", "/getAccelerator/{name}", lambda name: _named(s.accelerators, name, "accelerator")),
        ("POST", "/addAccelerator", s.add_accelerator),
        ("GET", "/removeAccelerator/{name}", lambda name: _pop(s.accelerators, name, "accelerator")),
        ("POST", "/setCapacities", s.set_capacities),
        ("GET", "/getCapacities", lambda: {"count": list(s.capacities.values())}),
        ("GET", "/getCapacity/{name}", lambda name: _named(s.capacities, name, "accelerator type")),
        ("POST", "/setCapacity", s.set_capacity),
        ("GET", "/removeCapacity/{name}", lambda name: _pop(s.capacities, name, "accelerator type")),
        ("POST", "/setModels", s.set_models),
        ("GET", "/getModels", lambda: list(s.models)),
        ("GET", "/getModel/{name}", s.model),
        ("GET", "/addModel/{name}", s.add_model),
        ("GET", "/removeModel/{name}", s.remove_model),
        ("POST", "/setServiceClasses", s.set_classes),
        ("GET", "/getServiceClasses", lambda: {"serviceClasses": list(s.classes.values())}),
        ("GET", "/getServiceClass/{name}", lambda name: _named(s.classes, name, "service class")),
        ("GET", "/addServiceClass/{name}/{priority}", s.add_class),
        ("GET", "/removeServiceClass/{name}", lambda name: _pop(s.classes, name, "service class")),
        ("POST", "/addServiceClassModelTargets", s.add_targets),
        ("GET", "/getServiceClassModelTarget/{name}/{model}", s.targets),
        ("GET", "/removeServiceClassModelTarget/{name}/{model}", s.remove_targets),
        ("POST", "/setServers", s.set_servers),
        ("GET", "/getServers", lambda: {"servers": list(s.servers.values())}),
        ("GET", "/getServer/{name}", lambda name: _named(s.servers, name, "server")),
        ("POST", "/addServer", s.add_server),
        ("GET", "/removeServer/{name}", lambda name: _pop(s.servers, name, "server")),
        ("POST", "/addModelAcceleratorPerf", s.add_performance),
        ("GET", "/getModelAcceleratorPerf/{name}/{accelerator}", s.performance),
        ("GET", "/removeModelAcceleratorPerf/{name}/{accelerator}", s.remove_performance),
        ("GET", "/applyAllocation", s.apply),
    ]
