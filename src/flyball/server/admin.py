"""Live configuration: read the knobs, change them all or none, at a step boundary."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Response

from flyball.core.errors import InvalidKnob
from flyball.engine.config import RuntimeConfig
from flyball.server.engine_client import EngineClient
from flyball.server.errors import ApiError


def routes(engine: EngineClient) -> APIRouter:
    """The routes over one engine."""
    router = APIRouter(prefix="/v1")

    def view(runtime: RuntimeConfig, response: Response) -> dict[str, Any]:
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
    async def read(response: Response) -> dict[str, Any]:
        """The knobs in force, with their version, bounds, defaults and meaning."""
        return view(engine.runtime, response)

    @router.patch("/config")
    async def change(
        response: Response,
        changes: Annotated[dict[str, Any], Body()],
        dry_run: bool = False,
        if_match: Annotated[str | None, Header()] = None,
    ) -> dict[str, Any]:
        """Set some knobs, all or none; `If-Match: VERSION` refuses when another change came between (412).

        With `dry_run=true` nothing changes, and the answer is what would be in force.
        """
        if not changes:
            raise InvalidKnob(f"no knob named; give at least one of {', '.join(k.name for k in engine.space)}")
        after = await engine.update_runtime(changes, if_version=_version(if_match), dry_run=dry_run)
        return view(after, response)

    return router


def _version(if_match: str | None) -> int | None:
    """The version in an If-Match header: a number, quoted as an ETag or not; `*` matches any."""
    if if_match is None or if_match.strip() == "*":
        return None
    text = if_match.strip().strip('"')
    if not text.isascii() or not text.isdigit():
        raise ApiError(
            400,
            f"If-Match: {if_match} is no version; give the number that GET /v1/config shows",
            code="invalid_value",
            param="If-Match",
        )
    return int(text)
