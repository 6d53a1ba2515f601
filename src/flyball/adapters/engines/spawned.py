"""An engine that runs as a child process and changes its configuration by a restart: vLLM, SGLang, TensorRT-LLM.

What differs between them is how a configuration is written on a command line (`Dialect`); starting, waiting, saying why
a start failed, noticing a crash and leaving nothing behind are the same.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Protocol, Self

import httpx

from flyball.adapters.engines.catalogue import Catalogue
from flyball.adapters.engines.process import ChildProcess, await_ready, free_port
from flyball.adapters.engines.readings import translated
from flyball.adapters.server_facts import ServerFacts
from flyball.core.clock import Clock, SystemClock
from flyball.core.errors import EngineFailed, FailureKind, InvalidKnob
from flyball.core.knobs import Configuration, Space, Value, generation_of
from flyball.core.ports import EngineIdentity
from flyball.tuner.constraints import Constraint

LOCALHOST = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A command line, and the configuration files that it names."""

    words: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)  # name within the working folder -> text


class Dialect(Protocol):
    """How one engine is told its configuration."""

    ready_path: str  # answers 200 once requests are served
    metrics_path: str

    def start(self, catalogue: Catalogue, values: Configuration, *, model: str, port: int, folder: str) -> Start:
        """The command line after the program's own words; `folder` is where its files will lie."""
        ...

    def served_name(self, model: str) -> str:
        """What requests call the model."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What is started, whatever the configuration."""

    words: tuple[str, ...]  # the executable, and what comes before the configuration
    version: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)  # added to its environment
    arguments: tuple[str, ...] = ()  # the user's own, after the configuration


