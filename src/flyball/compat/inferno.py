"""The REST services of llm-inferno in one application, with their bodies and units, and keys in any case.

Units are theirs: milliseconds, requests per second, and per minute in SystemData.

queue-analysis  /solve, /target, /optimize
optimizer       /optimizeOne, and the state-full set (`flyball.compat.inferno_state`) with its own /optimize
model-tuner     /tune, /merge, /getparams, /warmup, /calibrate, /calibration-status
model-trainer   /train
collector       /collect, /sweep
actuator        /update

Two services have an /optimize: a body with a replica's parameters (`alpha`, `beta`, `gamma`) is queue-analysis', any
other the optimizer's. What is wrong with a body is told in `message` with a 4xx status. Two answers differ: a load of 0
is solved, and where some servers cannot be served the others are planned all the same and these listed in `unserved`
(404 only if none can be).
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool

from flyball.adapters.fields import Fields, parse_json
from flyball.compat.inferno_state import FleetState, spelled
from flyball.compat.inferno_state import routes as fleet_routes
from flyball.compat.inferno_tuner import NothingTuned, Tuner, train
from flyball.compat.inferno_world import World
from flyball.core.clock import SystemClock
from flyball.core.errors import ActuationFailed, FlyballError, Infeasible, InvalidInput, ObservationFailed
from flyball.performance.queueing import Metrics, Replicas, queue_model
from flyball.performance.sizing import Goals, optimal_batch, size
from flyball.planner.problem import BATCH_CEILING

_MS = 1e-3
_MAX_BODY = 16 << 20  # bytes: a fleet of some ten thousand servers
_TIME_LIMIT_S = 30.0
_NUMBERS = (
    "RPS", "maxBatchSize", "avgInputTokens", "avgOutputTokens", "alpha", "beta", "gamma", "maxQueueSize", "targetTTFT",
    "targetITL",
)  # fmt: skip
_PROBLEM = {"type": "object", "properties": {name: {"type": "number", "minimum": 0} for name in _NUMBERS}}
_OPTIMIZE = {"anyOf": [_PROBLEM, {"type": "object", "properties": {"unlimited": {"type": "boolean"}}}]}
_ANY = {"type": "object"}
_REPLICAS = {"type": "array", "items": {"type": "object"}, "minItems": 1}
_ALLOCATIONS = {"type": "object", "properties": dict.fromkeys(("allocations", "kube-resources"), _ANY)}
_SYSTEM = {"type": "object", "properties": {"system": {"type": "object"}}, "required": ["system"]}

Answer = dict[str, Any]


def create_app(
    *,
    token: str | None = None,
    law: str = "v3",
    state: Path | None = None,
    world: Callable[[FleetState], World] = World,
) -> FastAPI:
    """The routes as an application; with a token, only for who bears it. `law` names the queue model.

    `state` is a file in which the tuner keeps what it learns. `world` makes what collector and actuator work on; of
    itself it is the fleet that was set.

    >>> app = create_app()
    >>> [route.path for route in app.routes if route.path.startswith(("/so", "/ta", "/op", "/tr", "/tu"))]
    ['/openapi.json', '/solve', '/target', '/optimize', '/optimizeOne', '/tune', '/train']
    """
    described = [Depends(HTTPBearer(auto_error=False))] if token else []  # for OpenAPI; `_respond` checks it
    app = FastAPI(title="Flyball for llm-inferno", docs_url=None, redoc_url=None, dependencies=described)
    door = _Door(app, token)
    fleet = FleetState(law=law, time_limit_s=_TIME_LIMIT_S)
    tuner = Tuner(law=law, clock=SystemClock(), file=state)

    def optimize(body: object) -> Answer:
        f = Fields(body, "body")
        if any(name in f for name in _NUMBERS):
            return _optimize(f, law)
        spec = _mapping(body)
        return fleet.call(lambda: fleet.optimize(spec.get("optimizer", spec)))

    door.post("/solve", _PROBLEM, _about(_solve), lambda body: _solve(Fields(body, "body"), law))
    door.post("/target", _PROBLEM, _about(_target), lambda body: _target(Fields(body, "body"), law))
    door.post("/optimize", _OPTIMIZE, "The best batch of a replica, or a plan for the fleet that was set.", optimize)
    door.post("/optimizeOne", _SYSTEM, _about(fleet.one), lambda body: fleet.call(lambda: fleet.one(_mapping(body))))
    _add_fleet(door, fleet)
    _add_tuner(door, tuner)
    _add_world(door, world(fleet))
    door.post("/train", _ANY, _about(train), lambda body: train(body, law))
    return app


@dataclass(frozen=True, slots=True)
class _Door:
    """Adds routes to an application."""

    app: FastAPI
    token: str | None

    def post(self, path: str, schema: Answer, about: str, answer: Callable[[object], object]) -> None:
        """A route that answers a body."""

        async def handle(request: Request) -> JSONResponse:
            return await _respond(request, self.token, answer)

        described = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
        self._add(path, "POST", about, handle, described)

    def get(self, path: str, about: str, answer: Callable[..., object], *queried: str) -> None:
        """A route that answers the parts of its path, or of its query."""
        names = queried or tuple(part[1:-1] for part in path.split("/") if part.startswith("{"))

        async def handle(request: Request) -> JSONResponse:
            given = {name: request.path_params.get(name, request.query_params.get(name, "")) for name in names}
            return await _respond(request, self.token, lambda _: answer(**given), bodiless=True)

        place = "query" if queried else "path"
        parameters = [{"name": n, "in": place, "required": True, "schema": {"type": "string"}} for n in names]
        self._add(path, "GET", about, handle, {"parameters": parameters} if names else {})

    def _add(self, path: str, method: str, about: str, handle: Callable[..., object], described: Answer) -> None:
        self.app.add_api_route(
            path, handle, methods=[method], name=path[1:], summary=about or path[1:], openapi_extra=described
        )


def _add_fleet(door: _Door, fleet: FleetState) -> None:
    def from_body(change: Callable[..., object]) -> Callable[[object], object]:
        return lambda body: fleet.call(lambda: change(_mapping(body)))

    def from_path(change: Callable[..., object]) -> Callable[..., object]:
        return lambda **given: fleet.call(lambda: change(**given))

    for method, path, change in fleet_routes(fleet):
        if method == "POST":
            door.post(path, _ANY, _about(change), from_body(change))
        else:
            door.get(path, _about(change), from_path(change))


def _add_tuner(door: _Door, tuner: Tuner) -> None:
    door.post("/tune", _REPLICAS, _about(tuner.tune), tuner.tune)
    door.post("/calibrate", _REPLICAS, _about(tuner.calibrate), tuner.calibrate)
    door.post("/merge", _ANY, _about(tuner.merge), lambda body: tuner.merge(_mapping(body)))
    door.get("/getparams", _about(tuner.parameters), tuner.parameters, "model", "accelerator")
    door.get("/warmup", _about(tuner.warmup), tuner.warmup)
    door.get("/calibration-status", _about(tuner.status), tuner.status)


def _add_world(door: _Door, world: World) -> None:
    door.get("/collect", _about(world.collect), world.collect)
    door.get("/sweep", _about(world.sweep), world.sweep, "server")
    door.post("/update", _ALLOCATIONS, _about(world.update), lambda body: world.update(_mapping(body)))


def _about(answer: Callable[..., object]) -> str:
    return (answer.__doc__ or "").strip().partition("\n")[0]


def _mapping(body: object) -> Answer:
    Fields(body, "body")  # complains unless it is one
    return cast("Answer", spelled(body))


async def _respond(
    request: Request, token: str | None, answer: Callable[[object], object], *, bodiless: bool = False
) -> JSONResponse:
    given = request.headers.get("authorization", "").encode()
    if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
        return _refusal(401, "no valid token; send the header Authorization: Bearer TOKEN")
    body = b"null" if bodiless else await _read(request)
    if body is None:
        return _refusal(413, f"the body is larger than {_MAX_BODY} bytes; send less")
    try:
        return JSONResponse(await run_in_threadpool(_answer, body, answer))
    except NothingTuned as error:
        return _refusal(422, str(error))
    except Infeasible as error:
        return _refusal(404, str(error))
    except (ObservationFailed, ActuationFailed) as error:
        return _refusal(424, str(error))  # what the answer depends on failed
    except FlyballError as error:
        return _refusal(400, str(error))


async def _read(request: Request) -> bytes | None:
    """The body, or None if it is too large."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MAX_BODY:
            return None
    return bytes(body)


