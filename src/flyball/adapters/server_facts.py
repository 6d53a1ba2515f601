"""What a server says of itself before it is loaded: its model, and the configuration in force where it tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from flyball.core.errors import EngineFailed, InvalidInput
from flyball.core.knobs import Value

Protocols = Literal["openai", "triton"]  # /v1/completions, or /v2/models/MODEL/generate_stream
UNVERSIONED = "unversioned"  # the generation of a server that does not tell its configuration


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """One served model; what a foreign server does not tell is None, or empty."""

    url: str  # without /v1
    model: str
    vocab_size: int | None = None
    max_model_len: int | None = None
    generation: str = UNVERSIONED
    protocol: Protocols = "openai"
    configuration: Mapping[str, Value] = field(default_factory=dict)


def ask_server(
    url: str, *, model: str | None = None, api_key: str | None = None, timeout_s: float = 10.0
) -> ServerFacts:
    """Ask an OpenAI-compatible server what it serves; `model` picks one of several, else its first is taken."""
    url = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=timeout_s, trust_env=False) as client:
            card = _model_card(client.get("/v1/models"), url, model)
            config = _config(client.get("/v1/config"))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise EngineFailed(
            f"no server answers at {url} ({error or type(error).__name__}); start one with `flyball serve`, "
            "or give the address of yours with --url"
        ) from None
    return ServerFacts(
        url=url,
        model=str(card["id"]),
        vocab_size=_positive(card.get("vocab_size")),
        max_model_len=_positive(card.get("max_model_len")),
        generation=str(config.get("generation", UNVERSIONED)),
        configuration=config.get("values", {}),
    )


def _model_card(reply: httpx.Response, url: str, model: str | None) -> Mapping[str, object]:
    if reply.status_code != 200:
        raise EngineFailed(
            f"{url}/v1/models answers {reply.status_code}, not a list of models; give the address of an "
            "OpenAI-compatible server with --url, and its key with --api-key if it asks for one"
        )
    try:
        listed: list[dict[str, object]] = reply.json()["data"]
        cards = {card["id"]: card for card in listed if isinstance(card["id"], str)}
    except (ValueError, KeyError, TypeError):
        cards = {}
    if not cards:
        raise EngineFailed(
            f"{url}/v1/models lists no model; give the address of an OpenAI-compatible server with --url"
        )
    if model is None:
        return next(iter(cards.values()))
    if model not in cards:
        raise InvalidInput(f"{url} does not serve {model!r}; it serves {', '.join(cards)}")
    return cards[model]


def _config(reply: httpx.Response) -> dict[str, Any]:
    """Flyball's own route; a server without it answers 404, or something else."""
    try:
        body = reply.json() if reply.status_code == 200 else {}
    except ValueError:
        body = {}
    return body if isinstance(body, dict) else {}


def _positive(value: object) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
