"""The resolved configuration, explained: each value, where it came from, and why it is what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from flyball.core.knobs import Value
from flyball.engine.config import EngineConfig, RuntimeConfig, first_runtime, knob_space, pool_blocks
from flyball.engine.history import ConfigChange

_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One value of an engine's configuration."""

    name: str
    value: Value | None
    source: str  # default, model, how it was given, or the change that set it
    why: str
    live: bool  # changes while the engine runs; what is not live is capacity, fixed at start


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What of a model decides the sizes."""

    max_positions: int
    block_bytes: int  # of one KV block over all layers
    dtype: str
    threads: int  # CPU threads that torch takes by itself
    kernels: str = "chosen when the model is loaded: compiled where model and machine allow, else torch"


def explain(
    config: EngineConfig,
    facts: ModelFacts,
    given: Mapping[str, str],
    runtime: RuntimeConfig,
    history: Sequence[ConfigChange] = (),
) -> list[Setting]:
    """Explain a configuration as it was asked for, with `given` naming what set a field ("--max-num-seqs").

    Capacity comes first, then the live knobs under the runtime in force.
    """
    derived = _derived(config, facts)
    told = []
    for field in fields(config):
        asked = getattr(config, field.name)
        value, source, why = derived.get(field.name) or (asked, "default", _WHY[field.name])
        told.append(
            Setting(
                name=field.name,
                value=value if isinstance(value, Value) or value is None else str(value),
                source=given.get(field.name, source),
                why=why,
                live=False,
            )
        )
    changed = {name: change for change in history for name in change.changes}
    values = runtime.values()
    for knob in knob_space(config):
        change = changed.get(knob.name)
        default = "capacity" if hasattr(config, knob.name) else "default"
        source = default if change is None else f"version {change.version} by {change.by or 'unknown'}"
        told.append(Setting(name=knob.name, value=values[knob.name], source=source, why=knob.doc, live=True))
    return told


_WHY = {
    "model": "the folder of the checkpoint",
    "device": "where weights and KV are",
    "quantization": "format of the weights of linear layers; none: as the checkpoint has them",
    "quantize_head": "whether quantization takes in the output layer and the embedding, in int8",
    "block_size": "tokens in a KV block: smaller ones waste less at a request's end, larger ones cost less bookkeeping",
    "draft_model": "the folder of the small model that guesses tokens, if any",
    "medusa_heads": "the folder of the heads that guess tokens, if any",
    "spec_method": "way of guessing at first; the live knob changes it",
    "max_num_seqs": "capacity: most sequences at once; the live knob moves below it",
    "max_num_batched_tokens": "capacity: most tokens in one step; the live knob moves below it",
}


def _derived(config: EngineConfig, facts: ModelFacts) -> dict[str, tuple[Value | None, str, str]]:
    """Fields whose value or reason depends on the model."""
    limit = config.max_model_len or facts.max_positions
    blocks = pool_blocks(config, facts.block_bytes, facts.max_positions)
    used = blocks * facts.block_bytes
    bought = config.kv_cache_bytes // facts.block_bytes
    longest = -(-limit // config.block_size)
    tokens = f"{blocks * config.block_size} tokens, {used / _MIB:.1f} MiB at {facts.block_bytes} bytes a block"
    if config.num_blocks is not None:
        why = f"as given: {tokens}"
    elif blocks == bought:
        why = f"what kv_cache_bytes holds: {tokens}"
    else:
        why = (
            f"max_num_seqs={config.max_num_seqs} requests of {limit} tokens need no more than {longest} blocks each: "
            f"{tokens}; kv_cache_bytes would hold {bought}"
        )
    bound = "not used, since num_blocks is given" if config.num_blocks is not None else f"the pool takes {used} of them"
    return {
        "dtype": (facts.dtype, "model", "the checkpoint's own") if config.dtype == "auto"
        else (config.dtype, "default", "of weights and KV"),
        "num_blocks": (blocks, "default" if config.num_blocks is not None else "model", why),
        "kv_cache_bytes": (config.kv_cache_bytes, "default", f"upper bound of the KV cache; {bound}"),
        "max_model_len": (limit, "default" if config.max_model_len else "model",
                          f"most tokens of one request, of the model's {facts.max_positions} positions"),
        "threads": (config.threads or facts.threads, "default" if config.threads else "machine", "CPU threads"),
        "kernels": (config.kernels, "default", facts.kernels),
    }  # fmt: skip


def explain_unloaded(config: EngineConfig, given: Mapping[str, str]) -> list[Setting]:
    """Explain what an engine would start with; reads the checkpoint's configuration and none of its weights.

    Raises InvalidInput where the checkpoint cannot be read, or the sizes do not go together.
    """
    import torch

    from flyball.engine.model_runner import read_shape

    shape = read_shape(config.model, config.dtype)
    facts = ModelFacts(
        max_positions=shape.max_positions,
        block_bytes=shape.block_bytes(config.block_size),
        dtype=str(shape.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )
    resolved = replace(config, num_blocks=pool_blocks(config, facts.block_bytes, facts.max_positions))
    return explain(config, facts, given, first_runtime(resolved))