def _answer(body: bytes, answer: Callable[[object], object]) -> object:
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidInput("the body is not text; send JSON in UTF-8") from None
    try:
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            found = answer(parse_json(text, "the body"))
        json.dumps(found, allow_nan=False)
    except (FloatingPointError, OverflowError, ValueError, np.linalg.LinAlgError):
        raise InvalidInput("the body's numbers are out of any range a server has; correct them") from None
    return found


def _refusal(status: int, message: str) -> JSONResponse:
    headers = {"www-authenticate": "Bearer"} if status == 401 else None
    return JSONResponse({"message": message}, status, headers)


def _replicas(f: Fields, *, batch: int = 0) -> Replicas:
    """One replica; `batch` is its limit where the body has none."""
    return Replicas.of(
        alpha_s=f.number("alpha") * _MS,
        beta_s=f.number("beta") * _MS,
        gamma_s=f.number("gamma") * _MS,
        input_tokens=f.number("avgInputTokens"),
        output_tokens=f.number("avgOutputTokens"),
        max_batch=f.whole("maxBatchSize") or batch,
        max_queue=f.whole("maxQueueSize"),
    )


def _goals(f: Fields) -> Goals:
    return Goals.of(
        1, ttft_s=f.number("targetTTFT") * _MS or np.inf, itl_s=f.number("targetITL") * _MS or np.inf
    )  # fmt: skip


