"""Capacity against policy: what is fixed when the engine starts, and what may change between any two of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from flyball.core.errors import InvalidInput, InvalidKnob, VersionConflict
from flyball.core.knobs import Knob, Space, Value, generation_of
from flyball.engine.block_pool import Eviction

Policy = Literal["fcfs", "priority", "shortest_prefill_first", "longest_prefix_match"]
Victim = Literal["latest_arrival", "least_computed"]
Method = Literal["off", "ngram", "draft", "medusa"]
Quantization = Literal["int8_dynamic", "int8", "int4", "fp8", "nf4"]

MAX_COUNT = 2**31 - 1  # where a knob has no natural bound


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Sizes fixed at start. `None` means: derived from the model when it is loaded."""

    model: Path
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: the checkpoint's own
    device: str = "cpu"
    block_size: int = 16  # tokens a KV block
    num_blocks: int | None = None  # blocks in the pool; None: what kv_cache_bytes holds
    kv_cache_bytes: int = 512 * 2**20  # upper bound of the pool when num_blocks is not given
    max_num_seqs: int = 64  # capacity; the live knob of the same name moves below it
    max_num_batched_tokens: int = 2048  # capacity of one step
    max_model_len: int | None = None  # tokens of one request, prompt and output; None: the model's positions
    threads: int | None = None  # CPU threads of the engine; None: as torch decides
    kernels: Literal["auto", "compiled", "torch"] = "auto"  # auto: compiled where model and machine allow, else torch
    quantization: Quantization | None = None  # of weights, as they are loaded; None: as the checkpoint has them
    quantize_head: bool = False  # the output layer and the embedding as well, in int8
    draft_model: Path | None = None  # a small model with the same tokenizer, which guesses tokens
    medusa_heads: Path | None = None  # heads trained on this model, which guess tokens
    spec_method: Method = "off"  # of guessing, at first; the live knob of the same name changes it

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name}={getattr(self, name)}: the engine needs at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidInput(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below max_num_seqs={self.max_num_seqs}: "
                "every running sequence needs one token a step; raise the first or lower the second"
            )
        if self.num_blocks is not None and self.num_blocks < 1:
            raise InvalidInput(f"num_blocks={self.num_blocks}: the KV cache needs at least 1 block")
        if self.spec_method not in self.spec_methods:
            needed = {"draft": "draft_model", "medusa": "medusa_heads"}.get(self.spec_method, "another name")
            raise InvalidInput(f"spec_method={self.spec_method} needs {needed}: give the folder of one")

    @property
    def spec_methods(self) -> tuple[Method, ...]:
        """Ways of guessing for which everything is there."""
        methods: list[Method] = ["off", "ngram"]
        if self.draft_model is not None:
            methods.append("draft")
        if self.medusa_heads is not None:
            methods.append("medusa")
        return tuple(methods)


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """One immutable snapshot of the policy; each step runs under exactly one of them."""

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_wait_ms: float = 0.0
    max_batch_size: int = 0
    long_prefill_token_threshold: int = 0
    prefill_interval: int = 0
    prefix_caching: bool = True
    eviction: Eviction = "lru"
    kv_cache_limit_blocks: int = 0
    watermark: float = 0.01
    policy: Policy = "fcfs"
    preemption_victim: Victim = "latest_arrival"
    max_queue_len: int = 4096
    max_queue_tokens: int = 0
    request_timeout_s: float = 0.0
    stream_interval: int = 1
    spec_method: Method = "off"
    num_speculative_tokens: int = 4
    spec_max_batch: int = 8
    version: int = field(default=1)

    def values(self) -> dict[str, Value]:
        """The knobs by name, without the version."""
        values: dict[str, Value] = asdict(self)
        del values["version"]
        return values

    @property
    def generation(self) -> str:
        """Hash of the values: the same policy has the same generation, whenever it was set."""
        return generation_of(self.values())

    def changed(self, changes: Mapping[str, object], space: Space, if_version: int | None = None) -> RuntimeConfig:
        """The next snapshot: all changes checked, alone and together, or none taken.

        Raises InvalidKnob, or VersionConflict when `if_version` is not the version in force.
        """
        if if_version is not None and if_version != self.version:
            raise VersionConflict(
                f"the configuration is at version {self.version}, not {if_version}; read it again and repeat the change"
            )
        after = replace(self, **space.check(changes), version=self.version + 1)  # type: ignore[arg-type]  # checked
        if after.max_num_batched_tokens < after.max_num_seqs:
            raise InvalidKnob(
                f"max_num_batched_tokens={after.max_num_batched_tokens} is below max_num_seqs={after.max_num_seqs}: "
                "every running sequence needs one token a step; raise the first or lower the second"
            )
        return after


