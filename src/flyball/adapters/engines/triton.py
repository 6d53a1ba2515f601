"""Triton: a model's config.pbtxt, rewritten and reloaded by the model-control API while the server runs.

The user's model repository is never written to: the server runs over a copy of links, of which only the model's
config.pbtxt is ours. In it the blocks that belong to the catalogue (`max_batch_size`, `instance_group`,
`dynamic_batching`, some `parameters`) are replaced and all others kept as they were.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

import httpx

from flyball.adapters.engines.catalogue import Catalogue, text_of
from flyball.adapters.engines.process import ChildProcess, await_ready, free_port
from flyball.adapters.engines.readings import translated
from flyball.adapters.engines.spawned import LOCALHOST, Program
from flyball.adapters.server_facts import ServerFacts
from flyball.core.clock import Clock, SystemClock
from flyball.core.errors import EngineFailed, FailureKind, InvalidInput, InvalidKnob
from flyball.core.knobs import Configuration, Space, Value, generation_of
from flyball.core.ports import EngineIdentity
from flyball.tuner.constraints import Constraint

CONFIG = "config.pbtxt"


class TritonTarget:
    """One model of one Triton server as a child process (a `core.ports.EngineTarget`); every knob is live."""

    def __init__(
        self, catalogue: Catalogue, program: Program, *, model: Path, ready_timeout_s: float, logs: Path | None = None,
        clock: Clock | None = None,
    ) -> None:  # fmt: skip
        self.catalogue = catalogue
        self.served_name = model.name
        self._source = _read(model / CONFIG)
        self._program = program
        self._ready_timeout_s = ready_timeout_s
        self._clock = clock or SystemClock()
        self._space = Space(tuple(replace(k, default=v) for k in catalogue.space
                                  for v in [found_in(self._source, k.name, k.default)]))  # fmt: skip
        self._constraints = tuple(map(Constraint, catalogue.constraints()))
        self._values: dict[str, Value] = self._space.defaults()
        self._scratch = TemporaryDirectory(prefix="flyball-triton-")
        self._repository = Path(self._scratch.name) / "models"
        self._log = (logs or Path(self._scratch.name)) / f"triton-{model.name}.log"
        _link(model, self._repository)
        self._port, self._metrics_port = free_port(), free_port()
        self._client = httpx.Client(base_url=self.url, timeout=30.0, trust_env=False)
        self._child: ChildProcess | None = None

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

    def identity(self) -> EngineIdentity:
        """Triton, and the version that a running server tells."""
        try:
            return EngineIdentity(name="triton", version=str(self._client.get("/v2").json()["version"]))
        except (httpx.HTTPError, ValueError, KeyError):
            return EngineIdentity(name="triton", version=self._program.version)

    def facts(self) -> ServerFacts:
        """What the load needs to know of the model; its vocabulary and context are not in config.pbtxt."""
        return ServerFacts(url=self.url, model=self.served_name, protocol="triton")

    def space(self) -> Space:
        """The catalogue's parameters; defaults are those of the model's own config.pbtxt."""
        return self._space

    def constraints(self) -> tuple[str, ...]:
        """The rules of the catalogue."""
        return self.catalogue.constraints()

    def search_ranges(self) -> dict[str, str]:
        """Where looking is worth a trial."""
        told = {p.knob.name: p.search for p in self.catalogue.parameters}
        return {knob.name: told[knob.name] or text_of(knob.default) for knob in self._space}

    def configuration(self) -> Configuration:
        """The values in force, or of the next start; raises EngineFailed once after a crash."""
        if self._child is not None and (code := self._child.ended()) is not None:
            kind, evidence = self.catalogue.classify(code, self._child.output(), ready=True)
            self.stop()
            raise EngineFailed(
                f"triton ended while it served ({kind}, exit code {code}): {evidence}", kind=kind, evidence=evidence
            )
        return dict(self._values)

    def apply(self, values: Configuration) -> str:
        """Write config.pbtxt and reload the model, starting the server first if it does not run.

        Raises InvalidKnob for values out of bounds or against a known rule, EngineFailed if the model does not load;
        then the configuration of before is loaded again.
        """
        wanted = self._values | self._space.check(values)
        for constraint in self._constraints:
            if not constraint.holds(wanted):
                raise InvalidKnob(f"triton refuses what breaks {constraint}; give other values")
        running = self._child is not None and self._child.ended() is None
        if running and wanted == self._values:
            return generation_of(self._values)
        before = self._values
        self._write(wanted)
        if not running:
            self._start()
        elif refused := self._reload():
            self._write(before)
            self._reload()
            raise refused
        self._values = wanted
        return generation_of(self._values)

    def command(self, values: Configuration) -> str:
        """The config.pbtxt to put beside the model, and the call that loads it."""
        text = rewritten(self._source, self._values | dict(values), self.catalogue)
        return (
            f"cat > {self.served_name}/{CONFIG} <<'END'\n{text}END\n"
            f"curl -X POST http://localhost:8000/v2/repository/models/{shlex.quote(self.served_name)}/load"
        )

    def metrics(self) -> dict[str, float]:
        """The server's own readings by our names."""
        try:
            reply = httpx.get(f"http://{LOCALHOST}:{self._metrics_port}/metrics", timeout=10.0, trust_env=False)
            reply.raise_for_status()
        except httpx.HTTPError as error:
            raise EngineFailed(f"triton does not tell its metrics ({error}); apply a configuration first") from None
        return translated(reply.text, self.catalogue.metrics)

    def stop(self) -> None:
        """End the server with everything it started."""
        child, self._child = self._child, None
        if child is not None:
            child.stop()

    def _write(self, values: Configuration) -> None:
        text = rewritten(self._source, values, self.catalogue)
        (self._repository / self.served_name / CONFIG).write_text(text, encoding="utf-8")

    def _reload(self) -> EngineFailed | None:
        try:
            reply = self._client.post(f"/v2/repository/models/{self.served_name}/load")
        except httpx.HTTPError as error:
            return EngineFailed(f"triton does not answer ({error})", kind="unreachable")
        if reply.status_code == 200:
            return None
        said = reply.text[:300]
        kind: FailureKind = self.catalogue.classify(None, said, ready=False)[0]
        return EngineFailed(f"triton did not load the model ({kind}): {said}", kind=kind, evidence=said)

    def _start(self) -> None:
        variables = [f"{name}={value}" for name, value in self._program.variables.items()]
        options = {
            "model-repository": self._repository, "model-control-mode": "explicit", "load-model": self.served_name,
            "http-address": LOCALHOST, "http-port": self._port, "metrics-address": LOCALHOST,
            "metrics-port": self._metrics_port, "allow-grpc": "false",
        }  # fmt: skip
        words = [f"--{name}={value}" for name, value in options.items()]
        self._child = ChildProcess(["env", *variables, *self._program.words, *words, *self._program.arguments],
                                   log=self._log)  # fmt: skip
        try:
            await_ready(self._child, ready=self._answers, timeout_s=self._ready_timeout_s, clock=self._clock)
        except EngineFailed as failed:
            kind, evidence = self.catalogue.classify(self._child.ended(), self._child.output(), ready=False)
            if failed.kind == "timeout":
                kind = "timeout"
            self.stop()
            raise EngineFailed(f"triton did not start ({kind}): {evidence}", kind=kind, evidence=evidence) from None
        except BaseException:
            self.stop()
            raise

    def _answers(self) -> bool:
        try:
            return self._client.get(f"/v2/models/{self.served_name}/ready").status_code == 200
        except httpx.HTTPError:
            return False


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInput(
            f"cannot read {path} ({error.strerror}); give the folder of a model in a Triton repository with --model"
        ) from None


