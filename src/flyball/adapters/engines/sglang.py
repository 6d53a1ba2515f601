"""SGLang's command line: `sglang serve --model-path MODEL --flag value --switch`."""

from __future__ import annotations

from flyball.adapters.engines.catalogue import Catalogue, text_of
from flyball.adapters.engines.spawned import LOCALHOST, Start
from flyball.core.knobs import Configuration


class SglangDialect:
    """See `spawned.Dialect`; SGLang's switches can only be turned on, and all of them are off by default."""

    ready_path = "/health"
    metrics_path = "/metrics"

    def start(self, catalogue: Catalogue, values: Configuration, *, model: str, port: int, folder: str) -> Start:  # noqa: ARG002  # the protocol's
        """Only what is away from its default is written; metrics are switched on."""
        words = ["serve", "--model-path", model, "--host", LOCALHOST, "--port", str(port), "--enable-metrics"]
        for parameter, value in catalogue.changed(values):
            words += [parameter.key] if isinstance(value, bool) else [parameter.key, text_of(value)]
        return Start(words=tuple(words))

    def served_name(self, model: str) -> str:
        """The model as it was given."""
        return model