def knob_space(config: EngineConfig) -> Space:
    """The live knobs of an engine of this capacity."""
    blocks = config.num_blocks or MAX_COUNT  # known once the model is loaded
    return Space((
        Knob(name="max_num_seqs", kind="int", default=config.max_num_seqs, low=1, high=config.max_num_seqs, log=True,
             doc="sequences that run at once; lowering it drains down, running requests are kept"),
        Knob(name="max_num_batched_tokens", kind="int", default=config.max_num_batched_tokens, low=1,
             high=config.max_num_batched_tokens, log=True, doc="tokens computed in one step, prefill and decode"),
        Knob(name="max_wait_ms", kind="float", default=0.0, low=0.0, high=1000.0,
             doc="how long an idle engine gathers requests before it starts a batch; 0 starts at once"),
        Knob(name="max_batch_size", kind="int", default=0, low=0, high=config.max_num_seqs,
             doc="requests that end the gathering before max_wait_ms is over; 0 means max_num_seqs"),
        Knob(name="long_prefill_token_threshold", kind="int", default=0, low=0, high=config.max_num_batched_tokens,
             doc="most prompt tokens of one request in one step, which protects the others' ITL; 0 sets no limit"),
        Knob(name="prefill_interval", kind="int", default=0, low=0, high=1000,
             doc="steps from one with prompt tokens to the next while others decode, which protects their ITL; "
                 "0 and 1 allow them in every step"),
        Knob(name="prefix_caching", kind="bool", default=True,
             doc="reuse KV blocks of equal prompt prefixes; off stops look-ups and inserts"),
        Knob(name="eviction", kind="choice", default="lru", choices=get_args(Eviction),
             doc="which cached block gives way first: the least recently used or the oldest"),
        Knob(name="kv_cache_limit_blocks", kind="int", default=0, low=0, high=blocks,
             doc="KV blocks that may hold content; lowering it drops cached ones and holds admissions back, running "
                 "requests keep theirs; 0 means the whole pool"),
        Knob(name="watermark", kind="float", default=0.01, low=0.0, high=0.5,
             doc="share of the KV blocks that an admission leaves idle, so that running requests can grow; at least "
                 "one block for each of them is left in any case"),
        Knob(name="policy", kind="choice", default="fcfs", choices=get_args(Policy),
             doc="who is admitted first; under all but fcfs a request can wait as long as others come before it"),
        Knob(name="preemption_victim", kind="choice", default="latest_arrival", choices=get_args(Victim),
             doc="who gives its blocks up when they run out; under the policy `priority` the least urgent ones first"),
        Knob(name="max_queue_len", kind="int", default=4096, low=0, high=MAX_COUNT,
             doc="requests that may wait beyond those that could run; more are refused; 0 sets no limit"),
        Knob(name="max_queue_tokens", kind="int", default=0, low=0, high=MAX_COUNT,
             doc="prompt tokens that may wait; requests beyond are refused; 0 sets no limit"),
        Knob(name="request_timeout_s", kind="float", default=0.0, low=0.0, high=86_400.0,
             doc="seconds from arrival after which a request that set no timeout ends; 0 sets none"),
        Knob(name="stream_interval", kind="int", default=1, low=1, high=1024,
             doc="tokens sent to the client at once, after the first; saves work per token"),
        Knob(name="spec_method", kind="choice", default=config.spec_method, choices=config.spec_methods,
             doc="who guesses tokens that the model then verifies in one step; what is said stays the model's"),
        Knob(name="num_speculative_tokens", kind="int", default=4, low=0, high=16,
             doc="most tokens guessed for a request at once; fewer where lately fewer were kept; 0 guesses none"),
        Knob(name="spec_max_batch", kind="int", default=min(8, config.max_num_seqs), low=0,
             high=config.max_num_seqs, doc="requests decoding in a step up to which tokens are guessed; 0: any"),
    ))  # fmt: skip


def first_runtime(config: EngineConfig) -> RuntimeConfig:
    """The policy an engine starts with: every knob at its default."""
    return RuntimeConfig(**knob_space(config).defaults())  # type: ignore[arg-type]  # names and types are the knobs'


def pool_blocks(config: EngineConfig, block_bytes: int, max_positions: int) -> int:
    """KV blocks of an engine: as given, else what the bytes hold, but no more than all sequences at full length need.

    Raises InvalidInput where the bytes hold none.
    """
    if config.num_blocks is not None:
        return config.num_blocks
    bought = config.kv_cache_bytes // block_bytes
    if bought < 1:
        raise InvalidInput(
            f"kv_cache_bytes={config.kv_cache_bytes} holds no KV block; one takes {block_bytes} bytes, give more"
        )
    longest = -(-min(config.max_model_len or max_positions, max_positions) // config.block_size)
    return min(bought, config.max_num_seqs * longest)
