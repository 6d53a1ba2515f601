"""A running Flyball server as a tuning target: its live knobs over `/v1/config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import TracebackType
from typing import Any, Self

import httpx

from flyball.core.errors import EngineFailed, InvalidKnob
from flyball.core.knobs import Configuration, Knob, Space

# Relations between Flyball's knobs: the first is refused by the engine; beyond the second, larger thresholds change
# nothing, so that trials there would be copies.
CONSTRAINTS = (
    "max_num_seqs <= max_num_batched_tokens",
    "long_prefill_token_threshold <= max_num_batched_tokens",
)

# Policies that a workload's owner decides on, not its speed: who goes first, who is refused, when to give up. Searching
# them would make a study long, and a faster service by refusing more is none.
NOT_SEARCHED = (
    "max_batch_size", "prefill_interval", "eviction", "kv_cache_limit_blocks", "watermark", "policy",
    "preemption_victim", "max_queue_len", "max_queue_tokens", "request_timeout_s", "stream_interval",
)  # fmt: skip


def search_ranges(space: Space) -> dict[str, str]:
    """Where looking is worth a trial, as `--knob` would say it; the engine itself accepts more.

    Fewer than 32 tokens a step starve any model, and an idle engine that waits 50 ms has lost more than batching gains.
    """
    ranges = {"max_num_batched_tokens": "32..", "max_wait_ms": "0,2,5,10,20,50"}
    ranges |= {name: str(space[name].default) for name in NOT_SEARCHED if name in space}
    if "long_prefill_token_threshold" in space:
        high = space["long_prefill_token_threshold"].high or 0
        ranges["long_prefill_token_threshold"] = ",".join(["0", *(str(2**k) for k in range(5, 20) if 2**k <= high)])
    return {name: text for name, text in ranges.items() if name in space}


class FlyballTarget:
    """Sets the knobs of one Flyball server (a `core.ports.Target`).

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
        self._client.close()

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
