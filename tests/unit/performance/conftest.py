"""The recorded answers of llm-inferno's queue-analysis."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flyball.performance.queueing import Replicas

VECTORS = Path(__file__).parents[2] / "data" / "inferno" / "queue_analysis.json"


@dataclass(frozen=True)
class Case:
    """One replica and what the Go code says of it; its milliseconds are our seconds times 1000."""

    name: str
    body: dict[str, Any]

    def replicas(self) -> Replicas:
        """The replica."""
        given = self.body["input"]
        return Replicas.of(
            alpha_s=given["alpha"] / 1e3,
            beta_s=given["beta"] / 1e3,
            gamma_s=given["gamma"] / 1e3,
            input_tokens=given["avgInputTokens"],
            output_tokens=given["avgOutputTokens"],
            max_batch=given["maxBatchSize"],
            max_queue=given["maxQueueSize"],
            max_step_tokens=given["maxNumTokens"],
        )


@pytest.fixture(scope="session")
def vectors() -> dict[str, Any]:
    """The whole file."""
    body: dict[str, Any] = json.loads(VECTORS.read_text())
    return body


@pytest.fixture(scope="session")
def cases(vectors: dict[str, Any]) -> dict[str, Case]:
    """Its cases by name."""
    return {body["name"]: Case(body["name"], body) for body in vectors["cases"]}