def _link(model: Path, repository: Path) -> None:
    """A repository like the model's own, all links but for the model's config.pbtxt."""
    own = repository / model.name
    own.mkdir(parents=True)
    for part in model.resolve().iterdir():
        if part.name != CONFIG:
            (own / part.name).symlink_to(part)
    for other in model.resolve().parent.iterdir():
        if other.is_dir() and other.name != model.name:
            (repository / other.name).symlink_to(other)


def fields(text: str) -> Iterator[tuple[str, str]]:
    """The top-level fields of a protobuf text, each with its whole text; braces within quotes do not count."""
    position = 0
    while found := re.compile(r"\s*(\w+)\s*:?\s*").match(text, position):
        end, depth, quoted = found.end(), 0, False
        while end < len(text):
            char = text[end]
            if char == '"' and text[end - 1] != "\\":
                quoted = not quoted
            elif not quoted:
                depth += (char in "{[") - (char in "}]")
                if depth == 0 and (char in "}]" or char == "\n"):
                    end += char != "\n"
                    break
            end += 1
        yield found[1], text[found.start() : end].strip().rstrip(",")
        position = end + len(re.compile(r"[\s,]*").match(text, end)[0])  # type: ignore[index]  # matches nothing too


_SCALARS = {
    "max_batch_size": r"^\s*max_batch_size\s*:\s*(\d+)",
    "instance_count": r"\bcount\s*:\s*(\d+)",
    "max_queue_delay_microseconds": r"\bmax_queue_delay_microseconds\s*:\s*(\d+)",
    "preferred_batch_size": r"\bpreferred_batch_size\s*:\s*\[?\s*(\d+)",
}


