"""For operators: live configuration, the cache, requests under way, draining."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Query, Request, Response

from flyball.core.errors import InvalidKnob
from flyball.engine.config import RuntimeConfig
from flyball.server.auth import Keys
from flyball.server.engine_client import EngineClient
from flyball.server.errors import ApiError
from flyball.server.gate import Gate

Json = dict[str, Any]


def config_routes(engine: EngineClient, keys: Keys) -> APIRouter:
    """Read the knobs, change them all or none at a step boundary, see and undo what was changed."""
    router = APIRouter(prefix="/v1")

    def view(runtime: RuntimeConfig, response: Response) -> Json:
        response.headers["etag"] = f'"{runtime.version}"'
        knobs = {}
        for knob in engine.space:
            knobs[knob.name] = asdict(knob)
            del knobs[knob.name]["name"]
        return {
            "version": runtime.version,
            "generation": runtime.generation,
            "values": runtime.values(),
            "knobs": knobs,
        }

    @router.get("/config")
    async def read(response: Response) -> Json:
        """The knobs in force, with their version, bounds, defaults and meaning."""
        return view(engine.runtime, response)

    @router.patch("/config")
    async def change(
        request: Request,
        response: Response,
        changes: Annotated[dict[str, Any], Body()],
        dry_run: bool = False,
        revert_to: Annotated[int | None, Query(ge=0, lt=2**63)] = None,
        preempt: bool = False,
        if_match: Annotated[str | None, Header()] = None,
    ) -> Json:
        """Set some knobs, all or none; `If-Match: VERSION` refuses when another change came between (412).

        With `dry_run=true` nothing changes, and the answer is what would be in force. `revert_to=VERSION` starts from
        the values of an earlier version; the body may then be `{}`. Where a limit is lowered, running requests are kept
        and the limit holds for those who come; with `preempt=true` those beyond it give way at once.
        """
        if not changes and revert_to is None:
            raise InvalidKnob(f"no knob named; give at least one of {', '.join(k.name for k in engine.space)}")
        after = await engine.update_runtime(
            changes,
            if_version=_version(if_match),
            dry_run=dry_run,
            revert_to=revert_to,
            preempt=preempt,
            by=keys.name(request),
        )
        return view(after, response)

    @router.get("/config/history")
    async def history() -> Json:
        """The last changes, oldest first: who, when, from what to what, and what was measured before and after."""
        return {"changes": [asdict(one) for one in await engine.history()]}

    @router.get("/config/explain")
    async def explain() -> Json:
        """Every setting, capacity and knobs: its value, where that came from, and why."""
        return {"settings": [asdict(one) for one in await engine.explain()]}

    return router


def operation_routes(engine: EngineClient, gate: Gate) -> APIRouter:
    """The cache, requests under way, draining."""
    router = APIRouter(prefix="/v1")

    @router.delete("/cache")
    async def flush() -> Json:
        """Forget every known prefix; requests under way keep their KV and their answers do not change."""
        before = engine.stats()
        flushed = await engine.flush_cache()
        return {
            "flushed_blocks": flushed,
            "flushed_tokens": flushed * engine.info()["block_size"],
            "requests_running": before.running,
        }

    @router.get("/requests")
    async def requests() -> Json:
        """The answers in the making, as of the last step."""
        return {"requests": list(engine.requests())}

    def drain_state() -> Json:
        return {"draining": gate.draining, "requests_inside": gate.inside}

    @router.get("/drain")
    async def draining() -> Json:
        """Whether new requests are turned away, and how many are still answered."""
        return drain_state()

    @router.post("/drain")
    async def drain() -> Json:
        """Turn new requests away and say not ready, until DELETE; what runs comes to its end."""
        gate.shut("operator")
        return drain_state()

    @router.delete("/drain")
    async def resume() -> Json:
        """Take new requests again; a server that was told to stop still stops."""
        gate.reopen("operator")
        return drain_state()

    return router


def _version(if_match: str | None) -> int | None:
    """The version in an If-Match header: a number, quoted as an ETag or not; `*` matches any."""
    if if_match is None or if_match.strip() == "*":
        return None
    text = if_match.strip().strip('"')
    if not text.isascii() or not text.isdigit() or len(text) > 19:
        raise ApiError(
            400,
            "If-Match holds no version; give the number that GET /v1/config shows",
            code="invalid_value",
            param="If-Match",
        )
    return int(text)
