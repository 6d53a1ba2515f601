"""The holder over HTTP: what it does and why, commands, approval, and its metrics for Prometheus."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from fastapi import APIRouter, Depends, FastAPI
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flyball.core.errors import InvalidInput
from flyball.core.knobs import Configuration, Value
from flyball.server import errors
from flyball.server.auth import Keys
from flyball.tuner.hold import COMMANDS, MODES, Holder

Json = dict[str, Any]

RUNS = ("running", "paused", "stopped", "killed")
SAFE_REASONS = ("thrashing", "budget", "regression", "violations", "audit", "manual")
RULES = (
    "length", "unknown_knob", "type", "non_finite", "bounds", "allow_list", "max_step", "min_interval",
    "updates_per_second", "cumulative_change", "thrash", "cooldown", "safe_mode", "stopped", "stale_generation",
    "audit", "engine",
)  # fmt: skip
ACTIONS = ("apply", "wait", "ignore", "refuse", "rollback", "shadow", "ask", "hold", "rest")
EVENTS = (
    "start", "proposal", "window", "command", "apply", "apply_failed", "refusal", "rollback", "promote", "safe_enter",
    "safe_exit", "ignored", "decision",
)  # fmt: skip


class Approvals:
    """Changes wait here for a person: the hook of a holder, answered over HTTP."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wish: dict[str, Value] | None = None
        self._answer: bool | None = None

    def __call__(self, values: Configuration, why: str) -> bool | None:  # noqa: ARG002  # the hook's signature
        """The answer to this change, or None while there is none; another wish asks anew."""
        with self._lock:
            if self._wish != dict(values):
                self._wish, self._answer = dict(values), None
            answer, self._answer = self._answer, None
            if answer is not None:
                self._wish = None
            return answer

    def answer(self, *, approved: bool) -> Mapping[str, Value]:
        """Approve or refuse what waits; raises InvalidInput if nothing does."""
        with self._lock:
            if self._wish is None:
                raise InvalidInput("no change waits for approval; look at GET /v1/hold first")
            self._answer = approved
            return dict(self._wish)


def create_app(holder: Holder, *, admin_key: str | None = None, approvals: Approvals | None = None) -> FastAPI:
    """The holder's routes; with a key, all but metrics and health ask for it."""
    app = FastAPI(title="Flyball hold", docs_url=None, redoc_url=None)
    errors.install(app)
    registry = CollectorRegistry()
    registry.register(_HoldCollector(holder))
    keys = Keys(users=(admin_key,) if admin_key else (), admin=admin_key)
    app.include_router(_routes(holder, approvals), dependencies=[Depends(keys.admin_guard)])

    @app.get("/health")
    def health() -> Json:
        """Whether the loop may still act."""
        return {"status": "ok", "run": holder.run}

    @app.get("/metrics")
    def scrape() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _routes(holder: Holder, approvals: Approvals | None) -> APIRouter:
    router = APIRouter(prefix="/v1/hold")

    @router.get("")
    def status() -> Json:
        """Everything at a glance."""
        return holder.status()

    @router.get("/decisions")
    def decisions(last: int = 20) -> Json:
        """The latest decisions, oldest first."""
        return {"decisions": [d.describe() for d in list(holder.decisions)[-max(1, last) :]]}

    @router.get("/explain/{number}")
    def explain(number: int) -> Json:
        """One decision: what was seen, wished and done, and why."""
        return holder.explain(number)

    @router.post("/approval/{answer}")
    def approval(answer: Literal["approve", "refuse"]) -> Json:
        """Answer what waits for approval."""
        if approvals is None:
            raise InvalidInput("this holder asks for no approval; start it with --approve")
        return {"answer": answer, "values": dict(approvals.answer(approved=answer == "approve"))}

    @router.post("/{command}")
    def command(command: str) -> Json:
        """pause, resume, stop, rollback, kill or safe."""
        return {"command": command, "done": holder.command(command), "run": holder.run}

    return router


class _HoldCollector(Collector):
    """Reads the holder at each scrape."""

    def __init__(self, holder: Holder) -> None:
        self._holder = holder

    def collect(self) -> Iterator[Metric]:
        """All families."""
        holder, guard = self._holder, self._holder.guard
        yield _states("flyball_hold_run", "1 for the state the loop is in.", "state", RUNS, holder.run)
        yield _states("flyball_hold_mode", "1 for the mode it was started in.", "mode", MODES, holder.mode)
        safe = guard.safe.reason if guard.safe else None
        yield _states("flyball_hold_safe_mode", "1 for why nothing may change.", "reason", SAFE_REASONS, safe)
        yield GaugeMetricFamily("flyball_hold_generation", "Rises by one with each change.", value=guard.generation)
        yield GaugeMetricFamily(
            "flyball_hold_trying", "1 while not the last known good is in force.", value=float(guard.trying)
        )
        yield GaugeMetricFamily(
            "flyball_hold_baseline_regressions", "Regressions against the baseline so far.",
            value=guard.baseline.regressions,
        )  # fmt: skip
        yield GaugeMetricFamily(
            "flyball_hold_waiting_for_approval", "1 while a change waits for a person.",
            value=float(holder.waiting_for is not None),
        )  # fmt: skip
        knobs = GaugeMetricFamily("flyball_hold_knob", "Knobs in force; a switch is 0 or 1.", labels=["knob"])
        for name, value in guard.values.items():
            if not isinstance(value, str):
                knobs.add_metric([name], float(value))
        yield knobs
        yield _counts("flyball_hold_decisions", "Decisions by what was done.", "action", ACTIONS, holder.counts)
        rules = {rule: guard.counts.get(f"refusal:{rule}", 0) for rule in RULES}
        yield _counts("flyball_hold_refusals", "Proposals refused, by rule.", "rule", RULES, rules)
        yield _counts("flyball_hold_audit_events", "Audit events by kind.", "kind", EVENTS, guard.counts)
        commands = {c: holder.counts.get(f"command:{c}", 0) for c in COMMANDS}
        yield _counts("flyball_hold_commands", "Commands by a person.", "command", COMMANDS, commands)
        for name, doc, value in (
            ("windows", "Windows seen.", holder.counts["windows"]),
            ("windows_ignored", "Windows that belong to no configuration.", holder.counts["ignored"]),
            ("violations", "Windows in which a promise was broken.", holder.counts["violations"]),
            ("not_approved", "Changes that a person refused.", holder.counts["not_approved"]),
            ("load_shifts", "Changes of the traffic that were noticed.", holder.shifts),
            ("contexts_recalled", "Shifts to a traffic pattern that was known.", holder.recalled),
        ):
            yield CounterMetricFamily(f"flyball_hold_{name}", doc, value=value)


def _states(name: str, doc: str, label: str, known: tuple[str, ...], now: str | None) -> Metric:
    family = GaugeMetricFamily(name, doc, labels=[label])
    for state in known:
        family.add_metric([state], float(state == now))
    return family


def _counts(name: str, doc: str, label: str, known: tuple[str, ...], counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, doc, labels=[label])
    for key in known:
        family.add_metric([key], counts.get(key, 0))
    return family