class SpawnedTarget:
    """One engine as a child process (a `core.ports.EngineTarget`).

    Nothing runs until the first `apply`. A configuration that breaks a known rule is refused without a start.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        dialect: Dialect,
        program: Program,
        *,
        model: str,
        ready_timeout_s: float,
        logs: Path | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.catalogue = catalogue
        self.served_name = dialect.served_name(model)
        self._dialect = dialect
        self._program = program
        self._model = model
        self._ready_timeout_s = ready_timeout_s
        self._clock = clock or SystemClock()
        self._scratch = TemporaryDirectory(prefix="flyball-engine-")
        self._folder = Path(self._scratch.name)  # configuration files, and logs where no folder is given
        self._logs = logs or self._folder
        self._port = free_port()
        self._space = catalogue.space
        self._constraints = tuple(map(Constraint, catalogue.constraints()))
        self._values: dict[str, Value] = self._space.defaults()
        self._child: ChildProcess | None = None
        self._starts = 0
        self._client = httpx.Client(base_url=self.url, timeout=10.0, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._client.close()
        self._scratch.cleanup()

    @property
    def url(self) -> str:
        """Its address, whether it runs or not."""
        return f"http://{LOCALHOST}:{self._port}"

    @property
    def log(self) -> Path:
        """The output of the engine's last start; each start has a file of its own."""
        return self._logs / f"{self.catalogue.engine}-{self._port}-{self._starts}.log"

    def identity(self) -> EngineIdentity:
        """The engine's name, and its version where its installation tells it."""
        return EngineIdentity(name=self.catalogue.engine, version=self._program.version)

    def facts(self) -> ServerFacts:
        """What the load needs to know of the model, before anything runs."""
        told = self.catalogue.facts
        return ServerFacts(url=self.url, model=self.served_name, vocab_size=told.vocab, max_model_len=told.context)

    def space(self) -> Space:
        """Every parameter of the catalogue."""
        return self._space

    def constraints(self) -> tuple[str, ...]:
        """The rules that the engine insists on, for this model."""
        return self.catalogue.constraints()

    def search_ranges(self) -> dict[str, str]:
        """Where looking is worth a trial."""
        return self.catalogue.search_ranges()

    def configuration(self) -> Configuration:
        """The values in force, or of the next start; raises EngineFailed once after a crash."""
        if self._child is not None and (code := self._child.ended()) is not None:
            kind, evidence = self._explain(code, ready=True)
            raise EngineFailed(
                f"{self.catalogue.engine} ended while it served ({kind}, exit code {code}): {evidence}",
                kind=kind, evidence=evidence,
            )  # fmt: skip
        return dict(self._values)

    def apply(self, values: Configuration) -> str:
        """Restart with these values, unless the engine runs with them already; returns when it serves.

        Raises InvalidKnob for values out of bounds or against a known rule, and EngineFailed, with its kind, if the
        engine does not come up; then nothing runs, and the values are those of before.
        """
        wanted = self._values | self._space.check(values)
        for constraint in self._constraints:
            if not constraint.holds(wanted):
                raise InvalidKnob(f"{self.catalogue.engine} refuses what breaks {constraint}; give other values")
        if self._child is None or self._child.ended() is not None or wanted != self._values:
            self.stop()
            self._start(wanted)
            self._values = wanted
        return generation_of(self._values)

    def command(self, values: Configuration) -> str:
        """What a person types, with the default port, to run the engine with these values."""
        start = self._dialect.start(
            self.catalogue, self._values | dict(values), model=self._model, port=8000, folder="."
        )
        notes = [f"cat > {name} <<'END'\n{text}END" for name, text in start.files.items()]
        variables = [f"{name}={shlex.quote(value)}" for name, value in self._program.variables.items()]
        words = map(shlex.quote, (*self._program.words, *start.words, *self._program.arguments))
        return "\n".join([*notes, " ".join([*variables, *words])])

    def metrics(self) -> dict[str, float]:
        """The engine's own readings by our names."""
        try:
            reply = self._client.get(self._dialect.metrics_path)
            reply.raise_for_status()
        except httpx.HTTPError as error:
            raise EngineFailed(
                f"{self.catalogue.engine} at {self.url} does not tell its metrics ({error}); apply a configuration "
                "first, and leave its metrics on", kind="unreachable",
            ) from None  # fmt: skip
        return translated(reply.text, self.catalogue.metrics)

    def stop(self) -> None:
        """End the engine with everything it started."""
        child, self._child = self._child, None
        if child is not None:
            child.stop()

    def _start(self, values: Configuration) -> None:
        start = self._dialect.start(
            self.catalogue, values, model=self._model, port=self._port, folder=str(self._folder)
        )
        for name, text in start.files.items():
            (self._folder / name).write_text(text, encoding="utf-8")
        variables = [f"{name}={value}" for name, value in self._program.variables.items()]
        self._starts += 1
        command = ["env", *variables, *self._program.words, *start.words, *self._program.arguments]
        self._child = ChildProcess(command, log=self.log)
        try:
            await_ready(self._child, ready=self._answers, timeout_s=self._ready_timeout_s, clock=self._clock)
        except EngineFailed as failed:
            code = self._child.ended()
            kind, evidence = self._explain(code, ready=False) if failed.kind == "start" else (
                "timeout", f"not ready after {self._ready_timeout_s:g} s; its last words: {_last(self._child.output())}"
            )  # fmt: skip
            self._child.stop()
            self._child = None
            raise EngineFailed(
                f"{self.catalogue.engine} did not start ({kind}): {evidence}", kind=kind, evidence=evidence
            ) from None
        except BaseException:
            self.stop()
            raise

    def _answers(self) -> bool:
        try:
            return self._client.get(self._dialect.ready_path).status_code == 200
        except httpx.HTTPError:
            return False

    def _explain(self, code: int | None, *, ready: bool) -> tuple[FailureKind, str]:
        assert self._child is not None
        kind, evidence = self.catalogue.classify(code, self._child.output(), ready=ready)
        if ready:
            self._child.stop()
            self._child = None
        return kind, evidence


def _last(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return (lines or ["none"])[-1][:200]


def installed_version(executable: Path, distributions: Sequence[str]) -> str:
    """Version of the first distribution found in the virtual environment of an executable; empty if none is there."""
    for name in distributions:
        for info in executable.resolve().parent.parent.glob(f"lib/python*/site-packages/{name}-*.dist-info"):
            return info.name.removeprefix(f"{name}-").removesuffix(".dist-info")
    return ""
