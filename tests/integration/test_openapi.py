"""Requests made from our own OpenAPI document by schemathesis: whatever comes, the server answers and lives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import status_code_conformance

from flyball.engine.async_engine import AsyncEngine
from flyball.engine.config import EngineConfig
from flyball.server.app import create_app

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Serve = Callable[..., str]

EXAMPLES = 40  # for each route
LAST = ("/v1/config", "/v1/drain")  # what they set makes later requests time out or be turned away, as it should


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> AsyncEngine:
    """Short answers, so that many fit."""
    config = EngineConfig(model=tiny_checkpoint, dtype="float32", max_model_len=48, max_num_seqs=8, num_blocks=64)
    return AsyncEngine(config, model_name="tiny", seed=1)


def test_no_request_from_the_document_is_a_server_error(serve: Serve, engine: AsyncEngine) -> None:
    """Each route and method, valid and invalid bodies: no 5xx, and only documented codes."""
    app = create_app(engine)
    url = serve(app)
    schema = schemathesis.openapi.from_dict(app.openapi())
    operations = sorted((one.ok() for one in schema.get_all_operations()), key=lambda one: one.path.startswith(LAST))
    tried = set()
    for operation in operations:
        tried.add(f"{operation.method.upper()} {operation.path}")

        @settings(
            max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy())
        def holds(case: Any) -> None:
            response = case.call(base_url=url, timeout=60)
            if case.operation.path.startswith("/v1/drain"):
                return
            case.validate_response(response, checks=[not_a_server_error, status_code_conformance])

        holds()
    assert engine.error is None
    assert tried >= {"POST /v1/completions", "POST /v1/chat/completions", "POST /v1/generate/batch", "DELETE /v1/cache"}
