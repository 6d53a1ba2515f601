"""Any OpenAI-compatible server as a target that can only be measured: it has no knobs that we know of."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import httpx

from flyball.adapters.engines.readings import parse
from flyball.adapters.server_facts import ask_server
from flyball.core.errors import EngineFailed, InvalidKnob
from flyball.core.knobs import Configuration, Space
from flyball.core.ports import EngineIdentity


class OpenAITarget:
    """A server with a fixed configuration (a `core.ports.EngineTarget`), which it neither starts nor ends."""

    def __init__(self, url: str, *, model: str | None = None, api_key: str | None = None) -> None:
        self._facts = ask_server(url, model=model, api_key=api_key)
        self.served_name = self._facts.model

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Its address, without /v1."""
        return self._facts.url

    def identity(self) -> EngineIdentity:
        """Nobody asked which engine it is."""
        return EngineIdentity(name="openai")

    def space(self) -> Space:
        """No knob."""
        return Space(())

    def constraints(self) -> tuple[str, ...]:
        """None."""
        return ()

    def search_ranges(self) -> dict[str, str]:
        """None."""
        return {}

    def configuration(self) -> Configuration:
        """Nothing that could be set."""
        return {}

    def apply(self, values: Configuration) -> str:
        """Nothing to set; raises InvalidKnob for anything else."""
        if values:
            raise InvalidKnob(
                f"the server at {self.url} is only measured, so {', '.join(values)} cannot be set; name its engine "
                "instead of openai to have it tuned"
            )
        return self._facts.generation

    def command(self, values: Configuration) -> str:  # noqa: ARG002  # the protocol's
        """How to measure it again."""
        return f"flyball bench --url {self.url} --model {self.served_name}"

    def metrics(self) -> dict[str, float]:
        """Its samples by its own names, where it has a /metrics."""
        try:
            reply = httpx.get(f"{self.url}/metrics", timeout=10.0, trust_env=False)
            reply.raise_for_status()
        except httpx.HTTPError as error:
            raise EngineFailed(f"{self.url} tells no metrics ({error}); measure it from the client's side") from None
        return parse(reply.text)

    def stop(self) -> None:
        """The server stays."""
