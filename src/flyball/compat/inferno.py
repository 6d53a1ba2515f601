"""The stateless REST routes of llm-inferno: `/solve`, `/target`, `/optimize` (queue-analysis) and `/optimizeOne`.

Bodies and units are theirs (milliseconds, requests per second; per minute in SystemData), keys may be in any case. What
is wrong with a body is told in `message` with a 4xx status. Two answers differ: a load of 0 is solved, and where some
servers cannot be served the others are planned all the same and these listed in `unserved` (404 only if none can be).
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool

from flyball.adapters.fields import Fields, parse_json
from flyball.adapters.fleet_files import allocation_solution, fleet_from_body
from flyball.core.errors import FlyballError, Infeasible, InvalidInput
from flyball.performance.queueing import Metrics, Replicas, queue_model
from flyball.performance.sizing import Goals, optimal_batch, size
from flyball.planner.plan import plan
from flyball.planner.problem import BATCH_CEILING

_MS = 1e-3
_MAX_BODY = 16 << 20  # bytes: a fleet of some ten thousand servers
_TIME_LIMIT_S = 30.0
_NUMBERS = (
    "RPS", "maxBatchSize", "avgInputTokens", "avgOutputTokens", "alpha", "beta", "gamma", "maxQueueSize", "targetTTFT",
    "targetITL",
)  # fmt: skip
_PROBLEM = {"type": "object", "properties": {name: {"type": "number", "minimum": 0} for name in _NUMBERS}}
_SYSTEM = {"type": "object", "properties": {"system": {"type": "object"}}, "required": ["system"]}

Answer = dict[str, Any]


def create_app(*, token: str | None = None, law: str = "v3") -> FastAPI:
    """The routes as an application; with a token, only for who bears it. `law` names the queue model.

    >>> [route.path for route in create_app().routes if route.path.startswith(("/so", "/ta", "/op"))]
    ['/openapi.json', '/solve', '/target', '/optimize', '/optimizeOne']
    """
    described = [Depends(HTTPBearer(auto_error=False))] if token else []  # for OpenAPI; `_respond` checks it
    app = FastAPI(title="Flyball for llm-inferno", docs_url=None, redoc_url=None, dependencies=described)

    def route(path: str, schema: Answer, answer: Callable[[Fields, str], Answer]) -> None:
        async def handle(request: Request) -> JSONResponse:
            return await _respond(request, token, lambda body: answer(body, law))

        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        about = (answer.__doc__ or "").strip()
        app.add_api_route(
            path,
            handle,
            methods=["POST"],
            name=path[1:],
            summary=about,
            openapi_extra={"requestBody": body},
        )

    route("/solve", _PROBLEM, _solve)
    route("/target", _PROBLEM, _target)
    route("/optimize", _PROBLEM, _optimize)
    route("/optimizeOne", _SYSTEM, _optimize_one)
    return app


async def _respond(request: Request, token: str | None, answer: Callable[[Fields], Answer]) -> JSONResponse:
    given = request.headers.get("authorization", "").encode()
    if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
        return _refusal(401, "no valid token; send the header Authorization: Bearer TOKEN")
    body = await _read(request)
    if body is None:
        return _refusal(413, f"the body is larger than {_MAX_BODY} bytes; send less")
    try:
        return JSONResponse(await run_in_threadpool(_answer, body, answer))
    except Infeasible as error:
        return _refusal(404, str(error))
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


def _answer(body: bytes, answer: Callable[[Fields], Answer]) -> Answer:
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidInput("the body is not text; send JSON in UTF-8") from None
    try:
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            found = answer(Fields(parse_json(text, "the body"), "body"))
        json.dumps(found, allow_nan=False)
    except (FloatingPointError, OverflowError, ValueError):
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


def _optimize_one(f: Fields, law: str) -> Answer:
    """An allocation for every server of a fleet."""
    spec = fleet_from_body(f)
    found = plan(spec, queue_model=law, time_limit_s=_TIME_LIMIT_S)
    if not found.allocations:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.unserved.items())
        raise Infeasible(f"no feasible allocation for any server: {reasons}")
    return allocation_solution(spec, found)
