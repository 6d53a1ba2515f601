"""The command line of vLLM: `vllm serve MODEL --flag value --switch --no-switch`."""

from __future__ import annotations

from flyball.adapters.engines.catalogue import Catalogue, text_of
from flyball.adapters.engines.spawned import LOCALHOST, Start
from flyball.core.knobs import Configuration


class VllmDialect:
    """See `spawned.Dialect`."""

    ready_path = "/health"
    metrics_path = "/metrics"

    def start(self, catalogue: Catalogue, values: Configuration, *, model: str, port: int, folder: str) -> Start:  # noqa: ARG002  # the protocol's
        """Only what is away from its default is written."""
        words = ["serve", model, "--host", LOCALHOST, "--port", str(port)]
        for parameter, value in catalogue.changed(values):
            if isinstance(value, bool):
                words.append(parameter.key if value else parameter.key.replace("--", "--no-", 1))
            else:
                words += [parameter.key, text_of(value)]
        return Start(words=tuple(words))

    def served_name(self, model: str) -> str:
        """The model as it was given."""
        return model
