"""From the options of `flyball tune` to the engine that is tuned: found, described, started where it must be."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from flyball.adapters.engines.process import free_port, spawned
from flyball.adapters.engines.spawned import SpawnedTarget
from flyball.adapters.engines.targets import TargetOptions, make_target
from flyball.adapters.engines.triton import TritonTarget
from flyball.adapters.server_facts import ServerFacts, ask_server
from flyball.cli.engines import engines_folder
from flyball.core.errors import EngineFailed, InvalidInput
from flyball.core.ports import EngineTarget

if TYPE_CHECKING:
    from rich.console import Console

READY_S = 120.0  # for our own server to load the bundled model


def target_options(
    engine: str,
    *,
    model: str | None,
    url: str | None,
    api_key: str | None,
    path: str | None,
    arguments: Sequence[str] | None,
    variables: Sequence[str] | None,
    logs: Path | None,
    platform: str | None,
    ready_timeout_s: float,
) -> TargetOptions:
    """The options as plain data; an engine's path may also come from FLYBALL_VLLM, FLYBALL_SGLANG, ..."""
    folder = engines_folder()
    return TargetOptions(
        engine=engine,
        model=model,
        url=url,
        api_key=api_key,
        program=path or os.environ.get(f"FLYBALL_{engine.upper()}"),
        search_path=tuple(str(place) for place in sorted(folder.glob("*"))),
        platform=platform,
        arguments=tuple(word for text in arguments or () for word in text.split("=", 1)),
        variables=dict(map(_variable, variables or ())),
        ready_timeout_s=ready_timeout_s,
        logs=str(logs) if logs else None,
    )


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise InvalidInput(f"cannot read the variable {text!r}; write NAME=VALUE")
    return name, value


@contextmanager
def opened_target(options: TargetOptions, console: Console) -> Iterator[tuple[EngineTarget, ServerFacts]]:
    """The target, and what is known of the model it serves; ended on the way out if it was started here.

    A Flyball server runs from here on; an engine that changes by restarts starts with its first configuration.
    """
    if options.engine == "flyball":
        with _flyball_url(options, console) as url:
            facts = ask_server(url, model=options.model if options.url else None, api_key=options.api_key)
            with make_target(_at(options, url)) as target:
                yield target, facts
        return
    with make_target(options) as target:
        identity = target.identity()
        console.print(f"{identity.name} {identity.version or '(version unknown)'} at {target.url}")
        yield target, _facts(target)


def first_start(target: EngineTarget, console: Console) -> None:
    """Start the engine as it is by itself, so that a study of one that cannot start ends before it begins.

    Raises EngineFailed, unless memory ran out: then other configurations may fit where the default does not.
    """
    console.print("starting it with its default configuration ...")
    try:
        target.apply({})
    except EngineFailed as failed:
        if failed.kind != "out of memory":
            raise
        console.print(f"the default does not fit: {failed}", markup=False)


def _facts(target: EngineTarget) -> ServerFacts:
    if isinstance(target, SpawnedTarget | TritonTarget):
        return target.facts()
    raise AssertionError(f"{type(target).__name__} tells its facts over HTTP")


def _at(options: TargetOptions, url: str) -> TargetOptions:
    return TargetOptions(engine=options.engine, url=url, api_key=options.api_key)


@contextmanager
def _flyball_url(options: TargetOptions, console: Console) -> Iterator[str]:
    if options.url is not None:
        yield options.url
        return
    with own_server(options.model, console) as url:
        yield url


@contextmanager
def own_server(model: str | None, console: Console) -> Iterator[str]:
    """Serve the model on a free port while the block runs; yields the address."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "flyball", "serve", *([model] if model else []), "--port", str(port)]
    console.print(f"starting {model or 'the bundled model'} at {url} ...")
    with httpx.Client(base_url=url, timeout=2.0, trust_env=False) as client:

        def ready() -> bool:
            try:
                return client.get("/health/ready").status_code == 200
            except httpx.HTTPError:
                return False

        with spawned(command, ready=ready, timeout_s=READY_S):
            yield url
    console.print(f"stopped the server at {url}")
