"""TensorRT-LLM's server: `trtllm-serve MODEL --flag value --extra_llm_api_options FILE.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from flyball.adapters.engines.catalogue import Catalogue, text_of
from flyball.adapters.engines.spawned import LOCALHOST, Start
from flyball.core.knobs import Configuration

FILE = "flyball-trtllm.yaml"


class TensorrtLlmDialect:
    """See `spawned.Dialect`; what has no flag goes into the YAML file."""

    ready_path = "/health"
    metrics_path = "/prometheus/metrics"

    def start(self, catalogue: Catalogue, values: Configuration, *, model: str, port: int, folder: str) -> Start:
        """Only what is away from its default is written; the figures behind the metrics are switched on."""
        words = [model, "--host", LOCALHOST, "--port", str(port)]
        options: dict[str, Any] = {"return_perf_metrics": True}
        for parameter, value in catalogue.changed(values):
            if parameter.key.startswith("--"):
                words += [parameter.key, text_of(value)]
                continue
            *path, last = parameter.key.split(".")
            place = options
            for part in path:
                place = place.setdefault(part, {})
            place[last] = value
        words += ["--extra_llm_api_options", str(Path(folder) / FILE)]
        return Start(words=tuple(words), files={FILE: yaml.safe_dump(options, sort_keys=False)})

    def served_name(self, model: str) -> str:
        """A folder is served under its own name, anything else as it was given."""
        return Path(model).name if Path(model).is_dir() else model
