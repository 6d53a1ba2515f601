"""The resolved configuration says of each value where it came from and why, and says the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest

from flyball.core.errors import InvalidInput
from flyball.engine.config import EngineConfig, knob_space
from flyball.engine.core import EngineCore
from flyball.engine.explain import Setting, explain_unloaded

Make = Callable[..., EngineCore]


def by_name(settings: list[Setting], *, live: bool) -> dict[str, Setting]:
    """Those of one kind."""
    return {s.name: s for s in settings if s.live == live}


def test_every_field_and_every_knob_is_explained_with_the_value_in_force(engine: Make) -> None:
    """Nothing is left out, nothing is without a reason, and values are those of the running engine."""
    core = engine()
    settings = core.explain({"max_num_seqs": "--max-num-seqs"})
    capacity, live = by_name(settings, live=False), by_name(settings, live=True)
    assert list(capacity) == [f.name for f in fields(EngineConfig)]
    assert list(live) == [k.name for k in knob_space(core.config)]
    assert all(s.why and s.source for s in settings)
    for name, setting in capacity.items():
        if name not in ("model", "dtype", "threads"):
            assert setting.value == getattr(core.config, name)
    assert {n: s.value for n, s in live.items()} == core.runtime.values()
    assert capacity["max_num_seqs"].source == "--max-num-seqs"
    assert capacity["dtype"].value == "float32"
    assert capacity["block_size"].source == "default"
    assert live["max_num_seqs"].source == "capacity"


def test_a_changed_knob_names_the_change(engine: Make) -> None:
    """The version and who asked for it; a knob that was not touched keeps its source."""
    core = engine()
    core.update_runtime({"policy": "priority"}, by="ada")
    core.update_runtime({"watermark": 0.2})
    live = by_name(core.explain({}), live=True)
    assert (live["policy"].value, live["policy"].source) == ("priority", "version 2 by ada")
    assert live["watermark"].source == "version 3 by unknown"
    assert live["eviction"].source == "default"


def test_sizes_are_known_without_the_weights_and_equal_the_engines(engine: Make, checkpoint: Path) -> None:
    """The explanation before the start tells what the start then makes."""
    for change, reason in (
        ({}, "need no more than"),
        ({"kv_cache_bytes": 200_000}, "what kv_cache_bytes holds"),
        ({"num_blocks": 33}, "as given"),
        ({"max_model_len": 50, "dtype": "bfloat16", "kernels": "torch"}, "requests of 50 tokens"),
    ):
        asked = replace(EngineConfig(model=checkpoint, block_size=4, max_num_seqs=8, threads=1), **change)
        told = by_name(explain_unloaded(asked, {}), live=False)
        core = engine(**change)
        assert told["num_blocks"].value == core.runner.num_blocks
        assert told["max_model_len"].value == core.max_model_len
        assert reason in told["num_blocks"].why
        block_bytes = core.runner.shape.block_bytes(4)
        assert f"at {block_bytes} bytes a block" in told["num_blocks"].why


def test_a_budget_too_small_for_a_block_is_refused_before_the_start(checkpoint: Path) -> None:
    """One sentence says what a block takes."""
    with pytest.raises(InvalidInput, match="holds no KV block; one takes"):
        explain_unloaded(EngineConfig(model=checkpoint, kv_cache_bytes=10), {})