def found_in(text: str, name: str, default: Value) -> Value:
    """What a config.pbtxt says of one parameter, or the default."""
    if name == "dynamic_batching":
        return any(field == name for field, _ in fields(text))
    if name in _SCALARS:
        found = re.search(_SCALARS[name], text, re.MULTILINE)
        return int(found[1]) if found else default
    said = re.search(rf'key\s*:\s*"{name}"\s*,?\s*value\s*:?\s*{{\s*string_value\s*:\s*"([^"]*)"', text)
    if said is None:
        return default
    if isinstance(default, bool):
        return said[1].lower() == "true"
    return float(said[1]) if isinstance(default, float) else said[1]


def rewritten(text: str, values: Configuration, catalogue: Catalogue) -> str:
    """A config.pbtxt with these values; parameters of the backend are written only away from their default."""
    ours = {"max_batch_size", "instance_group", "dynamic_batching"}
    backend = {p.knob.name: p.knob.default for p in catalogue.parameters if p.key.startswith("parameters.")}
    kept = [
        whole for name, whole in fields(text)
        if name not in ours and not (name == "parameters" and any(f'"{key}"' in whole for key in backend))
    ]  # fmt: skip
    kept.append(f"max_batch_size: {values['max_batch_size']}")
    kept.append(_instance_group(text, values["instance_count"]))
    if values["dynamic_batching"]:
        preferred = values["preferred_batch_size"]
        inner = [f"preferred_batch_size: [ {preferred} ]"] if preferred else []
        inner.append(f"max_queue_delay_microseconds: {values['max_queue_delay_microseconds']}")
        kept.append("dynamic_batching {\n" + "".join(f"  {line}\n" for line in inner) + "}")
    for name, default in backend.items():
        if values[name] != default or f'"{name}"' in text:
            kept.append(f'parameters {{ key: "{name}" value {{ string_value: "{text_of(values[name])}" }} }}')
    return "\n".join(kept) + "\n"


def _instance_group(text: str, count: Value) -> str:
    """The model's own instance group with another count, or a plain one."""
    whole = next((whole for name, whole in fields(text) if name == "instance_group"), "")
    if not whole:
        return f"instance_group [ {{ count: {count} }} ]"
    if re.search(r"\bcount\s*:", whole):
        return re.sub(r"(\bcount\s*:\s*)\d+", rf"\g<1>{count}", whole)
    return re.sub(r"{", f"{{ count: {count}", whole, count=1)