def _analysis(seen: Metrics, max_rps: float) -> Answer:
    return {
        "throughput": float(seen.throughput_rps[0]),
        "avgRespTime": float(seen.response_s[0]) / _MS,
        "avgWaitTime": float(seen.wait_s[0]) / _MS,
        "avgNumInServ": float(seen.in_service[0]),
        "avgPrefillTime": float(seen.prefill_s[0]) / _MS,
        "avgTTFT": float(seen.ttft_s[0]) / _MS,
        "avgITL": float(seen.itl_s[0]) / _MS,
        "maxRPS": max_rps,
        "rho": float(seen.utilization[0]),
        "loss": float(seen.loss[0]),
    }


def _solve(f: Fields, law: str) -> Answer:
    """What a replica does under a load."""
    queues = queue_model(law).prepare(_replicas(f))
    return _analysis(queues.analyze(np.array([f.number("RPS")])), float(queues.max_rate_rps[0]))


def _target(f: Fields, law: str) -> Answer:
    """The largest load within targets of TTFT and ITL."""
    queues = queue_model(law).prepare(_replicas(f))
    sized = size(queues, _goals(f))
    if not sized.feasible[0]:
        idle = f"TTFT {sized.idle_ttft_s[0] / _MS:.4g} ms and ITL {sized.idle_itl_s[0] / _MS:.4g} ms when idle"
        raise Infeasible(f"no load keeps the targets: the server needs {idle}; relax the targets")
    return {
        **_analysis(sized.metrics, float(queues.max_rate_rps[0])),
        "RPSTargetTTFT": float(sized.rate_ttft_rps[0]),
        "RPSTargetITL": float(sized.rate_itl_rps[0]),
    }


def _optimize(f: Fields, law: str) -> Answer:
    """The smallest batch that gives away almost no throughput within the targets."""
    model, replicas = queue_model(law), _replicas(f, batch=BATCH_CEILING)
    best = optimal_batch(model, replicas, _goals(f))
    feasible = bool(best.sized.feasible[0])
    max_rps = float(model.prepare(replicas).max_rate_rps[0])
    found = _analysis(best.sized.metrics, max_rps) if feasible else {"throughput": 0.0, "maxRPS": max_rps}
    return {
        "concurrency": int(best.batch[0]),
        **found,
        "M_ITL": int(best.batch_itl[0]),
        "M_TPF": int(best.batch_prefill[0]),
        "feasible": feasible,
    }
