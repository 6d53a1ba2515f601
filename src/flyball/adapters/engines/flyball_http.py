"""A running Flyball server as a tuning target: its live knobs over `/v1/config`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from types import TracebackType
from typing import Any, Self

import httpx

from flyball.adapters.engines.catalogue import load, text_of
from flyball.adapters.engines.readings import translated
from flyball.core.errors import EngineFailed, InvalidKnob
from flyball.core.knobs import Configuration, Knob, Space
from flyball.core.ports import EngineIdentity
from flyball.tuner.constraints import Constraint

_CATALOGUE = load("flyball")
CONSTRAINTS = _CATALOGUE.constraints()


def search_ranges(space: Space) -> dict[str, str]:
    """Where looking is worth a trial, within a server's own bounds; one value for knobs that stay as they are."""
    told = _CATALOGUE.search_ranges()
    return {knob.name: _within(knob, told.get(knob.name, text_of(knob.default))) for knob in space}


def _within(knob: Knob, text: str) -> str:
    if "," not in text or knob.kind not in ("int", "float"):
        return text
    assert knob.low is not None
    assert knob.high is not None
    return ",".join(part for part in text.split(",") if knob.low <= float(part) <= knob.high)


class FlyballTarget:
    """Sets the knobs of one Flyball server (a `core.ports.EngineTarget`), which it neither starts nor ends.

    The space is read once; configuration and changes go to the server every time.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 10.0) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._client = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=timeout_s,
            trust_env=False,
        )
        try:
            self._space = _space(self._call("GET")["knobs"])
        except BaseException:
            self._client.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Hang up; the server stays."""
        self._client.close()

    def identity(self) -> EngineIdentity:
        """Flyball, and the version that the server's OpenAPI document tells."""
        try:
            return EngineIdentity(
                name="flyball", version=str(self._call("GET", path="/openapi.json", keys=("info",))["info"]["version"])
            )
        except EngineFailed:
            return EngineIdentity(name="flyball")

    def constraints(self) -> tuple[str, ...]:
        """The engine's relations between knobs that this server has."""
        return tuple(text for text in CONSTRAINTS if all(name in self._space for name in Constraint(text).names))

    def search_ranges(self) -> dict[str, str]:
        """Where looking is worth a trial."""
        return search_ranges(self._space)

    def command(self, values: Configuration) -> str:
        """What a person types to put these values in force."""
        body = json.dumps(dict(values))
        return f"curl -X PATCH {self.url}/v1/config -H 'Content-Type: application/json' -d '{body}'"

    def metrics(self) -> dict[str, float]:
        """The server's own readings by our names."""
        try:
            reply = self._client.get("/metrics")
            reply.raise_for_status()
        except httpx.HTTPError as error:
            raise EngineFailed(f"{self.url} does not tell its metrics ({error}); is it a Flyball server?") from None
        return translated(reply.text, _CATALOGUE.metrics)

    def space(self) -> Space:
        """The server's live knobs, with its bounds and defaults."""
        return self._space

    def configuration(self) -> Configuration:
        """The values in force now."""
        values: dict[str, Any] = self._call("GET")["values"]
        return values

    def apply(self, values: Configuration) -> str:
        """Set some knobs, all or none; the generation returned acts from the server's next step."""
        return str(self._call("PATCH", dict(values))["generation"])

    def explain(self) -> list[dict[str, Any]]:
        """Every setting of the server: name, value, source, why, live."""
        settings: list[dict[str, Any]] = self._call("GET", path="/v1/config/explain", keys=("settings",))["settings"]
        return settings

    def _call(
        self,
        method: str,
        body: Mapping[str, object] | None = None,
        path: str = "/v1/config",
        keys: tuple[str, ...] = ("version", "generation", "values", "knobs"),
    ) -> dict[str, Any]:
        try:
            reply = self._client.request(method, path, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise EngineFailed(
                f"no server answers at {self.url} ({error or type(error).__name__}); start one with `flyball serve`, "
                "or give the address of yours with --url"
            ) from None
        if reply.status_code == 400 and method == "PATCH":
            raise InvalidKnob(_message(reply))
        if reply.status_code == 404:
            raise EngineFailed(
                f"{self.url} has no {path}, so its knobs cannot be set; give the address of a Flyball server"
            )
        if reply.status_code in (401, 403):
            raise EngineFailed(f"{self.url} refuses the key ({_message(reply)}); give the admin key with --api-key")
        if reply.status_code != 200:
            raise EngineFailed(f"{method} {self.url}{path} answered {reply.status_code}: {_message(reply)}")
        try:
            view = reply.json()
            return {key: view[key] for key in keys}
        except (ValueError, KeyError, TypeError):
            raise EngineFailed(
                f"{self.url}{path} answered something else than a configuration; give the address of a Flyball server"
            ) from None


def _space(knobs: Mapping[str, Mapping[str, Any]]) -> Space:
    return Space(tuple(_knob(name, told) for name, told in knobs.items()))


def _knob(name: str, told: Mapping[str, Any]) -> Knob:
    known = {f.name for f in fields(Knob)} & set(told)  # a newer server may tell more
    return Knob(**{key: told[key] for key in known} | {"name": name, "choices": tuple(told.get("choices", ()))})


def _message(reply: httpx.Response) -> str:
    """What the server says is wrong, in OpenAI's form or any other."""
    try:
        return str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return reply.text[:200]
