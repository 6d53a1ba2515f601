"""What is known of each engine, as data: its parameters, the relations between them, its metrics, its last words.

One file an engine in `flyball/data/engines`. A parameter has a type, range, scale, default, meaning, the version since
which it exists, whether it changes live, and where a search is worth its trials; a platform (a processor, a larger GPU)
may change defaults and ranges or lack a parameter. Relations may name facts of the model, as in `{heads}`.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from flyball.core.errors import FailureKind, InvalidInput
from flyball.core.knobs import Configuration, Knob, Space, Value

ENGINES = ("flyball", "vllm", "sglang", "tensorrt_llm", "triton")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of an engine."""

    knob: Knob
    key: str  # where the engine takes it: a flag, or a path in its configuration file
    search: str | None  # the range worth searching, as `--knob` would say it; None: only when the user names it
    since: str  # first version of the engine that has it


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A relation between parameters that the engine insists on."""

    text: str  # an expression over parameter names and {facts} of the model
    refusal: str  # how the engine says so


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a checkpoint's config.json tells; None where it does not."""

    context: int | None = None  # tokens
    vocab: int | None = None
    heads: int | None = None
    kv_heads: int | None = None

    @classmethod
    def read(cls, folder: Path) -> ModelFacts:
        """The facts of a checkpoint folder; of anything else (a hub's name, an engine file) nothing is known."""
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError) as error:
            raise InvalidInput(f"cannot read {folder}/config.json ({error}); give a complete checkpoint") from None
        config |= config.get("text_config") or {}
        return cls(
            context=config.get("max_position_embeddings"),
            vocab=config.get("vocab_size"),
            heads=config.get("num_attention_heads"),
            kv_heads=config.get("num_key_value_heads"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """Everything known of one engine on one platform."""

    engine: str
    version: str  # the version that was read
    platform: str
    executable: str  # what starts it; empty for Flyball, whose server `flyball serve` starts
    variables: Mapping[str, str]  # of its environment, unless the user gives others
    parameters: tuple[Parameter, ...]
    rules: tuple[Rule, ...]
    metrics: Mapping[str, str]  # our name -> the engine's
    failures: tuple[tuple[FailureKind, re.Pattern[str]], ...]
    facts: ModelFacts = field(default_factory=ModelFacts)

    @property
    def space(self) -> Space:
        """The parameters as knobs."""
        return Space(tuple(parameter.knob for parameter in self.parameters))

    def constraints(self) -> tuple[str, ...]:
        """The relations that can be stated here: their parameters exist, and the model tells their facts."""
        known = {name: value for name in ("context", "vocab", "heads", "kv_heads")
                 if (value := getattr(self.facts, name)) is not None}  # fmt: skip
        names = {parameter.knob.name for parameter in self.parameters}
        stated = []
        for rule in self.rules:
            try:
                text = rule.text.format(**known)
            except KeyError:
                continue
            if names >= set(re.findall(r"\b[a-z_]{3,}\b", text)) - {"and", "not"}:
                stated.append(text)
        return tuple(stated)

    def search_ranges(self) -> dict[str, str]:
        """Where looking is worth a trial; one value for a parameter that is to be left alone."""
        return {p.knob.name: p.search or text_of(p.knob.default) for p in self.parameters}

    def changed(self, values: Configuration) -> list[tuple[Parameter, Value]]:
        """Parameters away from their default, in the catalogue's order."""
        return [(p, values[p.knob.name]) for p in self.parameters if values[p.knob.name] != p.knob.default]

    def classify(self, exit_code: int | None, log: str, *, ready: bool) -> tuple[FailureKind, str]:
        """Why an engine ended, and the line of its log that says so; `ready`: it had served before."""
        for kind, pattern in self.failures:
            lines = [line.strip() for line in log.splitlines() if pattern.search(line)]
            if lines:
                return kind, lines[-1][:300]
        if exit_code == -9:  # nobody here sends it before the engine was asked to end: the kernel did
            return "out of memory", "ended by signal 9, which is what the kernel does when memory runs out"
        return "crash" if ready else "start", last_error(log)


def last_error(log: str) -> str:
    """The last line that names an error and not only points to another one, or the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b\w*(Error|Exception)\b|\berror\b", line) and "above" not in line]
    return (errors or lines or ["it said nothing"])[-1][:300]


def load(engine: str, *, version: str = "", platform: str | None = None, facts: ModelFacts | None = None) -> Catalogue:
    """The catalogue of an engine, without what its version lacks; raises InvalidInput for unknown names.

    An empty version stands for the one that the catalogue was made from, no platform for the base one.
    """
    if engine not in ENGINES:
        raise InvalidInput(
            f"unknown engine {engine!r}; there are {', '.join(ENGINES)}, and openai for any other server"
        )
    data = tomllib.loads((resources.files("flyball") / "data" / "engines" / f"{engine}.toml").read_text("utf-8"))
    platforms = data.get("platform", {})
    platform = platform or data.get("base", "")
    if platform != data.get("base", "") and platform not in platforms:
        known = ", ".join([data["base"], *platforms]) if "base" in data else "none"
        raise InvalidInput(f"{engine} has no platform {platform!r}; known: {known}")
    facts = facts or ModelFacts()
    told = platforms.get(platform, {})
    parameters = (_parameter(entry, told, facts) for entry in data["parameter"])
    have = _version(version or data["version"])
    return Catalogue(
        engine=engine,
        version=data["version"],
        platform=platform,
        executable=data.get("executable", ""),
        variables=data.get("variables", {}) | told.get("variables", {}),
        parameters=tuple(
            p for p in parameters if p.knob.name not in told.get("absent", ()) and _version(p.since) <= have
        ),
        rules=tuple(Rule(text=rule["text"], refusal=rule["refusal"]) for rule in data.get("rule", ())),
        metrics=data["metrics"],
        failures=tuple((entry["kind"], re.compile(entry["pattern"])) for entry in data.get("failure", ())),
        facts=facts,
    )


def _parameter(entry: Mapping[str, Any], platform: Mapping[str, Any], facts: ModelFacts) -> Parameter:
    name = entry["name"]
    knob = Knob(
        name=name,
        kind=entry["kind"],
        default=platform.get("defaults", {}).get(name, entry["default"]),
        low=entry.get("low"),
        high=entry.get("high"),
        log=entry.get("log", False),
        choices=tuple(entry.get("choices", ())),
        live=entry.get("live", False),
        doc=entry["doc"],
    )
    if "model" in entry and (told := getattr(facts, entry["model"])) is not None:
        knob = replace(knob, default=told)
    return Parameter(
        knob=knob,
        key=entry.get("key", "--" + name.replace("_", "-")),
        search=platform.get("search", {}).get(name, entry.get("search")),
        since=entry["since"],
    )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0]))[:3]


def text_of(value: Value) -> str:
    """A value as people write it on a command line.

    >>> text_of(True), text_of(0.5), text_of(8)
    ('true', '0.5', '8')
    """
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
